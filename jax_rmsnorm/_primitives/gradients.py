"""The gradients of y, one for each copy that was used: how a backward takes several, and where they are added up first.

On one device a kernel reads up to `MOST_GRADIENTS` and adds them up in float32, as it reads. Where it cannot, all of
them are added up in plain JAX first, and the kernel reads the one sum, in float32: more bytes than a sum rounded to y's
dtype, but the same mathematics for any number of copies and any length of rows.

In a program for several devices they are added up first too, as JAX would without copies. There each may be itself a
sum over devices, as of products whose columns are sharded; XLA puts sums of such sums into one all-reduce (or
reduce-scatter) if they are of one dtype and nothing but the addition reads them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reference

MOST_GRADIENTS = 4  # kMostGradients of csrc/problem.h

AddUp = Callable[[Sequence[jax.Array]], jax.Array]


def add_up_unrounded(dys: Sequence[jax.Array]) -> jax.Array:
    """Their sum, in float32 unless there is only one."""
    return dys[0] if len(dys) == 1 else _reference.add_up(dys, jnp.dtype(jnp.float32))


def add_up_rounding(dys: Sequence[jax.Array]) -> jax.Array:
    """Their sum, in their dtype at every step."""
    return functools.reduce(operator.add, dys)


def how_to_add_up(gradients: int, *, on_one_device: bool) -> AddUp | None:
    """How so many are added up in front of the kernel, or None where the kernel does it."""
    if gradients > 1 and not on_one_device:
        return add_up_rounding
    return add_up_unrounded if gradients > MOST_GRADIENTS else None


def with_sum(
    primitive: Any, add_up: AddUp, first: int, *, gradients: int, **params: Any
) -> Callable[..., Sequence[jax.Array]]:
    """The primitive with the sum of its gradients in place of them, the ``first`` operand and those behind it."""

    def run(*operands: jax.Array) -> Sequence[jax.Array]:
        total = add_up(operands[first : first + gradients])
        rest = operands[first + gradients :]
        return primitive.bind(*operands[:first], total, *rest, gradients=1, **params)

    return run


def split_gradients(operands: Sequence[Any], gradients: int) -> tuple[Sequence[Any], Any | None]:
    """The gradients of y, and the gamma behind them if there is one."""
    dys, gamma = operands[:gradients], operands[gradients:]
    return dys, gamma[0] if gamma else None


def gradients_attributes(gradients: int) -> dict[str, Any]:
    return {"gradients": np.int64(gradients)}
