"""Primitive rms_norm_add_forward: x, addend and gamma -> y, h, and rrms if it is asked for.

Shapes as for rms_norm_forward; addend and h have x's, and h = x + addend its dtype. The mathematics is
`_reference.add_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from .. import _ffi, _reference
from .._compat import result_type
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
from .forward import forward
from .lowering import forward_attributes, register, rows_are_aligned

add_forward_p = Primitive("rms_norm_add_forward")
add_forward_p.multiple_results = True


def add_forward(
    x: jax.Array, addend: jax.Array, gamma: jax.Array | None, options: Options, *, save_rrms: bool
) -> list[jax.Array]:
    """Returns [y, h] or [y, h, rrms], and otherwise as `forward` of h."""
    operands = x, *read_by_kernel(x, addend, gamma)
    written = written_by_kernel(x, options)
    y, *others = add_forward_p.bind(*operands, options=written, save_rrms=save_rrms)
    return [y.astype(options.out_dtype), *others]


def _abstract_eval(
    x: Any, addend: Any, *gamma: Any, options: Options, save_rrms: bool
) -> list[Any]:
    y, rrms = forward_types(x, options, save_rrms=save_rrms)
    h = result_type(x, x.shape, x.dtype, tuple(x.sharding.spec))
    return [y, h, *rrms]


def _reference_rule(
    x: jax.Array,
    addend: jax.Array,
    *gamma: jax.Array,
    options: Options,
    save_rrms: bool,
    shards: Sequence[str] = (),
) -> list[jax.Array]:
    g = gamma[0] if gamma else None
    y, _, rrms = _reference.add_forward(x, addend, g, options, shards=shards)
    h = _reference.plain_sum(x, addend).astype(x.dtype)  # the same bits, and maybe a product's own
    return [y, h, rrms] if save_rrms else [y, h]


def _rule(x: Any, addend: Any, *gamma: Any, options: Options, save_rrms: bool) -> Rule:
    x_dims, rows, gamma_dims = forward_dims(x, *gamma)
    return Rule([x_dims, x_dims, *gamma_dims], [x_dims, x_dims, *([rows] if save_rrms else [])])


def _target_attributes(*_: Any, options: Options, save_rrms: bool) -> dict[str, Any]:
    return forward_attributes(options, save_rrms=save_rrms)


def _aliases(options: Options) -> dict[int, int]:
    """Of x, which is `add_rms_norm`'s residual, or the addend, which is its x, with h."""
    return {} if options.overwrite is None else {("residual", "x").index(options.overwrite): 1}


def _fuses(x: Any, addend: Any, *_: Any, options: Options, save_rrms: bool) -> bool:
    return rows_are_aligned(x.shape[-1], x.dtype, addend.dtype, options.out_dtype)


def _unfused(
    x: jax.Array, addend: jax.Array, *gamma: jax.Array, options: Options, save_rrms: bool
) -> list[jax.Array]:
    h = _reference.add(x, addend).astype(x.dtype)
    y, *rrms = forward(h, gamma[0] if gamma else None, options, save_rrms=save_rrms)
    return [y, h, *rrms]


def _batch(batch: Any, operands: Any, axes: Any, *, options: Options, save_rrms: bool) -> Any:
    summands = batch_in_front(batch, operands[:2], axes[:2])
    gamma = batch_gamma(batch, operands[2:], axes[2:])
    results = add_forward_p.bind(*summands, *gamma, options=options, save_rrms=save_rrms)
    return results, [0] * len(results)


register(
    add_forward_p,
    abstract_eval=_abstract_eval,
    batch=_batch,
    reference=_reference_rule,
    rule=_rule,
    target=_ffi.ADD_FORWARD,
    target_attributes=_target_attributes,
    fuses=_fuses,
    unfused=_unfused,
    aliases=_aliases,
)
