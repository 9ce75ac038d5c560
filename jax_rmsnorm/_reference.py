"""RMSNorm in plain JAX: the specification of the kernels, and the path where there is none.

The mean is over the last axis of ``x`` [..., H]. ``gamma`` is [H], or [*groups, H] where the leading
dimensions equal the first ones of ``x``: each group of rows then has its own gamma, as under `jax.vmap`.

    forward     r = rsqrt(mean(x², -1) + eps)        n = x · r        y = n · γ
    backward    c = mean(dy · γ · n, -1)             dx = r · (dy · γ - n · c)      dγ = Σ_rows dy · n

γ is ``gamma``, or ``1 + gamma`` with ``zero_centered_gamma``. With ``rounding="before_gamma"`` the n that
meets γ is first rounded to x's dtype; the derivative of that rounding is taken to be one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ._options import Options


def compute_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype of the arithmetic: float32, or float64 if any operand is float64."""
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _expand_groups(gamma: jax.Array, ndim: int) -> jax.Array:
    """[*groups, H] -> [*groups, 1, ..., 1, H] of rank ``ndim``."""
    groups, hidden = gamma.shape[:-1], gamma.shape[-1]
    return gamma.reshape(*groups, *(1,) * (ndim - gamma.ndim), hidden)


def _effective_gamma(gamma: jax.Array, ndim: int, dtype: jnp.dtype, options: Options) -> jax.Array:
    gamma = _expand_groups(gamma.astype(dtype), ndim)
    return gamma + 1 if options.zero_centered_gamma else gamma


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rounds to ``dtype`` and keeps its own; XLA may not drop this, as it may a pair of casts."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


@_round_to.defjvp
def _round_to_jvp(
    dtype: DTypeLike, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _round_to(primals[0], dtype), tangents[0]


def forward(x: jax.Array, gamma: jax.Array | None, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns y [..., H] in ``options.out_dtype`` and the reciprocal RMS [...] in the compute dtype."""
    dtype = compute_dtype(x.dtype, options.out_dtype, *(() if gamma is None else (gamma.dtype,)))
    wide = x.astype(dtype)
    rrms = lax.rsqrt(jnp.mean(wide * wide, axis=-1) + jnp.asarray(options.eps, dtype))
    y = wide * rrms[..., None]
    if options.rounding == "before_gamma":
        y = _round_to(y, x.dtype)
    if gamma is not None:
        y = y * _effective_gamma(gamma, x.ndim, dtype, options)
    return y.astype(options.out_dtype), rrms


def backward(
    x: jax.Array, gamma: jax.Array | None, rrms: jax.Array, dy: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx in x's dtype, and dgamma in gamma's dtype and shape (None without gamma)."""
    dtype = rrms.dtype
    normalized = x.astype(dtype) * rrms[..., None]
    dy = dy.astype(dtype)
    dn, dgamma = dy, None
    if gamma is not None:
        dn = dy * _effective_gamma(gamma, x.ndim, dtype, options)
        rounded = (
            _round_to(normalized, x.dtype) if options.rounding == "before_gamma" else normalized
        )
        rows = tuple(range(gamma.ndim - 1, x.ndim - 1))
        dgamma = jnp.sum(dy * rounded, axis=rows).astype(gamma.dtype)
    c = jnp.mean(dn * normalized, axis=-1, keepdims=True)
    dx = rrms[..., None] * (dn - normalized * c)
    return dx.astype(x.dtype), dgamma
