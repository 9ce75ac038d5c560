"""The norms of a decoder and what stands next to them: without the kernels, with them, and with them fused.

Fused, the gradients of what reads a norm are added up by its backward too; plain JAX adds them up beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jax_rmsnorm import add_rms_norm, rms_norm, rms_norm_rope

from .contenders import plain_norm
from .step_config import KERNELS

EPS = 1e-6
SCOPE = "rms_norm"  # marks the norm's own operations, so that they are found again in the compiled program
_scoped = jax.named_scope(SCOPE)


Copies: TypeAlias = tuple[jax.Array, ...]


class Norms(NamedTuple):
    """What a decoder asks for; every x may be of any leading shape, every gamma is float32 [size of x's last axis].

    Attributes:
        norm: (x, gamma, copies) to the norm of x, as often as there are products that read it.
        add_norm: (x, residual, gamma, copies) to the norm of their sum, likewise, and the sum.
        norm_rope: (x [batch, seq, heads, head_dim], gamma, cos [seq, head_dim / 2], sin) to the norm of each head,
            with the rotary embedding.
    """

    norm: Callable[[jax.Array, jax.Array, int], Copies]
    add_norm: Callable[[jax.Array, jax.Array, jax.Array, int], tuple[Copies, jax.Array]]
    norm_rope: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + head_dim / 2]) of each head by its position's angles."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _beside(norm: Callable[[jax.Array, jax.Array], jax.Array]) -> Norms:
    """A norm with the additions and the rotary embedding in plain JAX next to it."""
    norm = _scoped(norm)

    def norm_copies(x: jax.Array, gamma: jax.Array, copies: int) -> Copies:
        return (norm(x, gamma),) * copies

    def add_norm(
        x: jax.Array, residual: jax.Array, gamma: jax.Array, copies: int
    ) -> tuple[Copies, jax.Array]:
        h = x + residual
        return norm_copies(h, gamma, copies), h

    def norm_rope(x: jax.Array, gamma: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return rotate(norm(x, gamma), cos, sin)

    return Norms(norm_copies, add_norm, norm_rope)


def _fused(implementation: Literal["kernel"] | None = None) -> Norms:
    options: dict[str, Any] = {"eps": EPS, "implementation": implementation}
    return Norms(
        norm=_scoped(lambda x, gamma, copies: rms_norm(x, gamma, copies=copies, **options)),
        add_norm=_scoped(
            lambda x, residual, gamma, copies: add_rms_norm(
                x, residual, gamma, copies=copies, **options
            )
        ),
        norm_rope=_scoped(functools.partial(rms_norm_rope, **options)),
    )


NORMS: Mapping[str, Norms] = {
    "jnp": _beside(lambda x, gamma: plain_norm(x, gamma, EPS)[0]),
    "unfused": _beside(functools.partial(rms_norm, eps=EPS)),
    "fused": _fused(),
    KERNELS: _fused("kernel"),
    "identity": _beside(lambda x, gamma: x),
}
