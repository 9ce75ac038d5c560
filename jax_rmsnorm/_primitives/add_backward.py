"""Primitive rms_norm_add_backward: h, rrms, dy, dh and gamma -> dx, and dgamma if there is a gamma.

As rms_norm_backward at h, with dh, of h's shape and dtype, added to dx before that is rounded. The mathematics is
`_reference.add_backward`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._options import Options
from .backward import backward
from .common import backward_types, batch_as_groups, with_scratch, without_scratch
from .lowering import backward_attributes, register, rows_are_aligned

add_backward_p = Primitive("rms_norm_add_backward")
add_backward_p.multiple_results = True


def add_backward(
    h: jax.Array,
    gamma: jax.Array | None,
    rrms: jax.Array,
    dy: jax.Array,
    dh: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx in h's dtype, and dgamma in gamma's dtype (None without gamma)."""
    operands = (h, rrms, dy, dh) if gamma is None else (h, rrms, dy, dh, gamma)
    return without_scratch(add_backward_p.bind(*operands, options=options))


def _abstract_eval(h: Any, rrms: Any, dy: Any, dh: Any, *gamma: Any, options: Options) -> list[Any]:
    return backward_types(h, *gamma)


def _reference_rule(
    h: jax.Array,
    rrms: jax.Array,
    dy: jax.Array,
    dh: jax.Array,
    *gamma: jax.Array,
    options: Options,
) -> list[jax.Array]:
    gradients = _reference.add_backward(h, gamma[0] if gamma else None, rrms, dy, dh, options)
    return with_scratch(gradients, h, *gamma)


def _target_attributes(*_: Any, options: Options) -> dict[str, Any]:
    return backward_attributes(options)


def _fuses(h: Any, rrms: Any, dy: Any, *_: Any, options: Options) -> bool:
    return rows_are_aligned(h.shape[-1], h.dtype, dy.dtype)


def _unfused(
    h: jax.Array,
    rrms: jax.Array,
    dy: jax.Array,
    dh: jax.Array,
    *gamma: jax.Array,
    options: Options,
) -> list[jax.Array]:
    g = gamma[0] if gamma else None
    # In float32 on its way to the sum, so that dx is rounded once.
    wide = dataclasses.replace(options, rounding="once")
    dx, dgamma = backward(h.astype(jnp.float32), g, rrms, dy, wide)
    if options.rounding == "before_gamma" and g is not None:
        _, dgamma = backward(h, g, rrms, dy, options)  # of the value rounded to h's own dtype
    return with_scratch(((dx + dh.astype(jnp.float32)).astype(h.dtype), dgamma), h, *gamma)


register(
    add_backward_p,
    abstract_eval=_abstract_eval,
    batch=functools.partial(batch_as_groups, add_backward_p),
    reference=_reference_rule,
    target=_ffi.ADD_BACKWARD,
    target_attributes=_target_attributes,
    fuses=_fuses,
    unfused=_unfused,
)
