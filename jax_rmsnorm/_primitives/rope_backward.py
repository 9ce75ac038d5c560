"""Primitive rms_norm_rope_backward: x, rrms, dy, cos, sin and gamma -> dx, and dgamma if there is a gamma.

Shapes as for rms_norm_rope_forward; dgamma has gamma's. The mathematics is `_reference.rope_backward`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._options import Options
from .._partitioning import HIDDEN, Rule
from .backward import backward
from .common import (
    backward_results,
    backward_scratch,
    backward_types,
    batch_in_front,
    forward_dims,
    present,
    read_by_kernel,
)
from .lowering import backward_attributes, register
from .rope_common import TABLE, batch_tables, fuses_rope, rope_attributes, table_dims

rope_backward_p = Primitive("rms_norm_rope_backward")
rope_backward_p.multiple_results = True


def rope_backward(
    x: jax.Array,
    gamma: jax.Array | None,
    rrms: jax.Array,
    dy: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx in x's dtype, and dgamma in gamma's dtype (None without gamma)."""
    (dy,) = read_by_kernel(x, dy)
    operands = x, rrms, dy, cos, sin, *read_by_kernel(x, gamma)
    return backward_results(rope_backward_p.bind(*operands, options=options), gamma)


def _abstract_eval(
    x: Any,
    rrms: Any,
    dy: Any,
    cos: Any,
    sin: Any,
    *gamma: Any,
    options: Options,
) -> list[Any]:
    return backward_types(x, *gamma)


def _reference_rule(
    x: jax.Array,
    rrms: jax.Array,
    dy: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *gamma: jax.Array,
    options: Options,
) -> list[jax.Array]:
    g = gamma[0] if gamma else None
    return present(*_reference.rope_backward(x, g, rrms, dy, cos, sin, options))


def _rule(x: Any, rrms: Any, dy: Any, cos: Any, sin: Any, *gamma: Any, options: Options) -> Rule:
    x_dims, rows, gamma_dims = forward_dims(x, *gamma)
    operands = [x_dims, rows, x_dims, *table_dims(rows, cos, sin), *gamma_dims]
    return Rule(operands, [x_dims, *gamma_dims], whole=frozenset({HIDDEN, TABLE}))


def _scratch(
    x: Any, rrms: Any, dy: Any, cos: Any, sin: Any, *gamma: Any, options: Options
) -> list[Any]:
    return backward_scratch(x, *gamma)


def _target_attributes(x: Any, *_: Any, options: Options) -> dict[str, Any]:
    return {**backward_attributes(options), **rope_attributes(x, options)}


def _fuses(x: Any, rrms: Any, dy: Any, cos: Any, *_: Any, options: Options) -> bool:
    return fuses_rope(x, cos, dy, options)


def _unfused(
    x: jax.Array,
    rrms: jax.Array,
    dy: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *gamma: jax.Array,
    options: Options,
) -> list[jax.Array]:
    dy = _reference.rotate(dy.astype(jnp.float32), cos, -sin, options)
    return present(*backward(x, gamma[0] if gamma else None, rrms, [dy], options))


def _batch(batch: Any, operands: Any, axes: Any, *, options: Options) -> Any:
    # Each example has a dgamma of its own, hence a gamma of its own: the batch becomes an axis of groups.
    x, rrms, dy = batch_in_front(batch, operands[:3], axes[:3])
    tables = batch_tables(batch, operands[3:5], axes[3:5], x)
    gamma = batch_in_front(batch, operands[5:], axes[5:])
    results = rope_backward_p.bind(x, rrms, dy, *tables, *gamma, options=options)
    return results, [0] * len(results)


register(
    rope_backward_p,
    abstract_eval=_abstract_eval,
    batch=_batch,
    reference=_reference_rule,
    rule=_rule,
    target=_ffi.ROPE_BACKWARD,
    target_attributes=_target_attributes,
    scratch=_scratch,
    fuses=_fuses,
    unfused=_unfused,
)
