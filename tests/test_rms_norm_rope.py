"""rms_norm_rope: values and gradients against float64, broadcasting of cos and sin, transforms, arguments."""

from __future__ import annotations

import functools
import re

import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from batching import BATCH, batched, combinations, loop
from checks import DTYPES, check_rope_call, draw, needs_8_devices
from compare import assert_near, assert_same_bits, in_float64
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

import jax_rmsnorm
from jax_rmsnorm import rms_norm_rope

F32, BF16 = jnp.float32, jnp.bfloat16
LENGTH, HEADS, HIDDEN, HALF = 5, 2, 14, 6
dtypes = st.sampled_from(DTYPES)


def gradients(x, gamma, cos, sin, dy, **options):
    """y, and the gradients of x, gamma, cos and sin."""
    norm = functools.partial(rms_norm_rope, implementation="kernel", **options)
    y, vjp = jax.vjp(norm, x, gamma, cos, sin)
    return y, *vjp(dy)


def operands(lead=(), dtype=F32):
    x = (*lead, LENGTH, HEADS, HIDDEN)
    shapes = [x, (HIDDEN,), (LENGTH, HALF), (LENGTH, HALF), x]
    return [draw(seed, shape, dtype) for seed, shape in enumerate(shapes)]


def calls(f, *arguments, platform="cpu") -> list[str]:
    text = jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"custom_call @jax_rmsnorm_(\w+)", text)


@st.composite
def shapes(draw):
    """Of x, and of cos and sin that broadcast against it."""
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    length, heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    half = draw(st.integers(1, 70))
    rest = draw(st.one_of(st.just(0), st.integers(0, 40)))
    kept = lead[draw(st.integers(0, len(lead))) :]
    shared = [draw(st.sampled_from([1, size])) for size in kept]
    return (*lead, length, heads, 2 * half + rest), (*shared, length, half)


@settings(max_examples=30)
@given(
    shapes=shapes(),
    x_dtype=dtypes,
    table_dtype=dtypes,
    gamma_dtype=st.one_of(st.none(), dtypes),
    y_dtype=dtypes,
    interleaved=st.booleans(),
    rounding=st.sampled_from(["once", "before_gamma"]),
    zero_centered_gamma=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_matches_float64(
    shapes, x_dtype, table_dtype, gamma_dtype, y_dtype, zero_centered_gamma, **options
):
    options["zero_centered_gamma"] = zero_centered_gamma and gamma_dtype is not None
    check_rope_call(*shapes, x_dtype, table_dtype, gamma_dtype, y_dtype, **options)


@pytest.mark.parametrize("implementation", ["kernel", "xla"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "half"), [((2, 500, 3, 128), 64), ((70, 8, 96), 16), ((1, 2, 1, 5000), 2000)], ids=str
)
def test_heads_of_models(shape, half, interleaved, implementation):
    options = {"interleaved": interleaved, "implementation": implementation}
    check_rope_call(shape, (shape[-3], half), BF16, F32, BF16, BF16, **options)


def test_a_rotation_by_angles():
    """Lengths of heads stay, and the product of a query and a key depends on how far apart they are."""
    angles = np.outer(np.arange(6), 10000.0 ** (-np.arange(4) / 4))
    cos, sin = (jnp.asarray(f(angles), F32) for f in (np.cos, np.sin))
    x = jnp.broadcast_to(draw(0, (8,), F32), (6, 1, 8))
    for interleaved in (False, True):
        y = rms_norm_rope(x, None, cos, sin, interleaved=interleaved, implementation="kernel")
        products = np.asarray(y[:, 0] @ y[:, 0].T)
        np.testing.assert_allclose(np.diag(products), 8, rtol=1e-4)
        np.testing.assert_allclose(products[2, 1], products[5, 4], rtol=1e-4)
        assert abs(products[1, 0] - products[5, 0]) > 0.01
    assert_same_bits(y[0], jax_rmsnorm.rms_norm(x[0]))


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (3, 0, 2, 8), (3, 5, 0, 8)], ids=str)
def test_zero_rows(shape):
    x, gamma, table = jnp.ones(shape), jnp.ones(8), jnp.ones((shape[1], 4))
    y, dx, dgamma, dcos, _ = jax.jit(gradients)(x, gamma, table, table, x)
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(dgamma, np.zeros(8))
    np.testing.assert_array_equal(dcos, np.zeros(table.shape))


