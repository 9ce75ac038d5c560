"""What the two rotary primitives share: the tables of cosines and sines, and what the kernels ask of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _ffi
from .._compat import is_static_dim
from .._options import Options
from .._partitioning import Dims
from .common import batch_in_front

_MOST_ROWS = 2**31  # rows, heads counted, that the CUDA kernels do not count to


TABLE = "t"
"""The last dimension of cos and sin, by name."""


def table_dims(rows: Dims, *tables: Any) -> list[Dims]:
    """The dimensions of cos and sin, by name: x's last ones in front of the heads', and `TABLE`."""
    return [(*rows[len(rows) - table.ndim : -1], TABLE) for table in tables]


def rope_attributes(x: Any, options: Options) -> dict[str, Any]:
    heads = max(1, x.shape[-2])  # of no heads there are no rows
    return {"heads": np.int64(heads), "interleaved": np.bool_(options.interleaved)}


def fuses_rope(x: Any, cos: Any, dy: Any | None, options: Options) -> bool:
    """Whether the CUDA kernels rotate such rows themselves; ``dy`` is given for the backward."""
    hidden, half = x.shape[-1], cos.shape[-1]
    if _ffi.CUDA.module is None or not (is_static_dim(hidden) and is_static_dim(half)):
        return False
    rows = x.shape[:-1]
    if all(map(is_static_dim, rows)) and math.prod(rows) >= _MOST_ROWS:
        return False
    return _ffi.CUDA.module.fuses_rope(
        hidden=hidden,
        width=2 * half,
        interleaved=options.interleaved,
        x=x.dtype.name,
        dy=None if dy is None else dy.dtype.name,
    )


def batch_tables(
    batch: Any, tables: Sequence[jax.Array], axes: Sequence[int | None], x: jax.Array
) -> list[jax.Array]:
    """cos and sin for ``x`` [batch, *rows, N, D], which has its batch axis in front.

    Those of no batch serve every example. Of a batch, each example needs all its axes: those of x up to N.
    """
    if all(axis is None for axis in axes):
        return list(tables)
    positions = x.shape[:-2]

    def expand(table: jax.Array) -> jax.Array:
        missing = len(positions) + 1 - table.ndim
        table = jnp.expand_dims(table, range(1, 1 + missing))
        return jnp.broadcast_to(table, (*positions, table.shape[-1]))

    return [expand(table) for table in batch_in_front(batch, tables, axes)]
