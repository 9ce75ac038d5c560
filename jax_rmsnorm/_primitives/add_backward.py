"""Primitive rms_norm_add_backward: h, rrms, dh, dy of each copy of y and gamma -> dx, and dgamma if there is a gamma.

As rms_norm_backward at h, with dh, of h's shape and dtype, added to dx before that is rounded. The mathematics is
`_reference.add_backward`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._options import Options
from .._partitioning import Rule
from .backward import backward
from .common import (
    backward_results,
    backward_scratch,
    backward_types,
    batch_as_groups,
    forward_dims,
    present,
    read_by_kernel,
)
from .gradients import add_up_unrounded, gradients_attributes, split_gradients
from .lowering import backward_attributes, register, rows_are_aligned

add_backward_p = Primitive("rms_norm_add_backward")
add_backward_p.multiple_results = True


def add_backward(
    h: jax.Array,
    gamma: jax.Array | None,
    rrms: jax.Array,
    dys: Sequence[jax.Array],
    dh: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx in h's dtype, and dgamma in gamma's dtype (None without gamma). All dys are of one dtype."""
    operands = h, rrms, dh, *read_by_kernel(h, *dys, gamma)
    results = add_backward_p.bind(*operands, options=options, gradients=len(dys))
    return backward_results(results, gamma)


def _abstract_eval(
    h: Any, rrms: Any, dh: Any, *rest: Any, options: Options, gradients: int
) -> list[Any]:
    return backward_types(h, *rest[gradients:])


def _reference_rule(
    h: jax.Array,
    rrms: jax.Array,
    dh: jax.Array,
    *rest: jax.Array,
    options: Options,
    gradients: int,
    shards: Sequence[str] = (),
) -> list[jax.Array]:
    dys, gamma = split_gradients(rest, gradients)
    return present(*_reference.add_backward(h, gamma, rrms, dys, dh, options, shards))


def _rule(h: Any, rrms: Any, dh: Any, *rest: Any, options: Options, gradients: int) -> Rule:
    h_dims, rows, gamma_dims = forward_dims(h, *rest[gradients:])
    gradients_dims = [h_dims] * (1 + gradients)
    return Rule([h_dims, rows, *gradients_dims, *gamma_dims], [h_dims, *gamma_dims])


def _scratch(h: Any, rrms: Any, dh: Any, *rest: Any, options: Options, gradients: int) -> list[Any]:
    return backward_scratch(h, *rest[gradients:])


def _target_attributes(*_: Any, options: Options, gradients: int) -> dict[str, Any]:
    return {**backward_attributes(options), **gradients_attributes(gradients)}


def _fuses(h: Any, rrms: Any, dh: Any, dy: Any, *_: Any, options: Options, gradients: int) -> bool:
    return rows_are_aligned(h.shape[-1], h.dtype, dy.dtype)


def _unfused(
    h: jax.Array,
    rrms: jax.Array,
    dh: jax.Array,
    *rest: jax.Array,
    options: Options,
    gradients: int,
) -> list[jax.Array]:
    dys, gamma = split_gradients(rest, gradients)
    dys = [add_up_unrounded(dys)]
    # In float32 on its way to the sum, so that dx is rounded once.
    wide = dataclasses.replace(options, rounding="once")
    dx, dgamma = backward(h.astype(jnp.float32), gamma, rrms, dys, wide)
    if options.rounding == "before_gamma" and gamma is not None:
        _, dgamma = backward(h, gamma, rrms, dys, options)  # of the value rounded to h's own dtype
    dx = (dx + dh.astype(jnp.float32)).astype(h.dtype)
    return present(dx, dgamma)


register(
    add_backward_p,
    abstract_eval=_abstract_eval,
    batch=functools.partial(batch_as_groups, add_backward_p),
    reference=_reference_rule,
    rule=_rule,
    target=_ffi.ADD_BACKWARD,
    target_attributes=_target_attributes,
    scratch=_scratch,
    fuses=_fuses,
    unfused=_unfused,
    first_gradient=3,
)
