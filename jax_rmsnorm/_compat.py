"""Every private JAX import and every branch on a version, each with its reason.

Supported: jax 0.10.2 and later. Nothing here is needed for the mathematics, only for types and rules.
"""

from __future__ import annotations

from typing import Any

import jax

# Runs a primitive outside `jax.jit` by compiling it, also under `jax.disable_jit`; nothing public does.
from jax._src.dispatch import apply_primitive as apply_primitive

# Rules of custom primitives. `jax.interpreters` exports these modules for such use, without type stubs' promises.
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir


def manual_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which ``x`` varies inside `jax.shard_map` (empty outside)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def align_manual_axes(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Marks every array as varying over each axis that any of them varies over.

    `jax.shard_map` refuses a custom_vjp whose operands vary over different axes: the cotangent of a replicated
    gamma would vary where gamma does not. The cast made here is differentiated by JAX, into the sum over those axes.
    """
    axes = frozenset[str]().union(*(manual_axes(a) for a in arrays if a is not None))

    def align(array: jax.Array | None) -> jax.Array | None:
        missing = () if array is None else tuple(sorted(axes - manual_axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return tuple(map(align, arrays))


def result_type(like: Any, shape: tuple[Any, ...], dtype: Any, spec: tuple[Any, ...]) -> Any:
    """An abstract value with the mesh and the varying axes of ``like``, and its own shape, dtype and partition spec.

    A plain ShapeDtypeStruct would lose them, and gradients downstream in `jax.shard_map` would silently be wrong.
    """
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return like.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)


def is_static_dim(dim: Any) -> bool:
    """Whether an axis length is a number, and not a symbol of shape-polymorphic export."""
    return isinstance(dim, int)
