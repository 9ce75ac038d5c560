"""Primitive rms_norm_backward: x, rrms, dy and gamma -> dx, and dgamma if there is a gamma.

Shapes as for rms_norm_forward; dgamma has gamma's. The mathematics is `_reference.backward`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._compat import apply_primitive, batching
from .._options import Options
from .common import backward_types, batch_in_front, batch_size, with_scratch, without_scratch
from .lowering import backward_attributes, register_lowerings

backward_p = Primitive("rms_norm_backward")
backward_p.multiple_results = True


def backward(
    x: jax.Array, gamma: jax.Array | None, rrms: jax.Array, dy: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx in x's dtype, and dgamma in gamma's dtype (None without gamma)."""
    operands = (x, rrms, dy) if gamma is None else (x, rrms, dy, gamma)
    return without_scratch(backward_p.bind(*operands, options=options))


def _abstract_eval(x: Any, rrms: Any, dy: Any, *gamma: Any, options: Options) -> list[Any]:
    return backward_types(x, *gamma)


def _reference_rule(
    x: jax.Array, rrms: jax.Array, dy: jax.Array, *gamma: jax.Array, options: Options
) -> list[jax.Array]:
    gradients = _reference.backward(x, gamma[0] if gamma else None, rrms, dy, options)
    return with_scratch(gradients, x, *gamma)


def _target_attributes(*_: Any, options: Options) -> dict[str, Any]:
    return backward_attributes(options)


def _batch(operands: Any, axes: Any, *, options: Options) -> Any:
    # Each example has a dgamma of its own, hence a gamma of its own: the batch becomes an axis of groups.
    batched = batch_in_front(operands, axes, batch_size(operands, axes))
    results = backward_p.bind(*batched, options=options)
    return results, [0] * len(results)


backward_p.def_abstract_eval(_abstract_eval)
backward_p.def_impl(functools.partial(apply_primitive, backward_p))
batching.primitive_batchers[backward_p] = _batch
register_lowerings(backward_p, _reference_rule, _ffi.BACKWARD, _target_attributes)
