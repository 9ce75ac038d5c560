"""The input sets of a case: several, so that no call finds in a cache what the call before it read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .shapes import Case

EPS = 1e-5


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


def stationary(inputs: Inputs) -> Inputs:
    """Inputs for a chain of calls, which would otherwise overflow or fade: rows of RMS 1, γ = 1.

    With them y = x and dx is dy without its part along x, so that the next call changes little.
    """
    wide = inputs.x.astype(jnp.float32)
    x = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True))
    return Inputs(x.astype(inputs.x.dtype), jnp.ones_like(inputs.gamma), inputs.dy)
