"""Inputs, float64 results and error bounds that the tests of the two Flax modules share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_rmsnorm
from jax_rmsnorm import _flax

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
OPTIONS = ("zero_centered_gamma", "rounding", "sm_margin", "implementation")
EPSILON = 1e-6
H = 48

# (dtype of x, param_dtype, dtype of the module)
DTYPES = [
    (F32, F32, None),
    (F32, F32, BF16),
    (F32, BF16, None),
    (BF16, F32, None),
    (BF16, F32, BF16),
    (BF16, BF16, None),
    (BF16, BF16, F32),
    (BF16, F16, None),
    (F16, F32, F16),
    (F16, F16, None),
]

# (shape of x, arguments of the layer)
COVERED_AXES = [
    ((H,), {}),
    ((2, 3, H), {"reduction_axes": 2, "feature_axes": -1}),
    ((2, 3, H), {"reduction_axes": (-1,), "feature_axes": [2]}),
    ((2, 3, 4, 5), {"reduction_axes": (-2, -1), "feature_axes": (3, 2)}),
    ((2, 3, 5), {"reduction_axes": (0, 1, 2), "feature_axes": (0, 1, 2)}),
    ((2, 3, 5), {"reduction_axes": (-2, -1), "use_scale": False}),
]


class Results(NamedTuple):
    """What a layer and its gradient return, or the magnitudes that errors of these scale with."""

    y: Any
    dx: Any
    dscale: Any


def draw_input(shape: tuple[int, ...], dtype: Any = F32, seed: int = 0) -> jax.Array:
    """Rows of very different size: a mean over the wrong axis cannot pass."""
    rng = np.random.default_rng(seed)
    rows = np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))
    return jax.device_put((rows * rng.normal(size=shape)).astype(dtype))


def draw_scale(shape: tuple[int, ...], dtype: Any = F32, seed: int = 1) -> jax.Array:
    """Both signs, none near zero."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1, 1, 1], shape) * rng.uniform(0.4, 1.6, shape)
    return jax.device_put(values.astype(dtype))


INPUT = draw_input((2, 3, H))
MASK = np.arange(H) % 3 > 0