def table_reads(lead, table_lead) -> list[str]:
    """Shapes of the tables as the CPU's forward kernel gets them, which takes everything."""
    x = jnp.ones((*lead, LENGTH, HEADS, HIDDEN))
    table = jnp.ones((*table_lead, LENGTH, HALF))
    traced = jax.jit(lambda x, t: rms_norm_rope(x, None, t, t)).trace(x, table)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    (call,) = [line for line in text.splitlines() if "@jax_rmsnorm_rope_forward" in line]
    return re.findall(r"tensor<([0-9x]+)xf32>", call)[1:3]


@pytest.mark.parametrize(
    ("lead", "table_lead", "read"),
    [
        ((4,), (), "5x6"),
        ((4,), (1,), "5x6"),
        ((4,), (4,), "4x5x6"),
        ((3, 4), (4,), "4x5x6"),
        ((3, 4), (1, 4), "4x5x6"),
        ((3, 4), (1, 1), "5x6"),
        ((3, 4), (3, 1), "3x4x5x6"),
    ],
    ids=str,
)
def test_tables_are_read_as_they_are(lead, table_lead, read):
    """Never once a head, and repeated only between axes of their own."""
    assert table_reads(lead, table_lead) == [read, read]


def test_gradients_of_the_tables_cost_nothing_where_they_are_not_asked_for():
    x, gamma, cos, sin, dy = operands()

    def gradient(argnums):
        return jax.grad(lambda *a: jnp.vdot(dy, rms_norm_rope(*a)), argnums)

    kernels = ["rope_forward", "rope_backward"]
    assert calls(gradient((0, 1)), x, gamma, cos, sin) == kernels
    text = jax.jit(gradient((0, 1))).lower(x, gamma, cos, sin).as_text()
    assert "stablehlo.rsqrt" not in text
    assert "stablehlo.rsqrt" in jax.jit(gradient((2, 3))).lower(x, gamma, cos, sin).as_text()
    assert calls(rms_norm_rope, x, gamma, cos, sin) == kernels[:1]


@pytest.mark.parametrize(
    ("argnums", "asked_for"), [((0,), False), ((0, 1), False), ((2,), True), ((0, 3), True)]
)
def test_gradients_of_the_tables_are_traced_only_where_asked_for(argnums, asked_for):
    """So that an eager backward does not compute them either."""
    x, gamma, cos, sin, dy = operands()
    loss = lambda *a: jnp.vdot(dy, rms_norm_rope(*a))  # noqa: E731
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums))(x, gamma, cos, sin))
    assert ("_table_gradients" in jaxpr) == asked_for


# (batch axes, axes of x in front of its positions): with a second such axis, of one operand or all but one batched
COMBINATIONS = [
    (axes, lead)
    for axes in combinations((0, 1, 0, 1, 2), (3, 1, 2, 1, 2))
    for lead in [(), (2,)]
    if not lead or axes.count(None) in (1, 4)
]


def assert_same_kernels(actual, expected):
    """Of y, dx and dgamma the bits; plain JAX sums the tables' gradients in an order of its own."""
    assert_same_bits(actual[:3], expected[:3])
    assert_near(actual[3:], expected[3:])


def test_eager_calls():
    arrays = operands()
    assert_same_kernels(gradients(*arrays), jax.jit(gradients)(*arrays))


@pytest.mark.parametrize(("axes", "lead"), COMBINATIONS, ids=str)
def test_vmap(axes, lead):
    arrays = batched(operands(lead), axes)
    actual = jax.jit(jax.vmap(gradients, axes))(*arrays)
    assert_same_kernels(actual, loop(jax.jit(gradients), arrays, axes))


