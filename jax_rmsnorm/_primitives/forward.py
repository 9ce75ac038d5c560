"""Primitive rms_norm_forward: x [*groups, *rows, H], gamma [*groups, H] or none -> y, and rrms if it is asked for.

The mathematics is `_reference.forward`. Groups are there so that a gamma batched by `jax.vmap` stays one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._options import Options
from .._partitioning import Rule
from .common import (
    batch_gamma,
    batch_in_front,
    forward_dims,
    forward_types,
    read_by_kernel,
    written_by_kernel,
)
from .lowering import forward_attributes, register

forward_p = Primitive("rms_norm_forward")
forward_p.multiple_results = True


def forward(
    x: jax.Array, gamma: jax.Array | None, options: Options, *, save_rrms: bool
) -> list[jax.Array]:
    """Returns [y] or [y, rrms]: y [*groups, *rows, H] in ``options.out_dtype``, rrms [*groups, *rows] in float32.

    ``save_rrms`` is set where the call is being differentiated, which also decides whose SM margin applies.
    """
    operands = x, *read_by_kernel(x, gamma)
    written = written_by_kernel(x, options)
    y, *rrms = forward_p.bind(*operands, options=written, save_rrms=save_rrms)
    return [y.astype(options.out_dtype), *rrms]


def _abstract_eval(x: Any, *gamma: Any, options: Options, save_rrms: bool) -> list[Any]:
    y, rrms = forward_types(x, options, save_rrms=save_rrms)
    return [y, *rrms]


def _reference_rule(
    x: jax.Array,
    *gamma: jax.Array,
    options: Options,
    save_rrms: bool,
    shards: Sequence[str] = (),
) -> list[jax.Array]:
    y, rrms = _reference.forward(x, gamma[0] if gamma else None, options, shards=shards)
    return [y, rrms] if save_rrms else [y]


def _rule(x: Any, *gamma: Any, options: Options, save_rrms: bool) -> Rule:
    x_dims, rows, gamma_dims = forward_dims(x, *gamma)
    return Rule([x_dims, *gamma_dims], [x_dims, rows] if save_rrms else [x_dims])


def _target_attributes(*_: Any, options: Options, save_rrms: bool) -> dict[str, Any]:
    return forward_attributes(options, save_rrms=save_rrms)


def _batch(batch: Any, operands: Any, axes: Any, *, options: Options, save_rrms: bool) -> Any:
    x = batch_in_front(batch, operands[:1], axes[:1])
    gamma = batch_gamma(batch, operands[1:], axes[1:])
    results = forward_p.bind(*x, *gamma, options=options, save_rrms=save_rrms)
    return results, [0] * len(results)


register(
    forward_p,
    abstract_eval=_abstract_eval,
    batch=_batch,
    reference=_reference_rule,
    rule=_rule,
    target=_ffi.FORWARD,
    target_attributes=_target_attributes,
)
