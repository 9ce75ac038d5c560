"""add_rms_norm: values and gradients against float64, what it saves, transforms, arguments."""

from __future__ import annotations

import functools
import re

import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from batching import BATCH, batched, combinations, loop
from checks import DTYPES, check_add_call, draw, needs_8_devices
from compare import assert_near, assert_same_bits, in_float64
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

import jax_rmsnorm
from jax_rmsnorm import add_rms_norm

F32, BF16 = jnp.float32, jnp.bfloat16
ROWS, HIDDEN = 4, 21
dtypes = st.sampled_from(DTYPES)


def gradients(x, residual, gamma, dy, dh, **options):
    """y, h, and the gradients of x, residual and gamma."""
    norm = functools.partial(add_rms_norm, implementation="kernel", **options)
    results, vjp = jax.vjp(norm, x, residual, gamma)
    return *results, *vjp((dy, dh))


def operands(rows=(ROWS,), dtype=F32):
    shapes = [(*rows, HIDDEN), (*rows, HIDDEN), (HIDDEN,), (*rows, HIDDEN), (*rows, HIDDEN)]
    return [draw(seed, shape, dtype) for seed, shape in enumerate(shapes)]


def primitives(f, *arguments) -> list[str]:
    return re.findall(r"= rms_norm_(\w+)\[", str(jax.make_jaxpr(f)(*arguments)))


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(1, 9), max_size=3),
    hidden=st.one_of(st.integers(1, 300), st.sampled_from([512, 1000, 1024, 2048, 4100])),
    x_dtype=dtypes,
    residual_dtype=dtypes,
    gamma_dtype=st.one_of(st.none(), dtypes),
    y_dtype=dtypes,
    rounding=st.sampled_from(["once", "before_gamma"]),
    zero_centered_gamma=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_matches_float64(
    rows, hidden, x_dtype, residual_dtype, gamma_dtype, y_dtype, zero_centered_gamma, **options
):
    options["zero_centered_gamma"] = zero_centered_gamma and gamma_dtype is not None
    check_add_call((*rows, hidden), x_dtype, residual_dtype, gamma_dtype, y_dtype, **options)


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
@pytest.mark.parametrize("rounding", ["once", "before_gamma"])
@pytest.mark.parametrize("shape", [(20_001, 24), (2, 70_001)], ids=str)
def test_many_and_long_rows(shape, rounding, implementation):
    check_add_call(shape, BF16, BF16, BF16, BF16, rounding=rounding, implementation=implementation)


@pytest.mark.parametrize("residual_dtype", [F32, BF16])
def test_the_norm_is_that_of_the_rounded_sum(residual_dtype):
    x, residual, gamma, *_ = operands((50,), BF16)
    y, h = add_rms_norm(x, residual.astype(residual_dtype), gamma, implementation="kernel")
    assert (y.dtype, h.dtype) == (BF16, residual_dtype)
    assert_same_bits(y, jax_rmsnorm.rms_norm(h, gamma, dtype=BF16))


def test_eager_calls():
    arrays = operands()
    assert_same_bits(gradients(*arrays), jax.jit(gradients)(*arrays))


def test_zero_rows():
    y, h, dx, _, dgamma = jax.jit(gradients)(*operands((0,)))
    assert y.shape == h.shape == dx.shape == (0, HIDDEN)
    np.testing.assert_array_equal(dgamma, np.zeros(HIDDEN))


def test_only_h_and_the_reciprocal_rms_are_saved():
    x, residual, gamma, *_ = operands()
    (_, h), vjp = jax.vjp(add_rms_norm, x.astype(BF16), residual, gamma)
    saved = {leaf.shape: leaf for leaf in jax.tree.leaves(vjp)}
    assert len(jax.tree.leaves(vjp)) == 3
    assert_same_bits([saved[h.shape], saved[gamma.shape]], [h, gamma])
    rrms = jax.lax.rsqrt(jnp.mean(h * h, -1) + 1e-5)
    assert_near(saved[(ROWS,)], rrms)


