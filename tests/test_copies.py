"""``copies=`` of rms_norm and add_rms_norm: values and gradients against float64, and the sum that is not rounded."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import DTYPES, check_add_call, check_call, draw
from compare import assert_near, assert_same_bits
from hypothesis import given, settings

from jax_rmsnorm import add_rms_norm, rms_norm

F32, BF16 = jnp.float32, jnp.bfloat16
dtypes = st.sampled_from(DTYPES)
shapes = st.tuples(st.integers(1, 9), st.one_of(st.integers(1, 300), st.sampled_from([1024, 2050])))
COPIES = pytest.mark.parametrize("copies", [1, 2, 3, 6])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["kernel", "xla"])
copies_of_y = st.sampled_from([1, 2, 3, 6])
roundings = st.sampled_from(["once", "before_gamma"])


@settings(max_examples=40)
@given(
    copies=copies_of_y,
    shape=shapes,
    x_dtype=dtypes,
    gamma_dtype=st.one_of(st.none(), dtypes),
    y_dtype=dtypes,
    rounding=roundings,
)
def test_rms_norm_matches_float64(shape, x_dtype, gamma_dtype, y_dtype, **options):
    check_call(shape, x_dtype, gamma_dtype, y_dtype, **options)


@settings(max_examples=40)
@given(
    copies=copies_of_y,
    shape=shapes,
    x_dtype=dtypes,
    residual_dtype=dtypes,
    gamma_dtype=st.one_of(st.none(), dtypes),
    y_dtype=dtypes,
    rounding=roundings,
)
def test_add_rms_norm_matches_float64(
    shape, x_dtype, residual_dtype, gamma_dtype, y_dtype, **options
):
    check_add_call(shape, x_dtype, residual_dtype, gamma_dtype, y_dtype, **options)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("copies", [3, 6])
def test_every_pair_of_dtypes(x_dtype, y_dtype, copies):
    check_call((5, 200), x_dtype, F32, y_dtype, copies=copies)
    check_add_call((5, 200), x_dtype, x_dtype, F32, y_dtype, copies=copies)


@COPIES
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_plain_jax(copies, dtype):
    options = {"copies": copies, "implementation": "xla"}
    check_call((5, 200), dtype, F32, BF16, **options)
    check_add_call((5, 200), BF16, dtype, F32, BF16, **options)


@COPIES
@IMPLEMENTATIONS
@pytest.mark.parametrize("residual", [False, True])
def test_the_sum_of_gradients_is_not_rounded(copies, implementation, residual):
    """Gradients that cancel down to their last bits: a sum that is rounded on the way would lose all of these."""
    x, gamma = draw(0, (6, 128), BF16), draw(1, 128, F32, offset=1.0)
    small = draw(2, x.shape, BF16, scale=2.0**-10)
    large = [draw(3 + i, x.shape, BF16, scale=4.0) for i in range(copies // 2)]
    dys = [*large, small, *(-dy for dy in large)][:copies]
    total = sum(oracle.to64(dy) for dy in dys)
    if copies == 3:  # what this test is about
        rounded = functools.reduce(lambda a, b: a + b, dys)
        assert np.mean(oracle.to64(rounded) != total) > 0.5
    terms = sum(np.abs(oracle.to64(dy)) for dy in dys)
    norm = functools.partial(rms_norm, implementation=implementation, copies=copies)
    if residual:
        norm = functools.partial(add_rms_norm, implementation=implementation, copies=copies)
        _, vjp = jax.vjp(lambda x, g: norm(x, jnp.zeros_like(x), g)[0], x, gamma)
    else:
        _, vjp = jax.vjp(norm, x, gamma)
    dx, dgamma = vjp(tuple(dys))
    want = oracle.rms_norm(x, gamma, total, dy_terms=terms)
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    oracle.assert_close(dgamma, want.dgamma, terms=want.dgamma_terms, what="dgamma")


@pytest.mark.parametrize("copies", [2, 3, 4, 5, 6])
def test_kernels_and_plain_jax_add_up_in_one_order(copies):
    """With gradients whose sum is exact, dx has the bits of the call with that sum as its one gradient."""
    x, gamma = draw(0, (7, 50), F32), draw(1, 50, F32)
    dys = [jnp.round(draw(2 + i, x.shape, F32, scale=100.0)) for i in range(copies)]
    _, vjp = jax.vjp(functools.partial(rms_norm, copies=copies), x, gamma)
    _, vjp_of_one = jax.vjp(rms_norm, x, gamma)
    assert_same_bits(vjp(tuple(dys)), vjp_of_one(functools.reduce(jnp.add, dys)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_gradients(dtype):
    """One that is infinite or NaN spoils its own row only; opposite infinities make NaN."""
    x, gamma = draw(0, (5, 70), dtype), draw(1, 70, F32, offset=1.0)
    dys = [draw(2 + i, x.shape, dtype) for i in range(3)]
    spoilt = [
        dys[0].at[1, 3].set(jnp.inf),
        dys[1].at[2, 4].set(jnp.nan),
        dys[2].at[3, 69].set(-jnp.inf),
    ]
    spoilt[0] = spoilt[0].at[3, 69].set(jnp.inf)
    _, vjp = jax.vjp(functools.partial(rms_norm, copies=3, implementation="kernel"), x, gamma)
    dx, _ = vjp(tuple(spoilt))
    _, plain = jax.vjp(functools.partial(rms_norm, copies=3, implementation="xla"), x, gamma)
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(plain(tuple(spoilt))[0]))
    clean = np.array([0, 4])
    assert_same_bits(dx[clean], vjp(tuple(dys))[0][clean])


def test_shapes_and_structure():
    """As many as asked for, in a tuple, whatever axes are normalized; h is no copy."""
    x, gamma = draw(0, (3, 4, 6), F32), draw(1, (4, 6), F32)
    y, h = rms_norm(x, gamma), x + x
    for copies in (1, 3):
        assert_same_bits(rms_norm(x, gamma, copies=copies), (y,) * copies)
        ys, total = add_rms_norm(x, x, gamma, copies=copies)
        assert_same_bits((ys, total), ((rms_norm(h, gamma),) * copies, h))
    assert_same_bits(rms_norm(x, gamma, copies=np.int64(2)), (y, y))
    assert_same_bits(rms_norm(x, gamma, copies=None), y)
    _, vjp = jax.vjp(functools.partial(rms_norm, copies=2), x, gamma)
    dys = (draw(2, x.shape, F32), draw(3, x.shape, F32))
    dx, dgamma = vjp(dys)
    assert (dx.shape, dgamma.shape) == (x.shape, gamma.shape)
    assert_near((dx, dgamma), jax.vjp(rms_norm, x, gamma)[1](dys[0] + dys[1]))


def test_no_rows():
    x, gamma = jnp.ones((0, 8)), jnp.ones(8)
    ys, vjp = jax.vjp(functools.partial(rms_norm, copies=3), x, gamma)
    assert [y.shape for y in ys] == [(0, 8)] * 3
    dx, dgamma = vjp(ys)
    assert dx.shape == (0, 8)
    np.testing.assert_array_equal(dgamma, np.zeros(8))


BAD = [
    (0, ValueError, "copies must be 1 or more, or None for y without a tuple, got 0"),
    (-2, ValueError, "copies must be 1 or more, or None for y without a tuple, got -2"),
    (True, TypeError, "copies must be None or an int known at trace time, got bool: True"),
    (2.0, TypeError, "copies must be None or an int known at trace time, got float: 2.0"),
    ("2", TypeError, "copies must be None or an int known at trace time, got str: '2'"),
    ((2,), TypeError, "copies must be None or an int known at trace time, got tuple"),
]


@pytest.mark.parametrize(("copies", "error", "message"), BAD, ids=str)
@IMPLEMENTATIONS
def test_errors(copies, error, message, implementation):
    x = jnp.ones((2, 4))
    for norm in (rms_norm, functools.partial(add_rms_norm, residual=x)):
        with pytest.raises(error) as caught:
            norm(x, copies=copies, implementation=implementation)
        assert message in str(caught.value)


def test_a_traced_number_of_copies_is_refused():
    with pytest.raises(TypeError, match="copies must be None or an int known at trace time"):
        jax.jit(lambda x, copies: rms_norm(x, copies=copies))(jnp.ones((2, 4)), 2)
