"""The input sets of a case: several, so that no call finds in a cache what the call before it read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .shapes import Case

EPS = 1e-5
_STRIDE = (
    4099  # elements from one set of a pool to the next: a prime, so that rows do not meet again
)


class Inputs(NamedTuple):
    """x and dy [rows, hidden], gamma [hidden]."""

    x: jax.Array
    gamma: jax.Array
    dy: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, case: Case) -> jax.Array:
    return jax.random.normal(key, case.shape, case.x_dtype)


def draw(case: Case, count: int) -> list[Inputs]:
    """``count`` sets of normally distributed values; gamma, a parameter, is the same in all."""
    gamma_key, *keys = jax.random.split(jax.random.key(0), 2 * count + 1)
    gamma = 1 + 0.1 * jax.random.normal(gamma_key, (case.hidden,), case.gamma_dtype)
    gamma = gamma.astype(case.gamma_dtype)
    return [
        Inputs(_normal(x_key, case), gamma, _normal(dy_key, case))
        for x_key, dy_key in zip(keys[::2], keys[1::2], strict=True)
    ]


class Pool:
    """Normally distributed values on the host, for input sets of any shape without a program compiled for each."""

    def __init__(self, elements: int, most_sets: int, x_dtype: str, gamma_dtype: str) -> None:
        """Of up to ``elements`` elements a tensor, and ``most_sets`` sets."""
        size = elements + 2 * most_sets * _STRIDE
        values = np.random.default_rng(0).standard_normal(size, np.float32)
        self._values = values.astype(jnp.dtype(x_dtype))
        self._gamma = (1 + 0.1 * values[:elements]).astype(jnp.dtype(gamma_dtype))

    def draw(self, case: Case, count: int) -> list[Inputs]:
        """``count`` sets, x from the pool's front and dy from its end; gamma is the same in all."""
        gamma = jax.device_put(self._gamma[: case.hidden])
        elements, size = case.rows * case.hidden, len(self._values)
        sets: list[Inputs] = []
        for offset in range(0, count * _STRIDE, _STRIDE):
            x = self._values[offset : offset + elements]
            dy = self._values[size - offset - elements : size - offset]
            x, dy = (jax.device_put(array.reshape(case.shape)) for array in (x, dy))
            sets.append(Inputs(x, gamma, dy))
        return jax.block_until_ready(sets)


def stationary(inputs: Inputs) -> Inputs:
    """Inputs for a chain of calls, which would otherwise overflow or fade: rows of RMS 1, γ = 1.

    With them y = x and dx is dy without its part along x, so that the next call changes little.
    """
    wide = inputs.x.astype(jnp.float32)
    x = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True))
    return Inputs(x.astype(inputs.x.dtype), jnp.ones_like(inputs.gamma), inputs.dy)
