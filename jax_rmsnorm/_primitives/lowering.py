"""The primitives' rules, registered: above all their lowering, to the kernels' custom calls by platform."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from .. import _ffi
from .._compat import (
    apply_primitive,
    batching,
    is_static_dim,
    lower_partitioned,
    mlir,
    requires_devices,
)
from .._options import Options
from .._partitioning import (
    Axes,
    Rule,
    has_nothing_to_split,
    partitioned,
    runs_on_one_device,
    why_no_kernel_for_parts,
    why_not_partitioned,
)
from .choice import kernel_pays_on_gpu
from .common import sum_dgamma
from .gradients import how_to_add_up, with_sum

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
    rule: Callable[..., Rule],
    target: str,
    target_attributes: Callable[..., dict[str, Any]],
    scratch: Callable[..., Sequence[Any]] | None = None,
    fuses: Callable[..., bool] | None = None,
    unfused: Callable[..., Sequence[jax.Array]] | None = None,
    first_gradient: int | None = None,
    aliases: Callable[[Options], dict[int, int]] | None = None,
) -> None:
    """Registers all rules of a primitive.

    There is one lowering for all platforms and meshes. Where there is something to split, `_partitioning` does that.
    What one device does is a second primitive's: the kernel's custom call where one is loaded and pays (see
    `choice`), else plain JAX.

    Args:
        primitive: takes a parameter ``options``.
        abstract_eval: from the operands' types to the results'.
        batch: JAX's batching rule, which is told of the batch axis first.
        reference: same operands, parameters and results as the primitive; unless the rule keeps rows whole, it takes
            ``shards`` too, the mesh axes that the last axis is sharded over.
        rule: from the operands and parameters to the `Rule` by which the operation is split.
        target: name of the XLA FFI target.
        target_attributes: from the operands' types and the primitive's parameters to the custom call's attributes.
        scratch: of a backward, from the same to the types of the custom call's further results; None for a forward.
        fuses: from the same, whether the CUDA kernel takes such operands; None if it takes all.
        unfused: in place of the CUDA kernel where it does not: as ``reference``, but with simpler kernels in it.
        first_gradient: of a backward that takes several gradients of y (its parameter ``gradients``), the place
            of the first one among the operands.
        aliases: from the options to operands, by their places, that the kernel overwrites with results of the same
            types; None if there are none.
    """
    call = _kernel_call(
        primitive.name,
        abstract_eval,
        reference,
        target,
        target_attributes,
        scratch,
        fuses,
        unfused,
        aliases,
    )
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    batching.fancy_primitive_batchers[primitive] = batch

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        if first_gradient is not None:
            add_up = how_to_add_up(params["gradients"], on_one_device=runs_on_one_device(ctx))
            if add_up is not None:
                run = with_sum(primitive, add_up, first_gradient, **params)
                return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

        local = functools.partial(call, **params)
        plain = functools.partial(reference, **params)

        def shard(axes: Axes, *shards: jax.Array) -> Sequence[jax.Array]:
            run = local
            if axes.hidden:
                _require_whole_rows(params["options"], axes)
                run = functools.partial(plain, shards=axes.hidden)
            if scratch is None:
                return run(*shards)
            return sum_dgamma(run, axes, *shards, has_gamma=len(ctx.avals_out) > 1)

        if has_nothing_to_split(ctx):
            run = local
        elif (why := why_not_partitioned(ctx)) is None:
            run = partitioned(rule(*ctx.avals_in, **params), local, shard)
            return lower_partitioned(ctx, run, operands, _contents(primitive, ctx, params))
        else:
            if params["options"].require_kernel:
                raise NotImplementedError(
                    f"implementation='kernel' on several devices: {why}. Use implementation=None to fall back to "
                    "plain JAX there, or call it inside jax.shard_map over all axes of the mesh."
                )
            run = plain
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

    mlir.register_lowering(primitive, lower)
    requires_devices(primitive)


@functools.cache
def _code() -> str:
    """Of the sources that partition the operations."""
    package = pathlib.Path(__file__).parents[1]
    sources = sorted([*package.glob("*.py"), *package.glob("_primitives/*.py")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _contents(primitive: Any, ctx: Any, params: dict[str, Any]) -> str:
    """What decides how an operation is partitioned: no two that differ may have the same."""
    context = ctx.module_context
    types = (*ctx.avals_in, "->", *ctx.avals_out)
    return "\n".join(
        [
            f"{primitive.name} of jax_rmsnorm {_code()}",
            " ".join(map(str, types)),
            repr(sorted(params.items())),
            f"{context.axis_context.abstract_mesh}, platforms {context.platforms}",
            f"kernels: {[(native.platform, native.reason) for native in (_ffi.CPU, _ffi.CUDA)]}",
            f"on GPUs here: {_ffi.why_not_on_local_gpus()}",
        ]
    )


def _kernel_call(
    name: str,
    abstract_eval: Callable[..., Sequence[Any]],
    reference: Callable[..., Sequence[jax.Array]],
    target: str,
    target_attributes: Callable[..., dict[str, Any]],
    scratch: Callable[..., Sequence[Any]] | None,
    fuses: Callable[..., bool] | None,
    unfused: Callable[..., Sequence[jax.Array]] | None,
    aliases: Callable[[Options], dict[int, int]] | None,
) -> Callable[..., Sequence[jax.Array]]:
    """The operation on one device: binds a primitive of its own, and leaves its scratch away."""
    primitive = Primitive(f"{name}_call")
    primitive.multiple_results = True

    def scratch_types(*operands: Any, **params: Any) -> Sequence[Any]:
        return () if scratch is None else scratch(*operands, **params)

    def abstract_eval_call(*operands: Any, **params: Any) -> list[Any]:
        return [*abstract_eval(*operands, **params), *scratch_types(*operands, **params)]

    def with_scratch(run: Callable[..., Sequence[jax.Array]]) -> Any:
        def run_all(*operands: jax.Array, **params: Any) -> list[jax.Array]:
            unused = scratch_types(*map(jax.typeof, operands), **params)
            return [*run(*operands, **params), *(jnp.zeros(t.shape, t.dtype) for t in unused)]

        return mlir.lower_fun(run_all, multiple_results=True)

    plain = with_scratch(reference)

    def lower_plain(ctx: Any, *operands: Any, **params: Any) -> Any:
        if params["options"].require_kernel:
            raise NotImplementedError(_no_kernel(ctx.module_context.platforms))
        return plain(ctx, *operands, **params)

    def lower_kernel(ctx: Any, *operands: Any, **params: Any) -> Any:
        attributes = target_attributes(*ctx.avals_in, **params)
        overwritten = {} if aliases is None else aliases(params["options"])
        lower = jax.ffi.ffi_lowering(target, operand_output_aliases=overwritten)
        return lower(ctx, *operands, **attributes)

    def lower_cuda(ctx: Any, *operands: Any, **params: Any) -> Any:
        if _ffi.why_not_on_local_gpus() is not None:
            return lower_plain(ctx, *operands, **params)
        if not (params["options"].require_kernel or kernel_pays_on_gpu(ctx.avals_in[0], **params)):
            return plain(ctx, *operands, **params)
        if fuses is None or unfused is None or fuses(*ctx.avals_in, **params):
            return lower_kernel(ctx, *operands, **params)
        return with_scratch(unfused)(ctx, *operands, **params)

    primitive.def_abstract_eval(abstract_eval_call)
    mlir.register_lowering(primitive, lower_plain)
    if _ffi.CPU.module is not None:
        mlir.register_lowering(primitive, lower_kernel, platform="cpu")
    if _ffi.CUDA.module is not None:
        mlir.register_lowering(primitive, lower_cuda, platform="cuda")

    def call(*operands: jax.Array, **params: Any) -> Sequence[jax.Array]:
        results = primitive.bind(*operands, **params)
        unused = scratch_types(*map(jax.typeof, operands), **params)
        return results[: len(results) - len(unused)]

    return call


def _require_whole_rows(options: Options, axes: Axes) -> None:
    """Raises if a kernel is asked for where each device has parts of rows."""
    if options.require_kernel:
        raise NotImplementedError(why_no_kernel_for_parts(axes.hidden))


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
