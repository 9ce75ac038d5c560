"""The primitives' rules, registered: above all their lowering, to the kernels' custom calls by platform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _ffi
from .._compat import apply_primitive, batching, is_static_dim, mlir
from .._options import Options

# XLA checks the types of attributes strictly, hence the NumPy scalars.


def _attributes(options: Options, sm_margin: int) -> dict[str, Any]:
    return {
        "zero_centered_gamma": np.bool_(options.zero_centered_gamma),
        "round_before_gamma": np.bool_(options.rounding == "before_gamma"),
        "sm_margin": np.int64(sm_margin),
    }


def forward_attributes(options: Options, *, save_rrms: bool) -> dict[str, Any]:
    margin = options.sm_margin.forward if save_rrms else options.sm_margin.inference
    return {"eps": np.float32(options.eps), **_attributes(options, margin)}


def backward_attributes(options: Options) -> dict[str, Any]:
    return _attributes(options, options.sm_margin.backward)


def register(
    primitive: Any,
    *,
    abstract_eval: Callable[..., Sequence[Any]],
    batch: Callable[..., Any],
    reference: Callable[..., Sequence[jax.Array]],
    target: str,
    target_attributes: Callable[..., dict[str, Any]],
    fuses: Callable[..., bool] | None = None,
    unfused: Callable[..., Sequence[jax.Array]] | None = None,
) -> None:
    """Registers all rules of a primitive.

    There is one lowering for all platforms: the kernel's custom call where one is loaded, else plain JAX.

    Args:
        primitive: takes a parameter ``options``.
        abstract_eval: from the operands' types to the results'.
        batch: JAX's batching rule.
        reference: same operands, parameters and results as the primitive.
        target: name of the XLA FFI target.
        target_attributes: from the operands' types and the primitive's parameters to the custom call's attributes.
        fuses: from what ``target_attributes`` takes, whether the CUDA kernel takes such operands; None if it takes all.
        unfused: in place of the CUDA kernel where it does not: as ``reference``, but with simpler kernels in it.
    """
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    batching.primitive_batchers[primitive] = batch
    plain = mlir.lower_fun(reference, multiple_results=True)

    def lower_plain(ctx: Any, *operands: Any, **params: Any) -> Any:
        if params["options"].require_kernel:
            raise NotImplementedError(_no_kernel(ctx.module_context.platforms))
        return plain(ctx, *operands, **params)

    def lower_kernel(ctx: Any, *operands: Any, **params: Any) -> Any:
        attributes = target_attributes(*ctx.avals_in, **params)
        return jax.ffi.ffi_lowering(target)(ctx, *operands, **attributes)

    def lower_cuda(ctx: Any, *operands: Any, **params: Any) -> Any:
        if _ffi.why_not_on_local_gpus() is not None:
            return lower_plain(ctx, *operands, **params)
        if fuses is None or unfused is None or fuses(*ctx.avals_in, **params):
            return lower_kernel(ctx, *operands, **params)
        return mlir.lower_fun(unfused, multiple_results=True)(ctx, *operands, **params)

    mlir.register_lowering(primitive, lower_plain)
    if _ffi.CPU.module is not None:
        mlir.register_lowering(primitive, lower_kernel, platform="cpu")
    if _ffi.CUDA.module is not None:
        mlir.register_lowering(primitive, lower_cuda, platform="cuda")


def rows_are_aligned(hidden: Any, *dtypes: np.dtype) -> bool:
    """Whether rows of all these dtypes begin at multiples of 16 bytes: what the fused CUDA kernels need."""
    return is_static_dim(hidden) and all(hidden * dtype.itemsize % 16 == 0 for dtype in dtypes)


def _no_kernel(platforms: Sequence[str]) -> str:
    reasons = [
        f"the {native.platform} kernels did not load: {native.reason}"
        for native in (_ffi.CPU, _ffi.CUDA)
        if native.module is None and native.platform.lower() in platforms
    ]
    if (reason := _ffi.why_not_on_local_gpus()) is not None:
        reasons.append(reason)
    why = "; ".join(reasons) or "there are kernels for cpu and cuda only"
    return (
        f"implementation='kernel' on platform {', '.join(platforms)}: {why}. "
        "Use implementation=None to fall back to plain JAX there, or see jax_rmsnorm.info()."
    )
