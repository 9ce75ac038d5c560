"""What the primitives share: dtypes, types of results, batching of operands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._compat import batching, is_static_dim, result_type
from .._options import Options
from .._partitioning import GAMMA, HIDDEN, Axes, Dims, row_dims

KERNEL_DTYPES = frozenset(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))

_MOST_PARTIAL_ROWS = 2048
_GPU_PARTIAL_ROWS = 256  # no GPU has more SMs, and no persistent kernel more blocks
_LEAST_PARTIAL_ROWS = 64
_PARTIAL_ELEMENTS = 2**22
_SMALL_PARTIAL_ELEMENTS = 2**18
_MOST_SHIFTS = 8  # of rows against multiples of 16 bytes: there are as many elements of two


def _are_two_halves(a: np.dtype, b: np.dtype) -> bool:
    return a != b and a.itemsize == b.itemsize == 2


def written_by_kernel(x: jax.Array, options: Options) -> Options:
    """The options with a dtype of y that a kernel writes beside x's: bfloat16 and float16 do not meet in one.

    A y in x's other half is float32 first, and cast.
    """
    if _are_two_halves(x.dtype, options.out_dtype):
        return dataclasses.replace(options, out_dtype=jnp.dtype(jnp.float32))
    return options


def read_by_kernel(x: jax.Array, *operands: jax.Array | None) -> list[jax.Array]:
    """The operands that there are, in dtypes that a kernel reads beside x's: float32 in place of the other half."""
    return [
        operand.astype(jnp.float32) if _are_two_halves(x.dtype, operand.dtype) else operand
        for operand in operands
        if operand is not None
    ]


def forward_types(x: Any, options: Options, *, save_rrms: bool) -> tuple[Any, list[Any]]:
    """The types of y, and of rrms in a list that is empty where it is not saved."""
    spec = tuple(x.sharding.spec)
    y = result_type(x, x.shape, options.out_dtype, spec)
    rrms = [result_type(x, x.shape[:-1], jnp.dtype("float32"), spec[:-1])] if save_rrms else []
    return y, rrms


def backward_types(x: Any, *gamma: Any) -> list[Any]:
    """The types of dx, and with a gamma of dgamma."""
    dx = result_type(x, x.shape, x.dtype, tuple(x.sharding.spec))
    if not gamma:
        return [dx]
    (g,) = gamma
    return [dx, result_type(x, g.shape, g.dtype, _dgamma_spec(x, g))]


def backward_scratch(x: Any, *gamma: Any) -> list[Any]:
    """The type of the kernels' scratch for dgamma, if there is a gamma."""
    if not gamma:
        return []
    (g,) = gamma
    *groups, hidden = _dgamma_spec(x, g)
    shape = _scratch_shape(x.shape, g.shape)
    return [result_type(x, shape, jnp.dtype("float32"), (*groups, None, hidden))]


def _dgamma_spec(x: Any, gamma: Any) -> tuple[Any, ...]:
    # Groups are x's own first axes, and sharded as they are there; gamma may have been broadcast to them.
    return (*x.sharding.spec[: gamma.ndim - 1], gamma.sharding.spec[-1])


def backward_results(
    results: Sequence[jax.Array], gamma: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """dx, and dgamma in gamma's dtype or None, from the results of a primitive."""
    return results[0], None if gamma is None else results[1].astype(gamma.dtype)


def present(*arrays: jax.Array | None) -> list[jax.Array]:
    """The arrays that there are: a primitive has no results that are None."""
    return [array for array in arrays if array is not None]


def forward_dims(x: Any, *gamma: Any) -> tuple[Dims, Dims, list[Dims]]:
    """The dimensions, by name, of x, of a row's numbers such as rrms, and of gamma in a list, empty without one."""
    rows = row_dims(x.ndim)
    return (*rows, HIDDEN), rows, [(*rows[: g.ndim - 1], GAMMA) for g in gamma]


def sum_dgamma(
    backward: Callable[..., Sequence[jax.Array]], axes: Axes, *operands: jax.Array, has_gamma: bool
) -> list[jax.Array]:
    """The backward of a device's shards: dx, and if there is a gamma dgamma, summed over all that have rows of it.

    Args:
        backward: from operands to dx and dgamma of these shards.
        axes: what they are sharded over.
        operands: x first, and gamma last if there is one.
        has_gamma: whether there is.
    """
    if not has_gamma:
        return list(backward(*operands))
    x, *_, gamma = operands
    # In float32, and rounded once: dgamma has gamma's dtype.
    dx, dgamma = backward(*operands[:-1], gamma.astype(jnp.float32))
    groups = row_dims(x.ndim)[: gamma.ndim - 1]
    if over := axes.of_rows_without(groups):
        dgamma = lax.psum(dgamma, over)
    return [dx, dgamma.astype(gamma.dtype)]


def _scratch_shape(x_shape: tuple[Any, ...], gamma_shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """[*groups, partial rows, H] of float32 for dgamma, from the shape alone, so that tracing needs no device.

    Partial rows bound the number of blocks, or of a CPU's tasks, that share a group's rows. They come to 16 MiB for
    any H from 16,384 to 65,536, and less below: to as many as a GPU may need, or to 1 MiB for the CPU's sums of short
    rows. Where there are many groups, to one row a group; where not every row begins at a multiple of 16 bytes, to one
    for each distance from there.
    """
    groups, hidden = gamma_shape[:-1], gamma_shape[-1]
    rows = x_shape[len(groups) : -1]
    bound = _LEAST_PARTIAL_ROWS
    if is_static_dim(hidden):
        most = min(max(_SMALL_PARTIAL_ELEMENTS // hidden, _GPU_PARTIAL_ROWS), _MOST_PARTIAL_ROWS)
        bound = min(max(_PARTIAL_ELEMENTS // hidden, _LEAST_PARTIAL_ROWS), most)
    if all(map(is_static_dim, groups)):
        bound = -(-bound // max(1, math.prod(groups)))
    if not is_static_dim(hidden) or hidden % _MOST_SHIFTS:
        bound = max(bound, _MOST_SHIFTS)
    if all(map(is_static_dim, rows)):
        bound = max(1, min(bound, math.prod(rows)))
    return (*groups, bound, hidden)


def batch_in_front(batch: Any, operands: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
    """The operands with the batch axis, of which JAX says more in ``batch``, as their first one.

    Those without it are repeated, and sharded along it as the others are.
    """
    return [
        batching.bdim_at_front(x, axis, batch.size, batch.explicit_mesh_axis)
        for x, axis in zip(operands, axes, strict=True)
    ]


def batch_as_groups(primitive: Any, batch: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """The batching rule of a backward: each example has a dgamma of its own, and so a gamma of its own.

    The batch becomes an axis of groups.
    """
    batched = batch_in_front(batch, operands, axes)
    results = primitive.bind(*batched, **params)
    return results, [0] * len(results)


def batch_gamma(batch: Any, gamma: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
    """As `batch_in_front`, for a gamma (or none) that only a forward takes.

    Without groups of its own, an unbatched gamma serves the whole batch: rows are rows.
    """
    shared = all(axis is None and g.ndim == 1 for g, axis in zip(gamma, axes, strict=True))
    return list(gamma) if shared else batch_in_front(batch, gamma, axes)
