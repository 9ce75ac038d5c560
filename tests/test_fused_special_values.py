"""NaN and infinities in what is fused with the norm: as the reference has them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import DTYPES, draw
from compare import assert_same_kind

from jax_rmsnorm import add_rms_norm, rms_norm_rope

LENGTH, HEADS = 12, 2
# Quiet and signalling NaNs of float32, one without a bit among bfloat16's; the carry of a rounding would make the
# second a negative zero.
NANS = np.array([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def draw_special(seed: int, shape, dtype) -> jax.Array:
    """Mostly numbers; every third row has a NaN, every third an infinity, where the seed puts it."""
    values = np.array(draw(seed, shape, dtype))
    rows = values.reshape(-1, shape[-1])
    columns = np.random.default_rng(seed).integers(0, shape[-1], len(rows))
    for row, column in enumerate(columns):
        if row % 3 == 0:
            nan = NANS[row // 3 % len(NANS)]
            rows[row, column] = nan if dtype == jnp.float32 else np.nan
        elif row % 3 == 1:
            rows[row, column] = np.inf if row % 2 else -np.inf
    return jnp.asarray(values)


def assert_same_kinds(f, *operands, cotangents) -> list[np.ndarray]:
    """Results and gradients of the kernels against those of plain JAX, which it returns."""
    results = {}
    for implementation in ("kernel", "xla"):
        y, vjp = jax.vjp(functools.partial(f, implementation=implementation), *operands)
        results[implementation] = jax.tree.leaves((y, vjp(cotangents)))
    wide = [oracle.to64(e) for e in results["xla"]]
    assert any(np.isnan(e).any() for e in wide)
    for actual, expected in zip(results["kernel"], wide, strict=True):
        assert_same_kind(actual, expected)
    return wide


@dtypes
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("where", ["x", "residual", "dh"])
@pytest.mark.parametrize("hidden", [37, 128])
def test_add_rms_norm(where, hidden, other, dtype):
    shape = (LENGTH, hidden)
    kinds = {"x": other, "residual": dtype, "dh": dtype}
    x, residual, dh = (
        (draw_special if name == where else draw)(seed, shape, kind)
        for seed, (name, kind) in enumerate(kinds.items())
    )
    gamma, dy = draw(3, hidden, jnp.float32), draw(4, shape, dtype)
    norm = functools.partial(add_rms_norm, dtype=dtype)
    expected = assert_same_kinds(norm, x, residual, gamma, cotangents=(dy, dh))
    assert any(np.isinf(e).any() for e in expected)


@dtypes
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("where", ["x", "cos", "sin", "dy"])
@pytest.mark.parametrize(
    ("hidden", "width", "interleaved"),
    [(37, 26, False), (37, 26, True), (128, 128, False), (128, 64, True)],
)
def test_rms_norm_rope(where, hidden, width, interleaved, other, dtype):
    shape = (LENGTH, HEADS, hidden)
    table = (LENGTH, width // 2)
    operands = {
        "x": (shape, dtype),
        "cos": (table, other),
        "sin": (table, other),
        "dy": (shape, dtype),
    }
    x, cos, sin, dy = (
        (draw_special if name == where else draw)(seed, *operand)
        for seed, (name, operand) in enumerate(operands.items())
    )

    def norm(x, gamma, **options):
        return rms_norm_rope(x, gamma, cos, sin, interleaved=interleaved, **options)

    expected = assert_same_kinds(norm, x, draw(4, hidden, jnp.float32), cotangents=dy)
    assert where == "x" or any(np.isinf(e).any() for e in expected)  # x: inf · 0