@pytest.mark.parametrize(
    "inner", [(0, None, None, None, 0), (0, 0, 0, 0, 0), (None, None, 0, 0, 0)]
)
@pytest.mark.parametrize(
    "outer", [(0, None, None, None, 0), (1, 0, 0, 0, 0), (None, None, 0, 0, 0)]
)
def test_nested_vmap(inner, outer):
    arrays = batched(batched(operands(), inner), outer)
    actual = jax.jit(jax.vmap(jax.vmap(gradients, inner), outer))(*arrays)
    expected = loop(lambda *a: loop(jax.jit(gradients), a, inner), arrays, outer)
    assert_same_kernels(actual, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_second_order(interleaved):
    def derivative(*arguments, implementation):
        *arrays, dy = arguments

        def loss(*arrays):
            y = rms_norm_rope(*arrays, interleaved=interleaved, implementation=implementation)
            return jnp.vdot(dy, jnp.sin(y))

        slopes = jax.grad(loss, (0, 1, 2, 3))
        return jax.grad(lambda *a: sum(jnp.sum(jnp.sin(s)) for s in slopes(*a)), (0, 1, 2, 3))(
            *arrays
        )

    actual = jax.jit(functools.partial(derivative, implementation="kernel"))(*operands())
    assert_near(actual, in_float64(derivative, *operands()), 1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
    x, _, cos, sin, dy = operands((BATCH,))
    gammas = draw(5, (4, HIDDEN), F32)

    def loss(x, gammas, cos, implementation):
        def layer(x, gamma):
            y = rms_norm_rope(x, gamma, cos, sin, implementation=implementation)
            return x + jnp.tanh(y), None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, gammas)
        return jnp.vdot(dy, x)

    def run(implementation):
        f = functools.partial(loss, implementation=implementation)
        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, gammas, cos)

    assert_near(run("kernel"), run("xla"))


@needs_8_devices
@pytest.mark.parametrize("table_lead", [(), (16,)], ids=str)
def test_shard_map(table_lead):
    """The batch is sharded, and with it tables that have a batch axis; JAX sums what all devices share."""
    x, gamma, _, _, dy = operands((16,))
    cos, sin = (draw(seed, (*table_lead, LENGTH, HALF), F32) for seed in (2, 3))

    def loss(x, gamma, cos, sin, dy):
        return jnp.vdot(dy, jnp.sin(rms_norm_rope(x, gamma, cos, sin, implementation="kernel")))

    gradient = jax.grad(loss, (0, 1, 2, 3))
    tables = P("a") if table_lead else P()
    inside = jax.shard_map(
        gradient,
        mesh=jax.make_mesh((8,), ("a",), (jax.sharding.AxisType.Auto,)),
        in_specs=(P("a"), P(), tables, tables, P("a")),
        out_specs=(P("a"), P(), tables, tables),
    )
    expected = jax.jit(gradient)(x, gamma, cos, sin, dy)
    assert_near(jax.jit(inside)(x, gamma, cos, sin, dy), expected)


def test_export_with_symbolic_batch_and_length():
    batch, length = jax.export.symbolic_shape("batch, length")
    x = jax.ShapeDtypeStruct((batch, length, HEADS, HIDDEN), F32)
    table = jax.ShapeDtypeStruct((length, HALF), F32)
    gamma = jax.ShapeDtypeStruct((HIDDEN,), F32)
    exported = jax.export.export(
        jax.jit(gradients), disabled_checks=jax_rmsnorm.DISABLED_EXPORT_CHECKS
    )(x, gamma, table, table, x)
    again = jax.export.deserialize(exported.serialize())
    arrays = operands((4,))
    assert_same_kernels(again.call(*arrays), jax.jit(gradients)(*arrays))


def test_symbolic_heads_take_the_plain_path():
    (heads,) = jax.export.symbolic_shape("heads")
    x = jax.ShapeDtypeStruct((LENGTH, heads, HIDDEN), F32)
    _, gamma, cos, sin, _ = operands()

    def norm(x, implementation=None):
        return rms_norm_rope(x, gamma, cos, sin, implementation=implementation)

    exported = jax.export.export(jax.jit(norm))(x)
    assert "custom_call @jax_rmsnorm" not in exported.mlir_module()
    assert_near(exported.call(operands()[0]), norm(operands()[0]))
    with pytest.raises(NotImplementedError, match="number of heads"):
        jax.export.export(jax.jit(functools.partial(norm, implementation="kernel")))(x)


