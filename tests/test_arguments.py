"""Every argument of rms_norm: its defaults, what is accepted, and the error for what is not."""

from __future__ import annotations

import fractions
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_rmsnorm import SMMargin, rms_norm

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
GAMMA = np.linspace(0.5, 1.5, 4, dtype=np.float32)
NAN, INF = float("nan"), float("inf")
NOT_FLOATS = (jnp.int32, jnp.bool_, jnp.complex64, jnp.float8_e4m3fn)

# (arguments, exception, parts of the message: the argument, what was expected, what came)
BAD: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    *(
        ({name: jnp.ones(4, dtype)}, TypeError, (f"{name} must be float32", jnp.dtype(dtype).name))
        for name in ("x", "gamma")
        for dtype in NOT_FLOATS
    ),
    *(
        ({name: value}, TypeError, (f"{name} must be an array", type(value).__name__))
        for name, value in [
            ("x", [1.0, 2.0]),
            ("x", 1.0),
            ("x", None),
            ("x", jax.ShapeDtypeStruct((2, 4), jnp.float32)),
            ("gamma", [1.0] * 4),
            ("gamma", 1.0),
            ("gamma", "ones"),
        ]
    ),
    *(
        (
            {"gamma": np.ones(shape, np.float32)},
            ValueError,
            ("x", f"gamma of shape {shape}", "(2, 3, 4)"),
        )
        for shape in [(), (3,), (0,), (1, 4), (2, 4), (1, 2, 3, 4)]
    ),
    ({"x": X[0, 0, 0]}, ValueError, ("at least one axis", "x of shape ()")),
    ({"x": X[..., :0]}, ValueError, ("normalized axes must have at least one element", "(0,)")),
    ({"x": X[:, :0], "normalized_shape": (0, 4)}, ValueError, ("at least one element", "(0, 4)")),
    *(
        ({"normalized_shape": value}, TypeError, ("normalized_shape must be an int", repr(value)))
        for value in [4.0, True, "4", (3.0, 4), [True], [[3], [4]], {4}, np.ones(2, int)]
    ),
    *(
        ({"normalized_shape": value}, ValueError, (f"normalized_shape={shape}", "(2, 3, 4)"))
        for value, shape in [(3, (3,)), (-1, (-1,)), ([4, 3], (4, 3)), ((1, 2, 3, 4), (1, 2, 3, 4))]
    ),
    ({"normalized_shape": ()}, ValueError, ("at least one axis", "normalized_shape=()")),
    (
        {"gamma": GAMMA, "normalized_shape": (3, 4)},
        ValueError,
        ("gamma must have the shape normalized_shape=(3, 4)", "(4,)"),
    ),
    *(
        ({"eps": value}, ValueError, ("eps must be finite in float32 and 0 or more", repr(value)))
        for value in [-1e-5, NAN, INF, -INF, 1e39, np.float64(-1), 10**400]
    ),
    *(
        ({"eps": value}, TypeError, ("eps must be a number", type(value).__name__))
        for value in [True, np.True_, "1e-5", None, 1j, jnp.float32(1e-5), np.array(1e-5)]
    ),
    *(
        ({"gamma": GAMMA, "zero_centered_gamma": value}, TypeError, ("must be a bool", repr(value)))
        for value in [1, 0.0, None, "yes"]
    ),
    ({"zero_centered_gamma": True}, ValueError, ("zero_centered_gamma", "gamma=None")),
    *(
        ({name: value}, ValueError, (f"{name} must be one of", expected, repr(value)))
        for name, expected in [("rounding", "'before_gamma'"), ("implementation", "'xla'")]
        for value in ["Once", "cuda", "", 1, []]
    ),
    ({"rounding": None}, ValueError, ("rounding must be one of 'once', 'before_gamma', got None",)),
    *(
        ({"dtype": value}, TypeError, ("dtype must be float32, bfloat16, float16", repr(value)))
        for value in [int, bool, complex, jnp.float8_e4m3fn, "nonsense", "", [], 3]
    ),
    *(
        ({"sm_margin": value}, TypeError, ("sm_margin must be an int or an SMMargin", repr(bad)))
        for value, bad in [
            (True, True),
            (1.0, 1.0),
            ("1", "1"),
            ((1, 2, 3), (1, 2, 3)),
            (SMMargin(backward=2.0), 2.0),  # pyright: ignore[reportArgumentType]
            (SMMargin(inference=True), True),
        ]
    ),
    ({"sm_margin": -1}, ValueError, ("sm_margin must be 0 or more", "-1")),
    ({"sm_margin": SMMargin(1, -2)}, ValueError, ("sm_margin must be 0 or more", "backward=-2")),
    (
        {"x": np.ones((2, 4)), "implementation": "kernel", "dtype": jnp.float64},
        NotImplementedError,
        ("implementation='kernel'", "float32, bfloat16 and float16", "got float64"),
    ),
]


def name_of(case: Any) -> str:
    return "-".join(f"{k}={v!r}" for k, v in case.items())[:60] if isinstance(case, dict) else ""


