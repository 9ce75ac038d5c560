"""Primitive rms_norm_forward: x [*groups, *rows, H], gamma [*groups, H] or none -> y, and rrms if it is asked for.

The mathematics is `_reference.forward`. Groups are there so that a gamma batched by `jax.vmap` stays one kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._compat import apply_primitive, batching, result_type
from .._options import Options
from .common import attributes, batch_size, register_lowerings

forward_p = Primitive("rms_norm_forward")
forward_p.multiple_results = True


def forward(
    x: jax.Array, gamma: jax.Array | None, options: Options, *, save_rrms: bool
) -> list[jax.Array]:
    """Returns [y] or [y, rrms]: y [*groups, *rows, H] in ``options.out_dtype``, rrms [*groups, *rows] in float32.

    ``save_rrms`` is set where the call is being differentiated, which also decides whose SM margin applies.
    """
    operands = (x,) if gamma is None else (x, gamma)
    return forward_p.bind(*operands, options=options, save_rrms=save_rrms)


def _abstract_eval(x: Any, *gamma: Any, options: Options, save_rrms: bool) -> list[Any]:
    spec = tuple(x.sharding.spec)
    y = result_type(x, x.shape, options.out_dtype, spec)
    if not save_rrms:
        return [y]
    return [y, result_type(x, x.shape[:-1], jnp.dtype("float32"), spec[:-1])]


def _reference_rule(
    x: jax.Array, *gamma: jax.Array, options: Options, save_rrms: bool
) -> list[jax.Array]:
    y, rrms = _reference.forward(x, gamma[0] if gamma else None, options)
    return [y, rrms] if save_rrms else [y]


def _target_attributes(*, options: Options, save_rrms: bool) -> dict[str, Any]:
    margin = options.sm_margin.forward if save_rrms else options.sm_margin.inference
    return {"eps": np.float32(options.eps), **attributes(options, margin)}


def _batch(operands: Any, axes: Any, *, options: Options, save_rrms: bool) -> Any:
    size = batch_size(operands, axes)
    x = batching.bdim_at_front(operands[0], axes[0], size)
    gamma = None
    if len(operands) == 2:
        gamma, gamma_axis = operands[1], axes[1]
        # Without groups of its own, an unbatched gamma serves the whole batch: rows are rows.
        if gamma_axis is not None or gamma.ndim > 1:
            gamma = batching.bdim_at_front(gamma, gamma_axis, size)
    results = forward(x, gamma, options, save_rrms=save_rrms)
    return results, [0] * len(results)


forward_p.def_abstract_eval(_abstract_eval)
forward_p.def_impl(functools.partial(apply_primitive, forward_p))
batching.primitive_batchers[forward_p] = _batch
register_lowerings(forward_p, _reference_rule, _ffi.FORWARD, _target_attributes)
