"""RMSNorm and what is fused with it in plain JAX: the specification of the kernels, and the path where there is none.

The mean is over the last axis of ``x`` [..., H]. ``gamma`` is [H], or [*groups, H] where the leading
dimensions equal the first ones of ``x``: each group of rows then has its own gamma, as under `jax.vmap`.

    forward     r = rsqrt(mean(x², -1) + eps)        n = x · r        y = n · γ
    backward    c = mean(dy · γ · n, -1)             dx = r · (dy · γ - n · c)      dγ = Σ_rows dy · n

γ is ``gamma``, or ``1 + gamma`` with ``zero_centered_gamma``. With ``rounding="before_gamma"`` the n that
meets γ is first rounded to x's dtype; the derivative of that rounding is taken to be one.

Of several gradients of y, one for each copy of it that was used, dy is the sum, which is not rounded.

With an addend the norm is that of a sum, which is rounded, and returned too; dh is its other gradient:

    forward     h = x + a, rounded to x's dtype      y = norm(h)
    backward    dx = da = norm's dx at h + dh        (da then in a's dtype)

With a rotary embedding x is [..., N, D], N heads of D elements, and ``cos`` and ``sin`` are [*P, R/2]: the axes P
equal the last ones in front of N. Of each head's first R elements, pairs (a, b) are rotated; the others stay:

    forward     y = rotate(norm(x))                  rotate(a, b) = (a · cos - b · sin, b · cos + a · sin)
    backward    norm's backward of dy rotated back, by -sin

A pair is (v[i], v[i + R/2]), or with ``interleaved`` (v[2 i], v[2 i + 1]).

``shards`` are the mesh axes over which the last axis is sharded, for a program that computes one shard.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ._options import Options


def compute_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype of the arithmetic: float32, or float64 if any operand is float64."""
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _norm_dtype(x: jax.Array, gamma: jax.Array | None, options: Options) -> jnp.dtype:
    return compute_dtype(x.dtype, options.out_dtype, *(() if gamma is None else (gamma.dtype,)))


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
    rounded = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if info.nexp == jnp.finfo(x.dtype).nexp:
        return rounded
    # reduce_precision takes subnormals for zero, where a cast keeps them.
    spacing = float(info.smallest_subnormal)
    return jnp.where(
        jnp.abs(x) < float(info.smallest_normal), jnp.round(x / spacing) * spacing, rounded
    )


