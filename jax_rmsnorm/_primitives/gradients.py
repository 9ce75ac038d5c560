"""The gradients of y, one for each copy that was used: how the backwards take several and what becomes of many.

A kernel reads up to `MOST_GRADIENTS` and adds them up in float32, as it reads. Where it cannot, all of them are added
up in plain JAX first, and the kernel reads the one sum, in float32: more bytes than a sum rounded to y's dtype, but the
same mathematics for any number of copies and any length of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reference

MOST_GRADIENTS = 4  # kMostGradients of csrc/problem.h


def add_up(dys: Sequence[jax.Array]) -> jax.Array:
    """Their sum, in float32 unless there is only one."""
    return dys[0] if len(dys) == 1 else _reference.add_up(dys, jnp.dtype(jnp.float32))


def add_up_many(dys: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """The gradients themselves, or where a kernel does not take so many their sum alone."""
    return dys if len(dys) <= MOST_GRADIENTS else [add_up(dys)]


def split_gradients(operands: Sequence[Any], gradients: int) -> tuple[Sequence[Any], Any | None]:
    """The gradients of y, and the gamma behind them if there is one."""
    dys, gamma = operands[:gradients], operands[gradients:]
    return dys, gamma[0] if gamma else None


def gradients_attributes(gradients: int) -> dict[str, Any]:
    return {"gradients": np.int64(gradients)}
