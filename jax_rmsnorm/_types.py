"""Operands of one operation in types that go together.

A type may say more of an array than shape and dtype: how it is sharded, over mesh axes of type Explicit, and inside
`jax.shard_map` over which axes it varies. `jax.numpy` finds what its operands have in common, operation by operation; a
primitive and a `jax.custom_vjp` want it so from the start. What is done here is differentiated by JAX, so that each
gradient comes back in its own operand's type.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ._compat import axis_names, manual_axes

Operands = tuple[Any, ...]


def align(x: jax.Array, gamma: jax.Array | None, *tables: jax.Array) -> Operands:
    """x [..., H] as it is, and beside it gamma [H] and tables [*P, R/2], of the last of x's axes but two.

    The one is sharded as x's last axis, the others as those axes.
    """
    *rows, hidden = _spec(x)
    aligned = [
        _reshard(table, x, *rows[len(rows) - table.ndim : len(rows) - 1], None) for table in tables
    ]
    return _align_manual_axes(x, _reshard(gamma, x, hidden), *aligned)


def align_sum(x: jax.Array, addend: jax.Array, gamma: jax.Array | None) -> Operands:
    """x, addend and gamma: the first two sharded as their sum is."""
    if _spec(x) != _spec(addend):
        total = jax.eval_shape(lambda a, b: jax.lax.add(a, b.astype(a.dtype)), x, addend)
        spec = tuple(total.sharding.spec)
        x, addend = _reshard(x, total, *spec), _reshard(addend, total, *spec)
    return _align_manual_axes(x, addend, _reshard(gamma, x, _spec(x)[-1]))


def hidden_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes of several devices that the type says x's last axis is sharded over."""
    sizes = jax.typeof(x).sharding.mesh.shape
    return tuple(name for name in axis_names(_spec(x)[-1]) if sizes[name] > 1)


def _spec(x: Any) -> tuple[Any, ...]:
    """What the type says, for each axis; None where axes of the mesh are Auto or there is none."""
    return tuple(jax.typeof(x).sharding.spec)


def _reshard(array: Any, like: Any, *spec: Any) -> Any:
    """The array in this sharding, on the mesh that ``like`` has in its type."""
    if array is None or _spec(array) == spec:
        return array
    sharding = NamedSharding(jax.typeof(like).sharding.mesh, PartitionSpec(*spec))
    return jax.sharding.reshard(array, sharding)


def _align_manual_axes(*arrays: jax.Array | None) -> Operands:
    """Marks every array as varying over each axis that any of them varies over.

    `jax.shard_map` refuses a custom_vjp whose operands vary over different axes: the cotangent of a replicated gamma
    would vary where gamma does not. The gradient of the cast made here is the sum over those axes.
    """
    axes = frozenset[str]().union(*(manual_axes(a) for a in arrays if a is not None))

    def align_one(array: Any) -> Any:
        missing = () if array is None else tuple(sorted(axes - manual_axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return tuple(map(align_one, arrays))
