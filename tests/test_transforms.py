"""rms_norm under jit, vmap, scan, map, checkpoint and buffer donation, against plain loops over the same kernel."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batching import BATCH, batched, loop
from checks import draw
from compare import assert_near, assert_same_bits
from jax.ad_checkpoint import checkpoint_name

from jax_rmsnorm import rms_norm

ROWS, HIDDEN = 4, 21
SHAPES = ((ROWS, HIDDEN), (HIDDEN,), (ROWS, HIDDEN))
F32 = jnp.float32


def results(x, gamma, dy, **options):
    """y, dx and dgamma."""
    y, vjp = jax.vjp(lambda x, g: rms_norm(x, g, implementation="kernel", **options), x, gamma)
    return y, *vjp(dy)


def operands(axes: tuple[int | None, ...], dtypes=(F32,) * 3) -> list[jax.Array]:
    """x, gamma and dy, those with an axis with a batch of BATCH there."""
    arrays = []
    for seed, (shape, axis, dtype) in enumerate(zip(SHAPES, axes, dtypes, strict=True)):
        full = shape if axis is None else (*shape[:axis], BATCH, *shape[axis:])
        arrays.append(draw(seed, full, dtype))
    return arrays


COMBINATIONS = [
    axes
    for axes in itertools.product((None, 0, 1, 2), (None, 0, 1), (None, 0, 1))
    if any(a is not None for a in axes)
]


@pytest.mark.parametrize("axes", COMBINATIONS, ids=str)
def test_vmap(axes):
    arrays = operands(axes)
    expected = loop(jax.jit(results), arrays, axes)
    assert_same_bits(jax.jit(jax.vmap(results, axes))(*arrays), expected)


@pytest.mark.parametrize(
    "options", [{}, {"rounding": "before_gamma", "zero_centered_gamma": True}], ids=str
)
def test_vmap_of_mixed_dtypes(options):
    def f(*arrays):
        return results(*arrays, dtype=jnp.float16, **options)

    axes = (1, 0, 2)
    arrays = operands(axes, (jnp.bfloat16, jnp.float32, jnp.float16))
    assert_same_bits(jax.vmap(f, axes)(*arrays), loop(jax.jit(f), arrays, axes))


@pytest.mark.parametrize("axes", [(0, 0), (2, 0), (None, 0), (0, None)], ids=str)
def test_vmap_without_gamma(axes):
    def f(x, dy):
        y, vjp = jax.vjp(rms_norm, x)
        return y, *vjp(dy)

    x, _, dy = operands((axes[0], None, axes[1]))
    assert_same_bits(jax.vmap(f, axes)(x, dy), loop(jax.jit(f), (x, dy), axes))


@pytest.mark.parametrize(
    "inner", [(0, None, 0), (None, 0, 0), (1, 1, 0), (0, None, None), (None, 0, None)], ids=str
)
@pytest.mark.parametrize(
    "outer", [(0, None, 0), (None, 0, 0), (2, 1, 0), (0, None, None), (None, 0, None)], ids=str
)
def test_nested_vmap(inner, outer):
    arrays = batched(operands(inner), outer)
    expected = loop(lambda *a: loop(jax.jit(results), a, inner), arrays, outer)
    assert_same_bits(jax.jit(jax.vmap(jax.vmap(results, inner), outer))(*arrays), expected)


def test_vmap_of_several_axes_and_of_rank_one():
    x, gamma = draw(0, (5, 6, 7), F32), draw(1, (6, 7), F32)
    assert_same_bits(jax.vmap(rms_norm, (0, None))(x, gamma), rms_norm(x, gamma))
    each = jax.vmap(rms_norm)(x[:, 0], draw(2, (5, 7), F32))
    assert_same_bits(
        each, jnp.stack([rms_norm(x[i, 0], draw(2, (5, 7), F32)[i]) for i in range(5)])
    )


def test_per_example_gradients():
    x, gamma, weights = (
        draw(0, (BATCH, ROWS, HIDDEN), F32),
        draw(1, (HIDDEN,), F32),
        draw(2, (ROWS, HIDDEN), F32),
    )

    def loss(gamma, x):
        return jnp.sum(weights * rms_norm(x, gamma))

    each = jax.vmap(jax.grad(loss), (None, 0))(gamma, x)
    assert_same_bits(each, jnp.stack([jax.grad(loss)(gamma, example) for example in x]))
    total = jax.grad(lambda g: jnp.sum(jax.vmap(loss, (None, 0))(g, x)))(gamma)
    assert total.shape == gamma.shape
    assert_near(total, each.sum(0))


def test_jit_is_eager():
    arrays = operands((None, None, None))
    assert_same_bits(jax.jit(results)(*arrays), results(*arrays))


def test_value_and_grad():
    x, gamma, dy = operands((None, None, None))
    value, (dx, dgamma) = jax.jit(
        jax.value_and_grad(lambda x, g: jnp.vdot(dy, rms_norm(x, g)), (0, 1))
    )(x, gamma)
    y, *gradients = results(x, gamma, dy)
    assert_same_bits([dx, dgamma], gradients)
    assert_near(value, np.vdot(dy, y))


def layers(x, gammas, implementation="kernel"):
    for gamma in gammas:
        x = x + rms_norm(jnp.tanh(x), gamma, implementation=implementation)
    return jnp.sum(x * x)


def test_scan_over_layers():
    x, gammas = draw(0, (ROWS, HIDDEN), F32), draw(1, (5, HIDDEN), F32)

    def scanned(x, gammas):
        y, _ = jax.lax.scan(lambda x, g: (x + rms_norm(jnp.tanh(x), g), None), x, gammas)
        return jnp.sum(y * y)

    def run(f):
        return jax.jit(jax.value_and_grad(f, (0, 1)))(x, gammas)

    assert_near(run(scanned), run(lambda x, g: layers(x, g, "xla")))
    assert_near(run(jax.checkpoint(scanned)), run(scanned))


def test_map_and_while_loop():
    x, gamma, _ = operands((0, None, None))
    assert_same_bits(jax.lax.map(lambda row: rms_norm(row, gamma), x), rms_norm(x, gamma))
    assert_same_bits(
        jax.lax.map(lambda row: rms_norm(row, gamma), x, batch_size=2), rms_norm(x, gamma)
    )
    last = jax.lax.fori_loop(0, 3, lambda _, x: rms_norm(x, gamma), x)
    assert_same_bits(last, rms_norm(rms_norm(rms_norm(x, gamma), gamma), gamma))


@pytest.mark.parametrize("predicate", [True, False])
def test_cond(predicate):
    x, gamma, dy = operands((None, None, None))

    def f(x, gamma):
        return jax.lax.cond(predicate, rms_norm, lambda x, g: 2 * rms_norm(x, g), x, gamma)

    _, vjp = jax.vjp(f, x, gamma)
    _, *expected = results(x, gamma, dy if predicate else 2 * dy)
    assert_same_bits(vjp(dy), tuple(expected))


POLICIES = jax.checkpoint_policies


@pytest.mark.parametrize(
    ("policy", "forwards"),
    [
        (None, 2),
        (POLICIES.nothing_saveable, 2),
        (POLICIES.everything_saveable, 1),
        (POLICIES.save_only_these_names("normalized"), 2),
        (POLICIES.checkpoint_dots, 2),
    ],
)
def test_checkpoint(policy, forwards):
    x, gamma, dy = operands((None, None, None))

    def block(x, gamma):
        y = checkpoint_name(rms_norm(x, gamma), "normalized")
        return jnp.vdot(dy, jnp.sin(y))

    plain = jax.jit(jax.value_and_grad(block, (0, 1)))
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(block, policy=policy), (0, 1)))
    assert_same_bits(remat(x, gamma), plain(x, gamma))
    assert remat.lower(x, gamma).as_text().count("@jax_rmsnorm_forward") == forwards


def test_donation():
    x, gamma, _ = operands((None, None, None))
    expected = rms_norm(x, gamma)
    donated = jnp.array(x)
    y = jax.jit(rms_norm, donate_argnums=0)(donated, gamma)
    assert donated.is_deleted()
    assert_same_bits(y, expected)


def test_disable_jit():
    x, gamma = draw(0, (3, 16), jnp.float32), draw(1, 16, jnp.float32)
    want = jax.grad(lambda x: jnp.sum(rms_norm(x, gamma) ** 2))(x)
    with jax.disable_jit():
        got = jax.grad(lambda x: jnp.sum(rms_norm(x, gamma) ** 2))(x)
    np.testing.assert_array_equal(got, want)
