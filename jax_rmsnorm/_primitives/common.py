"""What the primitives share: shapes and types of operands, lowering by platform, batching of operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _ffi
from .._compat import mlir
from .._options import Options

KERNEL_DTYPES = frozenset(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def attributes(options: Options, sm_margin: int) -> dict[str, Any]:
    """The handlers' attributes. XLA checks their types strictly, hence the NumPy scalars."""
    return {
        "zero_centered_gamma": np.bool_(options.zero_centered_gamma),
        "round_before_gamma": np.bool_(options.rounding == "before_gamma"),
        "sm_margin": np.int64(sm_margin),
    }


def register_lowerings(
    primitive: Any,
    reference: Callable[..., Sequence[jax.Array]],
    target: str,
    target_attributes: Callable[..., dict[str, Any]],
) -> None:
    """One lowering for all platforms: the kernel's custom call where one is loaded, else ``reference`` in plain JAX.

    Args:
        primitive: takes a parameter ``options``.
        reference: same operands, parameters and results as the primitive.
        target: name of the XLA FFI target.
        target_attributes: from the primitive's parameters to the custom call's attributes.
    """

    def plain(ctx: Any, *operands: Any, options: Options, **params: Any) -> Any:
        if options.require_kernel:
            raise NotImplementedError(_no_kernel(ctx.module_context.platforms))
        lower = mlir.lower_fun(reference, multiple_results=True)
        return lower(ctx, *operands, options=options, **params)

    def kernel(ctx: Any, *operands: Any, **params: Any) -> Any:
        if "cuda" in ctx.module_context.platforms and _ffi.why_not_on_local_gpus() is not None:
            return plain(ctx, *operands, **params)
        return jax.ffi.ffi_lowering(target)(ctx, *operands, **target_attributes(**params))

    mlir.register_lowering(primitive, plain)
    for native in (_ffi.CPU, _ffi.CUDA):
        if native.module is not None:
            mlir.register_lowering(primitive, kernel, platform=native.platform.lower())


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


def batch_size(operands: Sequence[Any], axes: Sequence[int | None]) -> int:
    """The length of the batch axis that `jax.vmap` gave to at least one operand."""
    return next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
