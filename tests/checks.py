"""Checks that several test files share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_rmsnorm

needs_8_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices, as which conftest.py lets a CPU appear"
)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Dtypes of x, gamma, y and an operand more, in which any two of the four meet in every way.
PAIRWISE_DTYPES = [
    (DTYPES[i], gamma, DTYPES[(i + j) % 3], DTYPES[(i + 2 * j) % 3])
    for i in range(3)
    for j, gamma in enumerate((None, *DTYPES))
]


def draw(seed: int, shape, dtype, *, scale: float = 1.0, offset: float = 0.0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape) * scale + offset
    return jax.device_put(values.astype(dtype))


def _draw_gamma(hidden: int, dtype, options) -> jax.Array | None:
    if dtype is None:
        return None
    center = 0.0 if options.get("zero_centered_gamma") else 1.0
    return draw(1, hidden, dtype, scale=0.5, offset=center)


def _flip(dtype, options) -> float:
    """Rounding before gamma may fall on the other side of a near-tie: one more unit in the last place."""
    return 2 * oracle.unit_roundoff(dtype) if options.get("rounding") == "before_gamma" else 0


def _arithmetic(options):
    """What of a call's options the oracle takes."""
    return {name: value for name, value in options.items() if name != "sm_margin"}


def _draw_gradients(copies: int | None, shape, dtype) -> Any:
    """A gradient for y, or one for each of its copies, in the structure of the result."""
    if copies is None:
        return draw(2, shape, dtype)
    return tuple(draw(20 + i, shape, dtype, scale=2.0**-i) for i in range(copies))


def _gradient_of_sum(dy) -> dict[str, np.ndarray]:
    """What the oracle takes of the gradients: their sum, and the sum of their magnitudes."""
    dys = [oracle.to64(leaf) for leaf in jax.tree.leaves(dy)]
    return {"dy": sum(dys), "dy_terms": sum(np.abs(leaf) for leaf in dys)}


def _only(y, copies: int | None) -> jax.Array:
    """y, once it is clear that all copies are the same."""
    if copies is None:
        return y
    assert isinstance(y, tuple)
    assert len(y) == copies
    for other in y[1:]:
        np.testing.assert_array_equal(np.asarray(other), np.asarray(y[0]))
    return y[0]


def _evaluate(norm, operands, cotangents):
    """Results, gradients, and the results again of a call that is not differentiated, as one program."""

    @jax.jit
    def run(operands, cotangents):
        results, vjp = jax.vjp(norm, *operands)
        return results, vjp(cotangents), norm(*operands)

    return run(operands, cotangents)


def check_call(
    shape,
    x_dtype,
    gamma_dtype,
    y_dtype,
    *,
    implementation="kernel",
    scale=1.0,
    copies=None,
    **options,
):
    """One call of `rms_norm`, forward and backward, against the oracle."""
    x = draw(0, shape, x_dtype, scale=scale)
    gamma = _draw_gamma(shape[-1], gamma_dtype, options)
    dy = _draw_gradients(copies, shape, y_dtype)
    norm = functools.partial(
        jax_rmsnorm.rms_norm,
        dtype=y_dtype,
        implementation=implementation,
        copies=copies,
        **options,
    )
    y, (dx, dgamma), inference = _evaluate(norm, (x, gamma), dy)
    y = _only(y, copies)
    want = oracle.rms_norm(x, gamma, **_gradient_of_sum(dy), **_arithmetic(options))
    assert (y.dtype, dx.dtype) == (y_dtype, x_dtype)
    flip = _flip(x_dtype, options)
    oracle.assert_close(y, want.y, extra=flip * np.abs(want.y), what="y")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    # The same function without differentiation writes the same bits.
    np.testing.assert_array_equal(np.asarray(_only(inference, copies)), np.asarray(y))
    _check_dgamma(dgamma, gamma, want, flip)


def _check_dgamma(dgamma, gamma, want: oracle.Result, flip: float) -> None:
    if gamma is None:
        assert dgamma is None
        return
    assert dgamma.dtype == gamma.dtype
    oracle.assert_close(
        dgamma,
        want.dgamma,
        terms=want.dgamma_terms,
        extra=flip * want.dgamma_terms,
        what="dgamma",
    )