@pytest.mark.parametrize("width", [64, 60])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowering_by_platform(platform, width):
    """One custom call each way: those of rms_norm where the CUDA kernels do not rotate."""
    x, gamma, table = jnp.ones((3, 2, 66), BF16), jnp.ones(66), jnp.ones((3, width // 2))
    found = calls(gradients_of_x, x, gamma, table, platform=platform)
    cuda = jax_rmsnorm._ffi.CUDA.module
    if platform == "tpu" or (platform == "cuda" and cuda is None):
        assert found == []
    elif platform == "cuda":
        fuses = functools.partial(
            cuda.fuses_rope, hidden=66, width=width, interleaved=False, x="bfloat16"
        )
        prefixes = ["rope_" if fuses(dy=dy) else "" for dy in (None, "bfloat16")]
        assert found == [f"{prefixes[0]}forward", f"{prefixes[1]}backward"]
    else:
        assert found == ["rope_forward", "rope_backward"]


def gradients_of_x(x, gamma, table):
    y, vjp = jax.vjp(lambda x, g: rms_norm_rope(x, g, table, table), x, gamma)
    return vjp(y)


def test_numpy_tables_in_float64():
    x, gamma, cos, sin, dy = (np.asarray(a) for a in operands())
    wide = rms_norm_rope(x, gamma, cos.astype(np.float64), sin.astype(np.float64))
    assert_same_bits(wide, rms_norm_rope(x, gamma, cos, sin))
    with jax.enable_x64(True):
        y = rms_norm_rope(x.astype(np.float64), gamma, cos, sin)
        np.testing.assert_allclose(
            y, oracle.rms_norm_rope(x, gamma, cos, sin, dy).y, rtol=1e-12, atol=1e-13
        )


X, TABLE = np.ones((2, 3, 4, 8), np.float32), np.ones((3, 4), np.float32)


def tables(shape):
    return {"cos": np.ones(shape, np.float32), "sin": np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"cos": TABLE[:2]}, ValueError, ("sin must have the shape", "(2, 4)", "(3, 4)")),
        (
            {"sin": TABLE.astype(np.float16)},
            ValueError,
            ("sin must have", "dtype of cos", "float16"),
        ),
        ({"cos": [1.0]}, TypeError, ("cos must be an array", "list")),
        ({"sin": TABLE.astype(int)}, TypeError, ("sin must be float32", "int")),
        (tables((4,)), ValueError, ("cos and sin must be [..., T, R/2]", "2 to 3 axes", "(4,)")),
        (tables((1, 2, 3, 4)), ValueError, ("2 to 3 axes", "(1, 2, 3, 4)")),
        (tables((4, 4)), ValueError, ("with T", "(4, 4)", "(2, 3, 4, 8)")),
        (tables((1, 4)), ValueError, ("with T", "(1, 4)")),
        (tables((3, 3, 4)), ValueError, ("with T", "(3, 3, 4)")),
        (tables((3, 5)), ValueError, ("from 1 to 4", "got 5")),
        (tables((3, 0)), ValueError, ("from 1 to 4", "got 0")),
        ({"x": X[0, 0]}, ValueError, ("x must be [..., T, N, D]", "(4, 8)")),
        ({"gamma": X[0, 0]}, ValueError, ("last axis alone",)),
        ({"normalized_shape": (4, 8)}, ValueError, ("last axis alone",)),
        ({"interleaved": 1}, TypeError, ("interleaved must be a bool", "1")),
        ({"rounding": "twice"}, ValueError, ("rounding", "twice")),
        (
            {"cos": TABLE.astype(float), "sin": TABLE.astype(float)},
            NotImplementedError,
            ("kernels take", "float64"),
        ),
    ],
    ids=str,
)
def test_errors(arguments, error, parts):
    good = {"x": X, "gamma": None, "cos": TABLE, "sin": TABLE, "implementation": "kernel"}
    with jax.enable_x64(True), pytest.raises(error) as caught:
        rms_norm_rope(**{**good, **arguments})
    for part in parts:
        assert part in str(caught.value)