@_round_to.defjvp
def _round_to_jvp(
    dtype: DTypeLike, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _round_to(primals[0], dtype), tangents[0]


def _mean(values: jax.Array, shards: Sequence[str]) -> jax.Array:
    mean = jnp.mean(values, axis=-1)
    return lax.pmean(mean, tuple(shards)) if shards else mean


def _normalize(
    wide: jax.Array,
    x_dtype: DTypeLike,
    gamma: jax.Array | None,
    options: Options,
    shards: Sequence[str] = (),
) -> tuple[jax.Array, jax.Array]:
    """Returns y [..., H] and the reciprocal RMS [...] of x, all of them in ``wide``'s dtype."""
    mean = _mean(wide * wide, shards)
    rrms = lax.rsqrt(mean + jnp.asarray(options.eps, wide.dtype))
    y = wide * rrms[..., None]
    if options.rounding == "before_gamma":
        y = _round_to(y, x_dtype)
    if gamma is not None:
        y = y * _effective_gamma(gamma, wide.ndim, wide.dtype, options)
    return y, rrms


def _copy(y: jax.Array, copies: int, options: Options) -> list[jax.Array]:
    """y in ``options.out_dtype``, several times: each from the wide y, where their gradients are then added up."""
    return [y.astype(options.out_dtype) for _ in range(copies)]


def forward(
    x: jax.Array,
    gamma: jax.Array | None,
    options: Options,
    copies: int = 1,
    shards: Sequence[str] = (),
) -> tuple[jax.Array, ...]:
    """Returns ``copies`` times y [..., H] in ``options.out_dtype``; the reciprocal RMS [...] in the compute dtype."""
    wide = x.astype(_norm_dtype(x, gamma, options))
    y, rrms = _normalize(wide, x.dtype, gamma, options, shards)
    return *_copy(y, copies, options), rrms


def add_up(dys: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The sum of the gradients of y, in ``dtype``."""
    return functools.reduce(operator.add, (dy.astype(dtype) for dy in dys))


def backward(
    x: jax.Array,
    gamma: jax.Array | None,
    rrms: jax.Array,
    dys: Sequence[jax.Array],
    options: Options,
    dh: jax.Array | None = None,
    shards: Sequence[str] = (),
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx (plus ``dh``) in x's dtype, and dgamma in gamma's dtype and shape (None without gamma)."""
    dtype = rrms.dtype
    normalized = x.astype(dtype) * rrms[..., None]
    dy = add_up(dys, dtype)
    dn, dgamma = dy, None
    if gamma is not None:
        dn = dy * _effective_gamma(gamma, x.ndim, dtype, options)
        rounded = (
            _round_to(normalized, x.dtype) if options.rounding == "before_gamma" else normalized
        )
        rows = tuple(range(gamma.ndim - 1, x.ndim - 1))
        dgamma = jnp.sum(dy * rounded, axis=rows).astype(gamma.dtype)
    c = _mean(dn * normalized, shards)
    dx = rrms[..., None] * (dn - normalized * c[..., None])
    if dh is not None:
        dx = dx + dh.astype(dtype)
    return dx.astype(x.dtype), dgamma


def plain_sum(x: jax.Array, addend: jax.Array) -> jax.Array:
    """Returns x + addend, rounded as x's dtype asks for: in that dtype if both have it, else in the compute dtype.

    Of two of one dtype XLA can make it part of the product that made one of them.
    """
    if x.dtype == addend.dtype:
        return x + addend
    dtype = compute_dtype(x.dtype, addend.dtype)
    return _round_to(x.astype(dtype) + addend.astype(dtype), x.dtype)


def add(x: jax.Array, addend: jax.Array) -> jax.Array:
    """Returns `plain_sum` in the compute dtype, rounded for whatever is computed of it."""
    dtype = compute_dtype(x.dtype, addend.dtype)
    return _round_to(plain_sum(x, addend).astype(dtype), x.dtype)


def add_forward(
    x: jax.Array,
    addend: jax.Array,
    gamma: jax.Array | None,
    options: Options,
    copies: int = 1,
    shards: Sequence[str] = (),
) -> tuple[jax.Array, ...]:
    """Returns ``copies`` times y, h [..., H] in x's dtype, and the reciprocal RMS of h."""
    # Both results come from the wide sum, so that in its gradient theirs are added before they are rounded.
    wide = add(x, addend)
    norm_dtype = _norm_dtype(x, gamma, options)
    y, rrms = _normalize(wide.astype(norm_dtype), x.dtype, gamma, options, shards)
    return *_copy(y, copies, options), wide.astype(x.dtype), rrms


def add_backward(
    h: jax.Array,
    gamma: jax.Array | None,
    rrms: jax.Array,
    dys: Sequence[jax.Array],
    dh: jax.Array,
    options: Options,
    shards: Sequence[str] = (),
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the gradient of x and of the addend, in h's dtype, and dgamma as `backward` does."""
    return backward(h, gamma, rrms, dys, options, dh, shards)


def rotate(v: jax.Array, cos: jax.Array, sin: jax.Array, options: Options) -> jax.Array:
    """Rotates the first R elements of each head of v [..., N, D], in v's dtype."""
    missing = range(v.ndim - cos.ndim - 1)
    cos, sin = (jnp.expand_dims(table.astype(v.dtype), (*missing, -2)) for table in (cos, sin))
    half = cos.shape[-1]
    turning = v[..., : 2 * half]
    if options.interleaved:
        pairs = turning.reshape(*turning.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
    else:
        a, b = turning[..., :half], turning[..., half:]
    turned = (a * cos - b * sin, b * cos + a * sin)
    if options.interleaved:
        turned = (jnp.stack(turned, axis=-1).reshape(turning.shape),)
    return jnp.concatenate([*turned, v[..., 2 * half :]], axis=-1)


def rope_forward(
    x: jax.Array,
    gamma: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Returns y [..., N, D] in ``options.out_dtype`` and the reciprocal RMS [..., N] in the compute dtype."""
    wide = x.astype(compute_dtype(cos.dtype, _norm_dtype(x, gamma, options)))
    y, rrms = _normalize(wide, x.dtype, gamma, options)
    return rotate(y, cos, sin, options).astype(options.out_dtype), rrms


def rope_backward(
    x: jax.Array,
    gamma: jax.Array | None,
    rrms: jax.Array,
    dy: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns dx and dgamma as `backward` does. The gradients of cos and sin are those of `rope_forward`."""
    dy = rotate(dy.astype(rrms.dtype), cos, -sin, options)
    return backward(x, gamma, rrms, [dy], options)
