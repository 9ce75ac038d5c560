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


def cases(places: tuple[str, ...], layouts: tuple) -> list[tuple]:
    """Every place with every two dtypes, in layouts by turns, so that each meets each place and each dtype."""
    return [
        (place, dtype, other, layouts[(i + j + k) % len(layouts)])
        for i, place in enumerate(places)
        for j, dtype in enumerate(DTYPES)
        for k, other in enumerate(DTYPES)
    ]


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


def assert_same_kinds(gradients, *operands) -> list[np.ndarray]:
    """What the kernels return against what plain JAX does, which it returns."""

    @jax.jit
    def run(*operands):
        return [gradients(*operands, implementation=name) for name in ("kernel", "xla")]

    kernel, plain = run(*operands)
    wide = [oracle.to64(e) for e in plain]
    assert any(np.isnan(e).any() for e in wide)
    for actual, expected in zip(kernel, wide, strict=True):
        assert_same_kind(actual, expected)
    return wide


@pytest.mark.parametrize(
    ("where", "dtype", "other", "hidden"), cases(("x", "residual", "dh"), (37, 128))
)
def test_add_rms_norm(where, dtype, other, hidden):
    shape = (LENGTH, hidden)
    kinds = {"x": other, "residual": dtype, "dh": dtype}
    x, residual, dh = (
        (draw_special if name == where else draw)(seed, shape, kind)
        for seed, (name, kind) in enumerate(kinds.items())
    )
    gamma, dy = draw(3, hidden, jnp.float32), draw(4, shape, dtype)

    def gradients(x, residual, gamma, dy, dh, implementation):
        norm = functools.partial(add_rms_norm, dtype=dtype, implementation=implementation)
        results, vjp = jax.vjp(norm, x, residual, gamma)
        return *results, *vjp((dy, dh))

    expected = assert_same_kinds(gradients, x, residual, gamma, dy, dh)
    assert any(np.isinf(e).any() for e in expected)


LAYOUTS = ((37, 26, False), (37, 26, True), (128, 128, False), (128, 64, True))


@pytest.mark.parametrize(
    ("where", "dtype", "other", "layout"), cases(("x", "cos", "sin", "dy"), LAYOUTS)
)
def test_rms_norm_rope(where, dtype, other, layout):
    hidden, width, interleaved = layout
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

    def gradients(x, gamma, cos, sin, dy, implementation):
        options = {"interleaved": interleaved, "implementation": implementation}
        y, vjp = jax.vjp(lambda x, g: rms_norm_rope(x, g, cos, sin, **options), x, gamma)
        return y, *vjp(dy)

    gamma = draw(4, hidden, jnp.float32)
    expected = assert_same_kinds(gradients, x, gamma, cos, sin, dy)
    assert where == "x" or any(np.isinf(e).any() for e in expected)  # x: inf · 0


@pytest.mark.parametrize("what", ["cos", "rrms"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_an_infinity_of_the_only_row(what, interleaved):
    """Threads for which there is no row have nothing to do with its angle or reciprocal RMS."""
    hidden = 128
    shapes = ((1, 1, hidden), (hidden,), (1, hidden // 2), (1, hidden // 2), (1, 1, hidden))
    x, gamma, cos, sin, dy = (draw(i, shape, jnp.float32) for i, shape in enumerate(shapes))
    if what == "cos":
        cos = cos.at[0, 0].set(jnp.inf)
    else:
        x *= 1e-30  # whose squares are zero

    def dgamma(x, gamma, cos, sin, dy, implementation):
        options = {"interleaved": interleaved, "implementation": implementation, "eps": 0.0}
        return jax.vjp(lambda g: rms_norm_rope(x, g, cos, sin, **options), gamma)[1](dy)[0]

    kernel, plain = (
        jax.jit(functools.partial(dgamma, implementation=name))(x, gamma, cos, sin, dy)
        for name in ("kernel", "xla")
    )
    assert np.isinf(plain).any()
    assert not np.isnan(plain).any()
    assert_same_kind(kernel, plain)
