"""Primitive rms_norm_backward: x, rrms, dy and gamma -> dx, and dgamma if there is a gamma.

Shapes as for rms_norm_forward; dgamma has gamma's. The mathematics is `_reference.backward`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._compat import apply_primitive, batching, is_static_dim, result_type
from .._options import Options
from .common import attributes, batch_size, register_lowerings

backward_p = Primitive("rms_norm_backward")
backward_p.multiple_results = True

_MOST_PARTIAL_ROWS = 2048
_LEAST_PARTIAL_ROWS = 64
_PARTIAL_ELEMENTS = 2**22


def _scratch_shape(x_shape: tuple[Any, ...], gamma_shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """[*groups, partial rows, H] of float32 for dgamma, from the shape alone, so that tracing needs no device.

    Partial rows bound the number of blocks that share a group's rows. They come to 16 MiB for any H from 2,048 to
    65,536, and less below, or to one row a group where there are many groups.
    """
    groups, hidden = gamma_shape[:-1], gamma_shape[-1]
    rows = x_shape[len(groups) : -1]
    bound = _LEAST_PARTIAL_ROWS
    if is_static_dim(hidden):
        bound = min(max(_PARTIAL_ELEMENTS // hidden, _LEAST_PARTIAL_ROWS), _MOST_PARTIAL_ROWS)
    if all(map(is_static_dim, groups)):
        bound = -(-bound // max(1, math.prod(groups)))
    if all(map(is_static_dim, rows)):
        bound = max(1, min(bound, math.prod(rows)))
    return (*groups, bound, hidden)


def backward(
    x: jax.Array, gamma: jax.Array | None, rrms: jax.Array, dy: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx in x's dtype, and dgamma in gamma's dtype (None without gamma)."""
    if gamma is None:
        (dx,) = backward_p.bind(x, rrms, dy, options=options)
        return dx, None
    dx, dgamma, _ = backward_p.bind(x, rrms, dy, gamma, options=options)
    return dx, dgamma


def _abstract_eval(x: Any, rrms: Any, dy: Any, *gamma: Any, options: Options) -> list[Any]:
    dx = result_type(x, x.shape, x.dtype, tuple(x.sharding.spec))
    if not gamma:
        return [dx]
    (g,) = gamma
    # Groups are x's own first axes, and sharded as they are there; gamma may have been broadcast to them.
    spec = (*x.sharding.spec[: g.ndim - 1], g.sharding.spec[-1])
    dgamma = result_type(x, g.shape, g.dtype, spec)
    scratch_shape = _scratch_shape(x.shape, g.shape)
    scratch = result_type(x, scratch_shape, jnp.dtype("float32"), (*spec[:-1], None, spec[-1]))
    return [dx, dgamma, scratch]


def _reference_rule(
    x: jax.Array, rrms: jax.Array, dy: jax.Array, *gamma: jax.Array, options: Options
) -> list[Any]:
    if not gamma:
        return [_reference.backward(x, None, rrms, dy, options)[0]]
    dx, dgamma = _reference.backward(x, gamma[0], rrms, dy, options)
    return [dx, dgamma, jnp.zeros(_scratch_shape(x.shape, gamma[0].shape), jnp.float32)]


def _target_attributes(*, options: Options) -> dict[str, Any]:
    return attributes(options, options.sm_margin.backward)


def _batch(operands: Any, axes: Any, *, options: Options) -> Any:
    # Each example has a dgamma of its own, hence a gamma of its own: the batch becomes an axis of groups.
    size = batch_size(operands, axes)
    batched = [
        batching.bdim_at_front(x, axis, size) for x, axis in zip(operands, axes, strict=True)
    ]
    results = backward_p.bind(*batched, options=options)
    return results, [0] * len(results)


backward_p.def_abstract_eval(_abstract_eval)
backward_p.def_impl(functools.partial(apply_primitive, backward_p))
batching.primitive_batchers[backward_p] = _batch
register_lowerings(backward_p, _reference_rule, _ffi.BACKWARD, _target_attributes)
