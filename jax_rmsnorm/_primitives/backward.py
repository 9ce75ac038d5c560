"""Primitive rms_norm_backward: x, rrms, dy and gamma -> dx, and dgamma if there is a gamma.

Shapes as for rms_norm_forward; dgamma has gamma's. The mathematics is `_reference.backward`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._options import Options
from .common import backward_types, batch_as_groups, with_scratch, without_scratch
from .lowering import backward_attributes, register

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


register(
    backward_p,
    abstract_eval=_abstract_eval,
    batch=functools.partial(batch_as_groups, backward_p),
    reference=_reference_rule,
    target=_ffi.BACKWARD,
    target_attributes=_target_attributes,
)