def test_a_gradient_that_is_not_asked_for_costs_nothing():
    """Where only one of the results is used, the other's gradient is not a tensor of zeros."""
    x, residual, gamma, dy, dh = operands()

    def gradient(use_y, use_h):
        def loss(*arguments):
            y, h = add_rms_norm(*arguments)
            return (
                use_y * jnp.vdot(dy, y)
                if not use_h
                else (use_h * jnp.vdot(dh, h) + (jnp.vdot(dy, y) if use_y else 0))
            )

        return jax.grad(loss, (0, 1, 2))

    arguments = x, residual, gamma
    assert primitives(gradient(1, 1), *arguments) == ["add_forward", "add_backward"]
    assert primitives(gradient(1, 0), *arguments) == ["add_forward", "backward"]
    assert primitives(gradient(0, 1), *arguments) == ["add_forward"]
    assert_same_bits(gradient(0, 1)(*arguments)[:2], (dh, dh))
    _, _, *expected = gradients(*arguments, dy, jnp.zeros_like(dh))
    assert_same_bits(jax.jit(gradient(1, 0))(*arguments), tuple(expected))
    assert primitives(add_rms_norm, *arguments) == ["add_forward"]


@pytest.mark.parametrize("axes", combinations((0, 1, 0, 1, 0), (2, 1, 1, 1, 0)), ids=str)
def test_vmap(axes):
    arrays = batched(operands(), axes)
    expected = loop(jax.jit(gradients), arrays, axes)
    assert_same_bits(jax.jit(jax.vmap(gradients, axes))(*arrays), expected)


@pytest.mark.parametrize("options", [{}, {"rounding": "before_gamma"}], ids=str)
def test_second_order(options):
    x, residual, gamma, dy, dh = operands()

    def derivative(x, residual, gamma, dy, dh, **more):
        def loss(*arguments):
            y, h = add_rms_norm(*arguments, **options, **more)
            return jnp.vdot(dy, jnp.sin(y)) + jnp.vdot(dh, jnp.cos(h))

        slopes = jax.grad(loss, (0, 1, 2))
        return jax.grad(lambda *a: sum(jnp.sum(jnp.sin(s)) for s in slopes(*a)), (0, 1, 2))(
            x, residual, gamma
        )

    actual = jax.jit(functools.partial(derivative, implementation="kernel"))(
        x, residual, gamma, dy, dh
    )
    assert_near(actual, in_float64(derivative, x, residual, gamma, dy, dh), 1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
    """A residual stream in float32 through layers in bfloat16."""
    x, residual, *_ = operands()
    gammas = draw(5, (6, HIDDEN), F32)

    def loss(x, residual, gammas, implementation):
        def layer(carry, gamma):
            y, h = add_rms_norm(*carry, gamma, implementation=implementation)
            return (jnp.tanh(y), h), None

        layer = jax.checkpoint(layer) if remat else layer
        (y, h), _ = jax.lax.scan(layer, (x, residual), gammas)
        return jnp.sum(y.astype(F32) ** 2) + jnp.sum(h**2)

    def run(x_dtype, implementation):
        f = jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1, 2))
        return jax.jit(f)(x.astype(x_dtype), residual, gammas)

    assert_near(run(F32, "kernel"), run(F32, "xla"))
    assert_near(run(BF16, "kernel"), run(BF16, "xla"), 2e-2)


def test_per_example_gradients():
    x, residual, gamma, dy, dh = operands((BATCH, ROWS))

    def loss(gamma, x, residual, dy, dh):
        y, h = add_rms_norm(x, residual, gamma)
        return jnp.vdot(dy, y) + jnp.vdot(dh, h)

    each = jax.vmap(jax.grad(loss), (None, 0, 0, 0, 0))(gamma, x, residual, dy, dh)
    expected = [
        jax.grad(loss)(gamma, *example) for example in zip(x, residual, dy, dh, strict=True)
    ]
    assert_same_bits(each, jnp.stack(expected))


