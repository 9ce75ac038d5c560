"""Primitive rms_norm_backward: x, rrms, dy of each copy of y and gamma -> dx, and dgamma if there is a gamma.

Shapes as for rms_norm_forward; dgamma has gamma's. The mathematics is `_reference.backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._options import Options
from .._partitioning import Rule
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

backward_p = Primitive("rms_norm_backward")
backward_p.multiple_results = True


def backward(
    x: jax.Array,
    gamma: jax.Array | None,
    rrms: jax.Array,
    dys: Sequence[jax.Array],
    options: Options,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx in x's dtype, and dgamma in gamma's dtype (None without gamma). All dys are of one dtype."""
    operands = x, rrms, *read_by_kernel(x, *dys, gamma)
    results = backward_p.bind(*operands, options=options, gradients=len(dys))
    return backward_results(results, gamma)


def _abstract_eval(x: Any, rrms: Any, *rest: Any, options: Options, gradients: int) -> list[Any]:
    return backward_types(x, *rest[gradients:])


def _reference_rule(
    x: jax.Array,
    rrms: jax.Array,
    *rest: jax.Array,
    options: Options,
    gradients: int,
    shards: Sequence[str] = (),
) -> list[jax.Array]:
    dys, gamma = split_gradients(rest, gradients)
    return present(*_reference.backward(x, gamma, rrms, dys, options, shards=shards))


def _rule(x: Any, rrms: Any, *rest: Any, options: Options, gradients: int) -> Rule:
    x_dims, rows, gamma_dims = forward_dims(x, *rest[gradients:])
    return Rule([x_dims, rows, *[x_dims] * gradients, *gamma_dims], [x_dims, *gamma_dims])


def _scratch(x: Any, rrms: Any, *rest: Any, options: Options, gradients: int) -> list[Any]:
    return backward_scratch(x, *rest[gradients:])


def _target_attributes(*_: Any, options: Options, gradients: int) -> dict[str, Any]:
    return {**backward_attributes(options), **gradients_attributes(gradients)}


def _fuses(x: Any, rrms: Any, dy: Any, *_: Any, options: Options, gradients: int) -> bool:
    return gradients == 1 or rows_are_aligned(x.shape[-1], x.dtype, dy.dtype)


def _unfused(
    x: jax.Array, rrms: jax.Array, *rest: jax.Array, options: Options, gradients: int
) -> list[jax.Array]:
    dys, gamma = split_gradients(rest, gradients)
    return present(*backward(x, gamma, rrms, [add_up_unrounded(dys)], options))


register(
    backward_p,
    abstract_eval=_abstract_eval,
    batch=functools.partial(batch_as_groups, backward_p),
    reference=_reference_rule,
    rule=_rule,
    target=_ffi.BACKWARD,
    target_attributes=_target_attributes,
    scratch=_scratch,
    fuses=_fuses,
    unfused=_unfused,
    first_gradient=2,
)
