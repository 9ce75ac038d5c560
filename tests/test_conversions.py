"""Every bfloat16 and float16 number on its way into the kernels' float32, and every kind of float32 on its way out.

Operands are chosen so that the kernels' arithmetic is exact, or is one product that NumPy computes with the same bits.
Float32 subnormals, among them bfloat16's, count as zero in the arithmetic, as in XLA's own.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsnorm import SMMargin
from jax_rmsnorm._options import Options
from jax_rmsnorm._primitives import backward, forward

HALVES = pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
SMALLEST_NORMAL = np.finfo(np.float32).tiny
ROWS = pytest.mark.parametrize("hidden", [2**16, 7], ids=["full vectors", "tails"])
# The kernels have one way for bfloat16 alone, and another beside wider or narrower operands.
ALONE = pytest.mark.parametrize("alone", [False, True], ids=["beside float32", "alone"])


@pytest.fixture(autouse=True)
def quiet_numpy():
    """NumPy warns of signalling NaN and of overflow, of which these tests are full."""
    with np.errstate(all="ignore"):
        yield


def options(dtype=jnp.float32, rounding="once") -> Options:
    return Options(0.0, False, rounding, jnp.dtype(dtype), SMMargin(), require_kernel=True)


def grouped(values: np.ndarray, hidden: int) -> np.ndarray:
    """As [groups, hidden], repeating some at the end to fill it."""
    return np.resize(values, (-(-values.size // hidden), hidden))


def all_halves(half) -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(jnp.dtype(half))


def flushed(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def assert_equal(actual, expected: np.ndarray) -> None:
    """Equal, of the same sign also where zero, and NaN where expected is."""
    actual = np.asarray(actual).reshape(expected.shape)
    assert actual.dtype == expected.dtype
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual)[numbers], np.signbit(expected)[numbers])


@ROWS
@HALVES
def test_gamma_in(half, hidden):
    gamma = grouped(all_halves(half), hidden)
    ones = jnp.ones((len(gamma), 1, hidden), jnp.float32)
    (y,) = forward(ones, gamma, options(), save_rrms=False)
    assert_equal(y, flushed(gamma))


@ROWS
@HALVES
@ALONE
@pytest.mark.parametrize("operand", ["x", "dy"])
def test_x_and_dy_in(operand, alone, half, hidden):
    """dgamma of one row is the product of x, its reciprocal RMS and dy: here of one number and ones."""
    values = jnp.asarray(grouped(all_halves(half), hidden))[:, None]
    ones = jnp.ones(values.shape, jnp.float32)
    other = ones.astype(half) if alone else ones
    x, dy = (values, other) if operand == "x" else (other, values)
    _, dgamma = backward(x, ones[:, 0], ones[..., 0], [dy], options())
    assert_equal(dgamma, np.float32(0) + flushed(np.asarray(values)))  # a sum from zero: no -0


def floats_between(half) -> np.ndarray:
    """All float32 in the middle of two neighbouring halves or just beside it, the halves themselves, and others."""
    halves = all_halves(half).astype(np.float32)
    finite = np.unique(halves[np.isfinite(halves)])
    top = finite[-1] + (finite[-1] - finite[-2])
    neighbours = np.append(finite, np.float32(top) if np.isfinite(top) else np.float32(np.inf))
    middles = ((neighbours[:-1].astype(np.float64) + neighbours[1:]) / 2).astype(np.float32)
    middles = np.concatenate([middles, -middles])
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    values = [halves, bits.view(np.float32), np.float32([np.inf, -np.inf, np.nan, 3e38, 0.0, -0.0])]
    values += [middles, *(np.nextafter(middles, np.float32(to)) for to in (-np.inf, np.inf))]
    return flushed(np.concatenate(values))


@ROWS
@HALVES
@ALONE
def test_y_out(alone, half, hidden):
    gamma = grouped(floats_between(half), hidden)
    ones = jnp.ones((len(gamma), 1, hidden), half if alone else jnp.float32)
    (y,) = forward(ones, gamma, options(half), save_rrms=False)
    assert_equal(y, gamma.astype(half))


@HALVES
def test_dx_and_dgamma_out(half):
    values = floats_between(half)
    values = values[np.isfinite(values)]
    ones = jnp.ones((1, values.size), jnp.float32)
    gamma = jnp.ones(values.size, half)
    dx, _ = backward(
        jnp.zeros((1, values.size), half), gamma, ones[:, 0], [values[None]], options()
    )
    _, dgamma = backward(ones, gamma, ones[:, 0], [values[None]], options())
    assert_equal(dx, values.astype(half)[None])
    assert_equal(dgamma, (np.float32(0) + values).astype(half))


@ROWS
@HALVES
def test_dx_out_of_halves(half, hidden):
    values = floats_between(half)
    gamma = grouped(values[np.isfinite(values)], hidden)
    zeros = jnp.zeros((len(gamma), 1, hidden), half)
    dx, _ = backward(zeros, gamma, jnp.ones((len(gamma), 1)), [jnp.ones_like(zeros)], options())
    assert_equal(dx, gamma.astype(half))


@HALVES
@ALONE
@pytest.mark.parametrize("rrms", [0.7, 1.2345678, 3e-3, 512.0])
def test_rounding_before_gamma(alone, half, rrms):
    """The normalised value's round trip through x's dtype, seen through dgamma."""
    x = all_halves(half)
    ones = jnp.ones((1, x.size), jnp.float32)
    dy = ones.astype(half) if alone else ones
    opts = options(rounding="before_gamma")
    _, dgamma = backward(x[None], ones[0], np.float32([rrms]), [dy], opts)
    rounded = flushed(flushed(x) * np.float32(rrms)).astype(half)
    assert_equal(dgamma, np.float32(0) + rounded.astype(np.float32))
