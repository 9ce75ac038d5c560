"""Primitive rms_norm_rope_forward: x, cos, sin and gamma -> y, and rrms if it is asked for.

Shapes as for rms_norm_forward with x [..., N, D]; cos and sin are [*P, R/2], P the last of the axes in front of N.
What x has in front of P shares them, and so do the N heads. The mathematics is `_reference.rope_forward`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._options import Options
from .._partitioning import HIDDEN, Rule
from .common import (
    batch_gamma,
    batch_in_front,
    forward_dims,
    forward_types,
    read_by_kernel,
    written_by_kernel,
)
from .forward import forward
from .lowering import forward_attributes, register
from .rope_common import TABLE, batch_tables, fuses_rope, rope_attributes, table_dims

rope_forward_p = Primitive("rms_norm_rope_forward")
rope_forward_p.multiple_results = True


def rope_forward(
    x: jax.Array,
    gamma: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    options: Options,
    *,
    save_rrms: bool,
) -> list[jax.Array]:
    """Returns [y] or [y, rrms], as `forward` does."""
    operands = x, cos, sin, *read_by_kernel(x, gamma)
    written = written_by_kernel(x, options)
    y, *rrms = rope_forward_p.bind(*operands, options=written, save_rrms=save_rrms)
    return [y.astype(options.out_dtype), *rrms]


def _abstract_eval(
    x: Any, cos: Any, sin: Any, *gamma: Any, options: Options, save_rrms: bool
) -> list[Any]:
    y, rrms = forward_types(x, options, save_rrms=save_rrms)
    return [y, *rrms]


def _reference_rule(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *gamma: jax.Array,
    options: Options,
    save_rrms: bool,
) -> list[jax.Array]:
    g = gamma[0] if gamma else None
    y, rrms = _reference.rope_forward(x, g, cos, sin, options)
    return [y, rrms] if save_rrms else [y]


def _rule(x: Any, cos: Any, sin: Any, *gamma: Any, options: Options, save_rrms: bool) -> Rule:
    x_dims, rows, gamma_dims = forward_dims(x, *gamma)
    tables = table_dims(rows, cos, sin)
    results = [x_dims, rows] if save_rrms else [x_dims]
    return Rule([x_dims, *tables, *gamma_dims], results, whole=frozenset({HIDDEN, TABLE}))


def _target_attributes(x: Any, *_: Any, options: Options, save_rrms: bool) -> dict[str, Any]:
    return {
        **forward_attributes(options, save_rrms=save_rrms),
        **rope_attributes(x, options),
    }


def _fuses(x: Any, cos: Any, *_: Any, options: Options, save_rrms: bool) -> bool:
    return fuses_rope(x, cos, None, options)


def _unfused(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *gamma: jax.Array,
    options: Options,
    save_rrms: bool,
) -> list[jax.Array]:
    wide = dataclasses.replace(options, out_dtype=jnp.dtype(jnp.float32))
    y, *rrms = forward(x, gamma[0] if gamma else None, wide, save_rrms=save_rrms)
    y = _reference.rotate(y, cos, sin, options)
    return [y.astype(options.out_dtype), *rrms]


def _batch(batch: Any, operands: Any, axes: Any, *, options: Options, save_rrms: bool) -> Any:
    x = batch_in_front(batch, operands[:1], axes[:1])
    tables = batch_tables(batch, operands[1:3], axes[1:3], x[0])
    gamma = batch_gamma(batch, operands[3:], axes[3:])
    results = rope_forward_p.bind(*x, *tables, *gamma, options=options, save_rrms=save_rrms)
    return results, [0] * len(results)


register(
    rope_forward_p,
    abstract_eval=_abstract_eval,
    batch=_batch,
    reference=_reference_rule,
    rule=_rule,
    target=_ffi.ROPE_FORWARD,
    target_attributes=_target_attributes,
    fuses=_fuses,
    unfused=_unfused,
)