def check_add_call(
    shape,
    x_dtype,
    residual_dtype,
    gamma_dtype,
    y_dtype,
    *,
    implementation="kernel",
    copies=None,
    **options,
):
    """One call of `add_rms_norm`, forward and backward, against the oracle."""
    x, residual = draw(0, shape, x_dtype), draw(3, shape, residual_dtype, scale=2.0)
    gamma = _draw_gamma(shape[-1], gamma_dtype, options)
    dy, dh = _draw_gradients(copies, shape, y_dtype), draw(4, shape, residual_dtype)
    norm = functools.partial(
        jax_rmsnorm.add_rms_norm,
        dtype=y_dtype,
        implementation=implementation,
        copies=copies,
        **options,
    )
    operands = x, residual, gamma
    (y, h), (dx, dresidual, dgamma), inference = _evaluate(norm, operands, (dy, dh))
    y = _only(y, copies)
    h_want, want = oracle.add_rms_norm(
        x, residual, gamma, dh=dh, **_gradient_of_sum(dy), **_arithmetic(options)
    )
    dtypes = (y.dtype, h.dtype, dx.dtype, dresidual.dtype)
    assert dtypes == (y_dtype, residual_dtype, x_dtype, residual_dtype)
    np.testing.assert_array_equal(np.asarray(h), h_want)
    flip = _flip(residual_dtype, options)
    oracle.assert_close(y, want.y, extra=flip * np.abs(want.y), what="y")
    oracle.assert_close(dresidual, want.dx, terms=want.dx_terms, what="dresidual")
    # XLA may leave out the rounding to residual's dtype where it, and not a kernel, writes both.
    rounding = oracle.unit_roundoff(x_dtype) + oracle.unit_roundoff(residual_dtype)
    wide = np.asarray(dresidual).astype(np.float64)
    np.testing.assert_allclose(np.asarray(dx).astype(np.float64), wide, rtol=rounding, atol=1e-7)
    y_alone, h_alone = inference
    np.testing.assert_array_equal(np.asarray(_only(y_alone, copies)), np.asarray(y))
    np.testing.assert_array_equal(np.asarray(h_alone), np.asarray(h))
    _check_dgamma(dgamma, gamma, want, flip)


def check_rope_call(
    shape,
    table_shape,
    x_dtype,
    table_dtype,
    gamma_dtype,
    y_dtype,
    *,
    implementation="kernel",
    table_gradients=True,
    **options,
):
    """One call of `rms_norm_rope`, forward and backward, against the oracle.

    The tables' gradients are plain JAX, which takes many times as long to compile as the kernels' calls.
    """
    x, dy = draw(0, shape, x_dtype), draw(2, shape, y_dtype)
    gamma = _draw_gamma(shape[-1], gamma_dtype, options)
    # No cosines and sines of one angle: a kernel that swaps or drops one of them is to be seen.
    cos, sin = draw(3, table_shape, table_dtype), draw(4, table_shape, table_dtype)
    norm = functools.partial(
        jax_rmsnorm.rms_norm_rope, dtype=y_dtype, implementation=implementation, **options
    )
    operands = (x, gamma, cos, sin)
    if not table_gradients:
        norm, operands = functools.partial(norm, cos=cos, sin=sin), (x, gamma)
    y, (dx, dgamma, *dtables), inference = _evaluate(norm, operands, dy)
    want = oracle.rms_norm_rope(x, gamma, cos, sin, dy, **_arithmetic(options))
    assert (y.dtype, dx.dtype) == (y_dtype, x_dtype)
    flip = _flip(x_dtype, options)
    oracle.assert_close(y, want.y, terms=want.y_terms, extra=flip * want.y_terms, what="y")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    for name, got in zip(("dcos", "dsin"), dtables, strict=table_gradients):
        assert got.dtype == table_dtype
        terms = getattr(want, f"{name}_terms")
        oracle.assert_close(got, getattr(want, name), terms=terms, extra=flip * terms, what=name)
    np.testing.assert_array_equal(np.asarray(inference), np.asarray(y))
    _check_dgamma(dgamma, gamma, want, flip)