@pytest.mark.parametrize(("arguments", "exception", "parts"), BAD, ids=name_of)
def test_bad_argument(arguments, exception, parts):
    with jax.enable_x64("float64" in parts[-1]), pytest.raises(exception) as caught:
        rms_norm(**{"x": X, **arguments})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("gamma", [None, GAMMA])
def test_errors_come_at_trace_time(gamma):
    struct = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    with pytest.raises(TypeError, match="x must be float32"):
        jax.eval_shape(rms_norm, struct, gamma)
    with pytest.raises(ValueError, match=re.escape("got x of shape (5,)")):
        jax.jit(rms_norm).trace(jax.ShapeDtypeStruct((5,), jnp.float32), GAMMA)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 1e-5), ("sm_margin", 1), ("zero_centered_gamma", True), ("normalized_shape", 4)],
)
def test_traced_option(name, value):
    with pytest.raises(TypeError, match=f"{name} must be"):
        jax.jit(lambda x, option: rms_norm(x, GAMMA, **{name: option}))(X, value)


def expected(x, *axes: int, **options) -> np.ndarray:
    flat = np.reshape(x, (*np.shape(x)[: np.ndim(x) - len(axes)], -1))
    return oracle.rms_norm(flat, None, np.ones_like(flat), **options).y.reshape(np.shape(x))


def test_defaults():
    parameters = inspect.signature(rms_norm).parameters
    assert [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        "x",
        "gamma",
    ]
    x = X * 1e-2  # small, so that eps counts
    y = rms_norm(x)
    assert y.dtype == jnp.float32
    oracle.assert_close(y, expected(x, -1, eps=1e-5))
    np.testing.assert_array_equal(y, rms_norm(x, eps=1e-5, normalized_shape=4, rounding="once"))
    assert np.any(np.asarray(y) != np.asarray(rms_norm(x, eps=1e-6)))


@pytest.mark.parametrize("normalized_shape", [(3, 4), [3, 4], [np.int64(3), 4], X.shape[1:]])
def test_several_axes(normalized_shape):
    gamma = np.random.default_rng(1).uniform(0.5, 1.5, (3, 4)).astype(np.float32)
    want = expected(X, -2, -1)
    oracle.assert_close(rms_norm(X, normalized_shape=normalized_shape), want)
    oracle.assert_close(rms_norm(X, gamma, normalized_shape=normalized_shape), want * gamma)
    dgamma = jax.grad(lambda g: rms_norm(X, g).sum())(gamma)
    oracle.assert_close(dgamma, want.sum(0), terms=np.abs(want).sum(0))


@pytest.mark.parametrize("normalized_shape", [None, 4, np.int32(4), (4,), range(4, 5)])
def test_last_axis(normalized_shape):
    oracle.assert_close(rms_norm(X, normalized_shape=normalized_shape), expected(X, -1))


def test_all_axes_and_rank_one():
    oracle.assert_close(rms_norm(X, normalized_shape=X.shape), expected(X, 0, 1, 2))
    oracle.assert_close(rms_norm(X[0, 0], GAMMA), expected(X[0, 0], 0) * GAMMA)


@pytest.mark.parametrize("eps", [0, 1, np.float16(0.25), np.int32(2), fractions.Fraction(1, 8)])
def test_kinds_of_eps(eps):
    oracle.assert_close(rms_norm(X, eps=eps), expected(X, -1, eps=float(eps)))


@pytest.mark.parametrize("dtype", ["bfloat16", np.float16, jnp.dtype("float32"), float])
def test_kinds_of_dtype(dtype):
    y = rms_norm(X, GAMMA, dtype=dtype)
    assert y.dtype == (jnp.float32 if dtype is float else jnp.dtype(dtype))
    oracle.assert_close(y, expected(X, -1) * GAMMA)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_float64_takes_plain_jax(implementation):
    with jax.enable_x64(True):
        y = rms_norm(X.astype(np.float64), GAMMA, implementation=implementation)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, expected(X.astype(np.float64), -1) * GAMMA, rtol=1e-14)


def test_numpy_scalars_and_float64_without_x64():
    y = rms_norm(X.astype(np.float64), GAMMA.astype(np.float64), zero_centered_gamma=np.True_)
    assert y.dtype == jnp.float32
    oracle.assert_close(y, expected(X, -1) * (1 + GAMMA))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 0, 4)])
@pytest.mark.parametrize("implementation", ["kernel", "xla"])
def test_no_rows(shape, implementation):
    x, gamma = jnp.ones(shape, jnp.bfloat16), jnp.ones(4)
    y, vjp = jax.vjp(lambda x, g: rms_norm(x, g, implementation=implementation), x, gamma)
    dx, dgamma = vjp(y)
    assert (y.shape, y.dtype) == (dx.shape, dx.dtype) == (shape, jnp.bfloat16)
    assert dgamma.dtype == jnp.float32
    np.testing.assert_array_equal(dgamma, np.zeros(4))
    assert rms_norm(x, implementation=implementation).shape == shape