# (arguments of the layer, x, mask)
UNCOVERED = {
    "mask": ({}, INPUT, MASK),
    "reduction_axes": ({"reduction_axes": 1}, INPUT, None),
    "no axes": ({"reduction_axes": ()}, INPUT, None),
    "leading axes": ({"reduction_axes": (0, 2)}, INPUT, None),
    "feature_axes": ({"reduction_axes": (1, 2)}, INPUT, None),
    "integers": ({}, jnp.arange(2 * H).reshape(2, H), None),
    "complex": ({}, jax.lax.complex(INPUT, INPUT[::-1]), None),
    "complex scale": ({"param_dtype": jnp.complex64}, INPUT, None),
    "complex result": ({"dtype": jnp.complex64}, INPUT, None),
    "epsilon": ({"epsilon": np.full((2, 1, 1), 0.1, np.float32)}, INPUT, None),
    "empty": ({}, jnp.ones((2, 0)), None),
}
BEYOND_FLAX = [
    {"zero_centered_gamma": True},
    {"rounding": "before_gamma"},
    {"implementation": "kernel"},
]


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of `rms_norm` that a module makes from now on."""
    record: list[dict[str, Any]] = []

    def rms_norm(x: jax.Array, gamma: jax.Array | None, **options: Any) -> jax.Array:
        record.append(options)
        return jax_rmsnorm.rms_norm(x, gamma, **options)

    monkeypatch.setattr(_flax, "rms_norm", rms_norm)
    return record


def results(layer: Callable[..., jax.Array], scale: Any, x: jax.Array) -> Results:
    """``layer(scale, x)`` and its gradients, for a cotangent that depends on the shape alone."""

    @jax.jit
    def run(scale: Any, x: jax.Array) -> Results:
        y, pull_back = jax.vjp(layer, scale, x)
        dscale, dx = pull_back(_cotangent(y.shape).astype(y.dtype))
        return Results(y, dx, dscale)

    return run(scale, x)


def _cotangent(shape: tuple[int, ...]) -> jax.Array:
    """Values that every dtype holds exactly."""
    return jnp.asarray(np.random.default_rng(2).integers(-16, 17, shape) / 8, F32)


def exact(x: Any, scale: Any) -> tuple[Results, Results]:
    """Results in float64 and their magnitudes: the same sums over absolute terms."""
    x = np.asarray(x, np.float64)
    gamma = 1.0 if scale is None else np.asarray(scale, np.float64)
    dy = np.asarray(_cotangent(x.shape), np.float64)
    r = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON)
    n, dn = x * r, dy * gamma
    rows = tuple(range(x.ndim - 1))
    dx = r * (dn - n * np.mean(dn * n, -1, keepdims=True))
    size = r * (abs(dn) + abs(n) * np.mean(abs(dn * n), -1, keepdims=True))
    if scale is None:
        return Results(n, dx, None), Results(abs(n), size, None)
    return (
        Results(n * gamma, dx, np.sum(dy * n, rows)),
        Results(abs(n * gamma), size, np.sum(abs(dy * n), rows)),
    )


def assert_within(actual: Any, expected: Any, magnitude: Any, dtype: Any, units: float) -> None:
    """Elementwise, to ``units`` in the last place of ``dtype`` and the noise of float32 sums."""
    assert np.any(magnitude)
    info = jnp.finfo(dtype)
    relative = units * float(info.eps) + 16 * float(jnp.finfo(F32).eps)
    bound = relative * np.asarray(magnitude, np.float64) + float(info.smallest_subnormal)
    error = abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    worst = np.max(error / bound)
    assert worst <= 1, f"error is {worst:.3g} of the bound"


def assert_same_results(ours: Results, flax: Results, size: Results, coarsest: Any) -> None:
    """Same dtypes; y to one unit in the last place of its dtype, gradients to two of ``coarsest``.

    Flax adds two parts of dx after both were rounded, which is the reason for the second unit.
    """
    for name in Results._fields:
        a, b = getattr(ours, name), getattr(flax, name)
        if b is None:
            assert a is None
            continue
        assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type), name
        units, dtype = (1, b.dtype) if name == "y" else (2, coarsest)
        assert_within(a, b, getattr(size, name), dtype, units)


def assert_near_exact(
    actual: Results, expected: Results, size: Results, result: Any, coarsest: Any
) -> None:
    """y is ``expected`` rounded once, to ``result``; gradients are in a unit of ``coarsest``."""
    assert_within(actual.y, expected.y, size.y, result, 0.5)
    assert_within(actual.dx, expected.dx, size.dx, coarsest, 1)
    if expected.dscale is not None:
        assert_within(actual.dscale, expected.dscale, size.dscale, coarsest, 1)


def assert_trees_close(ours: Any, flax: Any) -> None:
    """The same tree of arrays, float32 values to rounding at each array's largest magnitude."""
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_within(a, b, np.max(abs(np.asarray(b))), F32, 16)


def assert_same_tree(ours: Any, flax: Any) -> None:
    """The same structure, metadata included, and the same values in the same dtypes."""
    assert jax.tree.structure(ours) == jax.tree.structure(flax)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def coarsest(*dtypes: Any) -> Any:
    return max((d for d in dtypes if d is not None), key=lambda d: float(jnp.finfo(d).eps))


def assert_signature_is_superset(ours: Callable[..., Any], flax: Callable[..., Any]) -> None:
    """Flax's parameters in their order, kinds and defaults; then the options, keyword-only."""
    parameters = dict(inspect.signature(ours).parameters)
    options = {name: parameters.pop(name) for name in OPTIONS}
    assert all(option.kind is option.KEYWORD_ONLY for option in options.values())
    assert [option.default for option in options.values()] == [False, "once", None, None]

    expected = inspect.signature(flax).parameters
    assert list(parameters) == list(expected)
    for name, parameter in expected.items():
        assert parameters[name].kind is parameter.kind, name
        if name != "scale_init":  # an object of its own, and the same function
            assert parameters[name].default == parameter.default, name
    arguments = (jax.random.key(0), (3,), BF16)
    assert_same_tree(
        parameters["scale_init"].default(*arguments), expected["scale_init"].default(*arguments)
    )