@needs_8_devices
@pytest.mark.parametrize("use_h", [True, False])
def test_shard_map(use_h):
    """Each device has its rows; JAX sums the gradient of the gamma that all share."""
    x, residual, gamma, dy, dh = operands((16, 2))

    def loss(x, residual, gamma, dy, dh):
        y, h = add_rms_norm(x, residual, gamma, implementation="kernel")
        return jnp.vdot(dy, jnp.sin(y)) + (jnp.vdot(dh, jnp.cos(h)) if use_h else 0)

    gradient = jax.grad(loss, (0, 1, 2))
    rows = P("a")
    mesh = jax.make_mesh((8,), ("a",), (jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(
        gradient, mesh=mesh, in_specs=(rows, rows, P(), rows, rows), out_specs=(rows, rows, P())
    )
    expected = jax.jit(gradient)(x, residual, gamma, dy, dh)
    assert_near(jax.jit(inside)(x, residual, gamma, dy, dh), expected)


@pytest.mark.parametrize("rows", [(ROWS,), (2, 7)], ids=str)
def test_export_with_symbolic_rows(rows):
    symbols = jax.export.symbolic_shape(", ".join("abc"[: len(rows)]))
    shape = (*symbols, HIDDEN)
    arrays = operands(rows)
    types = [jax.ShapeDtypeStruct(shape if a.ndim > 1 else a.shape, a.dtype) for a in arrays]
    exported = jax.export.export(
        jax.jit(gradients), disabled_checks=jax_rmsnorm.DISABLED_EXPORT_CHECKS
    )(*types)
    again = jax.export.deserialize(exported.serialize())
    assert_same_bits(again.call(*arrays), jax.jit(gradients)(*arrays))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("hidden", [64, 21])
def test_lowering_by_platform(platform, hidden):
    """One custom call each way: those of rms_norm where the CUDA kernels do not fuse, as where rows are not aligned."""
    x = jnp.ones((4, hidden), BF16)
    gamma = jnp.ones(hidden)
    f = functools.partial(lambda *a: jax.vjp(add_rms_norm, *a[:3])[1](a[3:]))
    text = jax.jit(f).trace(x, x, gamma, x, x).lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(r"custom_call @(\w+)", text)
    if platform == "tpu" or (platform == "cuda" and jax_rmsnorm._ffi.CUDA.module is None):
        assert calls == []
    elif platform == "cuda" and hidden == 21:
        assert calls == ["jax_rmsnorm_forward", "jax_rmsnorm_backward"]
    else:
        assert calls == ["jax_rmsnorm_add_forward", "jax_rmsnorm_add_backward"]


def test_trailing_axes_and_numpy():
    x, residual = (
        np.random.default_rng(i).standard_normal((5, 4, 6)).astype(np.float32) for i in (0, 1)
    )
    gamma = np.linspace(0.5, 1.5, 24, dtype=np.float32).reshape(4, 6)
    y, h = add_rms_norm(x, residual, gamma)
    np.testing.assert_array_equal(h, x + residual)
    assert_same_bits(y, jax_rmsnorm.rms_norm(h, gamma))
    assert_same_bits(
        add_rms_norm(x, residual, normalized_shape=(4, 6))[0],
        jax_rmsnorm.rms_norm(h, normalized_shape=(4, 6)),
    )


X = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"residual": X[:1]}, ValueError, ("residual must have x's shape (2, 3, 4)", "(1, 3, 4)")),
        ({"residual": X[0]}, ValueError, ("residual must have x's shape", "(3, 4)")),
        ({"residual": None}, TypeError, ("residual must be an array", "NoneType")),
        ({"residual": X.astype(int)}, TypeError, ("residual must be float32", "int64")),
        ({"x": [1.0]}, TypeError, ("x must be an array", "list")),
        ({"gamma": X[0, 0, :3]}, ValueError, ("gamma of shape (3,)", "(2, 3, 4)")),
        ({"eps": -1.0}, ValueError, ("eps", "-1.0")),
        ({"dtype": "int8"}, TypeError, ("dtype must be float32", "int8")),
        ({"residual": X.astype(np.float64)}, NotImplementedError, ("kernels take", "float64")),
    ],
    ids=str,
)
def test_errors(arguments, error, parts):
    good = {"x": X, "residual": X, "implementation": "kernel"}
    with jax.enable_x64(True), pytest.raises(error) as caught:
        add_rms_norm(**{**good, **arguments})
    for part in parts:
        assert part in str(caught.value)
