"""NaN, infinities, zeros, numbers near the ends of a dtype's range: as the reference has them."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import DTYPES, draw
from compare import assert_same_kind

from jax_rmsnorm import add_rms_norm, rms_norm

NAN, INF = float("nan"), float("inf")
HIDDEN = 37  # full vectors and a rest on every instruction set


def results(x, gamma, dy, **options):
    y, vjp = jax.vjp(lambda x, g: rms_norm(x, g, **options), x, gamma)
    return y, *vjp(dy)


def places(row: np.ndarray, values: list[float]):
    """The row with one of the values in its first, last and some middle places, and with pairs of them."""
    for value, place in itertools.product(values, (0, 1, 16, HIDDEN - 1)):
        yield np.where(np.arange(HIDDEN) == place, value, row)
    for a, b in itertools.product(values, repeat=2):
        yield np.where(np.arange(HIDDEN) == 3, a, np.where(np.arange(HIDDEN) == 30, b, row))


@pytest.mark.parametrize("rounding", ["once", "before_gamma"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["x", "gamma", "dy"])
def test_nan_and_infinity(where, dtype, rounding):
    row = np.random.default_rng(0).standard_normal(HIDDEN)
    special = np.stack(list(places(row, [NAN, INF, -INF, 0.0]))).astype(dtype)
    plain = np.asarray(draw(1, special.shape, dtype))
    arrays = {"x": plain, "gamma": plain, "dy": plain} | {where: special}

    def run(implementation):
        each = jax.vmap(lambda *a: results(*a, implementation=implementation, rounding=rounding))
        return jax.jit(each)(
            *(arrays[name][:, None] if name != "gamma" else arrays[name] for name in arrays)
        )

    expected = run("xla")
    assert any(np.isnan(oracle.to64(e)).any() for e in expected)
    assert where == "x" or any(np.isinf(oracle.to64(e)).any() for e in expected)  # x: inf · 0
    for a, e in zip(run("kernel"), expected, strict=True):
        assert np.isfinite(oracle.to64(e)).any()
        assert_same_kind(a, e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_stays_alone(dtype):
    x, gamma, dy = draw(0, (9, HIDDEN), dtype), draw(1, HIDDEN, dtype), draw(2, (9, HIDDEN), dtype)
    y, dx, _ = results(x, gamma, dy)
    bad = results(x.at[4, 5].set(NAN), gamma, dy)
    for actual, expected in zip(bad[:2], (y, dx), strict=True):
        assert np.isnan(oracle.to64(actual[4])).all()
        others = np.arange(9) != 4
        np.testing.assert_array_equal(np.asarray(actual)[others], np.asarray(expected)[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype):
    x = jnp.zeros((3, HIDDEN), dtype)
    dy, gamma = draw(0, x.shape, dtype), draw(1, HIDDEN, jnp.float32)
    y, dx, dgamma = results(x, gamma, dy)
    assert not np.asarray(y).any()
    assert not np.asarray(dgamma).any()
    want = oracle.rms_norm(x, gamma, dy)
    oracle.assert_close(dx, want.dx, terms=want.dx_terms)
    negative = rms_norm(-x, gamma)
    np.testing.assert_array_equal(
        np.signbit(np.asarray(negative)), np.signbit(np.asarray(-x * gamma.astype(dtype)))
    )
    assert np.isnan(oracle.to64(rms_norm(x, eps=0.0))).all()  # 0 · rsqrt(0)


@pytest.mark.parametrize("scale", [1e-15, 1e15, 1.5e19])
def test_wide_range_in_float32(scale):
    x, dy = draw(0, (4, HIDDEN), jnp.float32) * scale / 10, draw(1, (4, HIDDEN), jnp.float32)
    want = oracle.rms_norm(x, None, dy, eps=0.0)
    y, vjp = jax.vjp(lambda x: rms_norm(x, eps=0.0, implementation="kernel"), x)
    oracle.assert_close(y, want.y)
    oracle.assert_close(vjp(dy)[0], want.dx, terms=want.dx_terms)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_squares_beyond_float32(dtype):
    """x² is infinite in float32 and the reciprocal root zero, in the kernel as in plain JAX."""
    x = jnp.full((2, HIDDEN), 1e30, dtype)
    for implementation in ("kernel", "xla"):
        y = rms_norm(x, implementation=implementation)
        assert not np.asarray(y).any()


def test_float16_overflows_to_infinity():
    x = jnp.ones((2, HIDDEN), jnp.float16) * jnp.where(jnp.arange(HIDDEN) % 2, 1, -1).astype(
        jnp.float16
    )
    gamma = jnp.linspace(65_400, 65_600, HIDDEN)
    want = oracle.rms_norm(x, gamma, x, eps=0.0).y
    with np.errstate(over="ignore"):
        rounded = want.astype(np.float16)
    assert np.isinf(rounded).any()
    assert np.isfinite(rounded).any()
    for implementation in ("kernel", "xla"):
        y = rms_norm(x, gamma, eps=0.0, implementation=implementation)
        np.testing.assert_array_equal(np.isinf(y), np.isinf(rounded))
        assert_same_kind(y, rounded)


def test_float16_subnormals():
    """Subnormal in float16, but normal numbers in the arithmetic: in and out, they count."""
    x = jnp.asarray(np.arange(1, HIDDEN + 1)[None] * 2.0**-24, jnp.float16)
    dy = draw(0, x.shape, jnp.float16)
    gamma = jnp.full(HIDDEN, 2.0**-20, jnp.float16)
    want = oracle.rms_norm(x, gamma, dy, eps=1e-12)
    for implementation in ("kernel", "xla"):
        y, dx, dgamma = results(x, gamma, dy, eps=1e-12, implementation=implementation)
        assert np.any(np.abs(oracle.to64(y)) < 6e-5)
        oracle.assert_close(y, want.y)
        oracle.assert_close(dx, want.dx, terms=want.dx_terms)
        oracle.assert_close(dgamma, want.dgamma, terms=want.dgamma_terms)


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
def test_float16_subnormal_sums(implementation):
    """A sum that ends among float16's subnormals is rounded to one of them, ties to even."""
    x = jnp.asarray(np.arange(-HIDDEN, HIDDEN) * 2.0**-25, jnp.float32)
    residual = jnp.zeros(x.shape, jnp.float16)
    _, h = jax.jit(functools.partial(add_rms_norm, implementation=implementation))(x, residual)
    np.testing.assert_array_equal(np.asarray(h), np.asarray(x).astype(np.float16))
    assert np.any(h != 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_subnormals_are_flushed_on_cpus(dtype):
    with jax.default_device(jax.devices("cpu")[0]):
        x = jnp.full((3, HIDDEN), 1e-40, dtype)
        gamma = jnp.full(HIDDEN, 1e-40, jnp.float32)
        ones = jnp.ones_like(x)
        for arguments in [(x, None), (ones, gamma)]:
            kernel, plain = (rms_norm(*arguments, implementation=i) for i in ("kernel", "xla"))
            np.testing.assert_array_equal(np.asarray(kernel), np.asarray(plain))
            assert not np.asarray(kernel).any()
