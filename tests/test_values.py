"""Values and gradients of rms_norm against float64, over shapes, dtypes and options, on the default device."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import DTYPES, check_call, draw
from hypothesis import given, settings

import jax_rmsnorm

dtypes = st.sampled_from(DTYPES)


@settings(max_examples=60)
@given(
    rows=st.lists(st.integers(1, 9), max_size=3),
    hidden=st.one_of(st.integers(1, 300), st.sampled_from([512, 1000, 1024, 2048, 4100, 5120])),
    x_dtype=dtypes,
    gamma_dtype=st.one_of(st.none(), dtypes),
    y_dtype=dtypes,
    rounding=st.sampled_from(["once", "before_gamma"]),
    zero_centered_gamma=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_matches_float64(rows, hidden, x_dtype, gamma_dtype, y_dtype, **options):
    options["zero_centered_gamma"] &= gamma_dtype is not None
    check_call((*rows, hidden), x_dtype, gamma_dtype, y_dtype, **options)


@pytest.mark.parametrize("shape", [(1, 65_536), (3, 65_537), (2, 131_072), (1, 300_001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(shape, dtype):
    check_call(shape, dtype, jnp.float32, dtype)


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
@pytest.mark.parametrize("rounding", ["once", "before_gamma"])
def test_many_rows(rounding, implementation):
    check_call(
        (70_001, 24), jnp.bfloat16, jnp.bfloat16, jnp.bfloat16,
        rounding=rounding, implementation=implementation,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e15])
def test_magnitudes(scale):
    """eps decides at the small end, and the squares come near float32's largest at the other."""
    check_call((5, 384), jnp.float32, jnp.float32, jnp.float32, scale=scale)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_inputs_spoil_their_own_row_only(x_dtype, value):
    """As in the plain JAX reference: NaN everywhere, or zero with NaN where the infinity was."""
    x = draw(0, (4, 40), x_dtype).at[2, 7].set(value)
    gamma = draw(1, 40, x_dtype)
    got = jax_rmsnorm.rms_norm(x, gamma, implementation="kernel")
    want = jax_rmsnorm.rms_norm(x, gamma, implementation="xla")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    clean = np.delete(np.arange(4), 2)
    oracle.assert_close(got[clean], oracle.rms_norm(x[clean], gamma, x[clean]).y, what="y")
    assert not np.isfinite(np.asarray(want)[2].astype(np.float32)).all() or np.isnan(value)


def test_float64_takes_the_plain_path():
    with jax.enable_x64(True):
        x, gamma, dy = (draw(i, (6, 50), np.float64) for i in range(3))
        gamma = gamma[0]
        y, vjp = jax.vjp(jax_rmsnorm.rms_norm, x, gamma)
        want = oracle.rms_norm(x, gamma, dy)
        for got, expected in zip((y, *vjp(dy)), (want.y, want.dx, want.dgamma), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
        with pytest.raises(NotImplementedError, match="float64"):
            jax_rmsnorm.rms_norm(x, gamma, implementation="kernel")
