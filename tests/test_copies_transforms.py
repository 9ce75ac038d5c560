"""``copies=`` under JAX's transformations, and what it compiles to."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest
from batching import batched, combinations, loop
from checks import draw, needs_8_devices
from compare import assert_near, assert_same_bits, in_float64
from jax.sharding import PartitionSpec as P
from sharded import AXIS_TYPES

import jax_rmsnorm
from jax_rmsnorm import add_rms_norm, rms_norm

F32, BF16 = jnp.float32, jnp.bfloat16
ROWS, HIDDEN, COPIES = 4, 24, 3
RESIDUAL = pytest.mark.parametrize("residual", [False, True])


def operands(residual: bool, rows=(ROWS,)) -> list[jax.Array]:
    """Of the norm: x, residual if there is to be one, and gamma. Then a tensor for each result: three copies, and h."""
    full = (*rows, HIDDEN)
    shapes = [*[full] * (1 + residual), (HIDDEN,), *[full] * (COPIES + residual)]
    return [draw(seed, shape, F32) for seed, shape in enumerate(shapes)]


def argnums(residual: bool) -> tuple[int, ...]:
    """Of the norm's operands."""
    return tuple(range(2 + residual))


def norm(*arrays, copies=COPIES, **options) -> tuple[jax.Array, ...]:
    """The copies of y; and with a residual h."""
    if len(arrays) == 2:
        return rms_norm(*arrays, copies=copies, **options)
    ys, h = add_rms_norm(*arrays, copies=copies, **options)
    return *ys, h


def split(arrays):
    """`operands` as those of the norm, and those for its results."""
    return arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]


def gradients(*arrays):
    """The results, and the gradients of the norm's operands."""
    primals, dys = split(arrays)
    results, vjp = jax.vjp(norm, *primals)
    return *results, *vjp(tuple(dys))


def loss(*arrays, **options):
    """With functions behind the norm whose own derivatives depend on its results."""
    primals, weights = split(arrays)
    results = norm(*primals, **options)
    return sum(
        jnp.vdot(w, jnp.sin(y * y)) for w, y in zip(itertools.cycle(weights), results, strict=False)
    )


@RESIDUAL
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_copies_that_are_not_used_cost_nothing(used, residual):
    """Their gradient is known to be zero: it is no operand of the backward."""
    arrays = operands(residual)
    primals, weights = split(arrays)

    def partial_loss(*primals):
        results = norm(*primals)
        return sum(jnp.vdot(weights[i], results[i]) for i in used)

    slopes = jax.grad(partial_loss, argnums(residual))
    jaxpr = str(jax.make_jaxpr(slopes)(*primals))
    forward = "add_forward" if residual else "forward"
    assert re.findall(r"= rms_norm_(\w+)\[", jaxpr) == [forward, "backward"]
    assert re.findall(r"gradients=(\d+)", jaxpr) == [str(len(used))]
    dys = [w if i in used else jnp.zeros_like(w) for i, w in enumerate(weights)]
    expected = gradients(*primals, *dys)[-len(primals) :]
    assert_near(slopes(*primals), expected)


def test_h_alone():
    *primals, gamma, _, _, _, dh = operands(True)
    slopes = jax.grad(lambda *summands: jnp.vdot(dh, norm(*summands, gamma)[-1]), (0, 1))
    jaxpr = str(jax.make_jaxpr(slopes)(*primals))
    assert re.findall(r"= rms_norm_(\w+)\[", jaxpr) == ["add_forward"]
    assert_same_bits(slopes(*primals), (dh, dh))


@RESIDUAL
@pytest.mark.parametrize("axes", combinations((0, 1, 0, 2), (2, 0, 1, 0)), ids=str)
def test_vmap(axes, residual):
    """Axes of x and residual, of gamma, of the first copy's gradient, and of the other results'."""
    x, gamma, first, others = axes
    full = [*[x] * (1 + residual), gamma, first, *[others] * (COPIES - 1 + residual)]
    arrays = batched(operands(residual), full)
    expected = loop(jax.jit(gradients), arrays, full)
    assert_same_bits(jax.jit(jax.vmap(gradients, full))(*arrays), expected)


@RESIDUAL
@pytest.mark.parametrize("copies", [3, 6])
def test_second_order(residual, copies):
    def derivative(*arrays, **options):
        slopes = jax.grad(functools.partial(loss, copies=copies, **options), argnums(residual))
        return jax.grad(lambda *a: sum(jnp.sum(jnp.sin(s)) for s in slopes(*a)), argnums(residual))(
            *arrays
        )

    arrays = operands(residual)
    actual = jax.jit(functools.partial(derivative, implementation="kernel"))(*arrays)
    assert_near(actual, in_float64(derivative, *arrays), 1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
    """A residual stream in float32 through layers in bfloat16, each with three readers."""
    x, residual = draw(0, (ROWS, HIDDEN), F32), draw(1, (ROWS, HIDDEN), F32)
    gammas = draw(5, (6, HIDDEN), F32)

    def total(x, residual, gammas, implementation):
        def layer(carry, gamma):
            (a, b, c), h = add_rms_norm(*carry, gamma, copies=3, implementation=implementation)
            return (jnp.tanh(a) * jax.nn.sigmoid(b) + c, h), None

        layer = jax.checkpoint(layer) if remat else layer
        (y, h), _ = jax.lax.scan(layer, (x, residual), gammas)
        return jnp.sum(y.astype(F32) ** 2) + jnp.sum(h**2)

    def run(x_dtype, implementation):
        f = functools.partial(total, implementation=implementation)
        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x.astype(x_dtype), residual, gammas)

    assert_near(run(F32, "kernel"), run(F32, "xla"))
    assert_near(run(BF16, "kernel"), run(BF16, "xla"), 2e-2)


@RESIDUAL
def test_checkpoint_computes_all_copies_at_once(residual):
    arrays = operands(residual)
    plain = jax.jit(jax.value_and_grad(loss, argnums(residual)))
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums(residual)))
    assert_same_bits(remat(*arrays), plain(*arrays))
    forward = "@jax_rmsnorm_add_forward" if residual else "@jax_rmsnorm_forward"
    assert remat.lower(*arrays).as_text().count(forward) == 2


@needs_8_devices
@pytest.mark.parametrize(
    ("check_vma", "jit", "residual"),
    [(True, True, False), (True, True, True), (False, True, True), (True, False, True)],
)
def test_shard_map(check_vma, jit, residual):
    """Each device has its rows; the gradient of the shared gamma is summed over them, inside and from outside."""
    arrays = operands(residual, (16, 2))
    rows = P("a")
    slope_specs = (*[rows] * (1 + residual), P())
    shard_map = functools.partial(
        jax.shard_map,
        mesh=jax.make_mesh((8,), ("a",), (jax.sharding.AxisType.Auto,)),
        in_specs=(*slope_specs, *[rows] * (COPIES + residual)),
        check_vma=check_vma,
    )
    wrap = jax.jit if jit else lambda f: f
    slopes = jax.grad(loss, argnums(residual))
    expected = jax.jit(slopes)(*arrays)

    total = shard_map(lambda *a: jax.lax.psum(loss(*a), "a"), out_specs=P())
    assert_near(wrap(total)(*arrays), loss(*arrays))
    assert_near(wrap(jax.grad(total, argnums(residual)))(*arrays), expected)
    if check_vma:
        assert_near(wrap(shard_map(slopes, out_specs=slope_specs))(*arrays), expected)


@needs_8_devices
@RESIDUAL
@pytest.mark.parametrize("copies", [3, 6])
@pytest.mark.parametrize("in_shard_map", [False, True])
@AXIS_TYPES
def test_several_devices(axis_type, in_shard_map, copies, residual):
    """Each gradient may be a sum over devices: they are added up in front of the kernel, as without copies."""
    mesh = jax.make_mesh((8,), ("a",), (axis_type,))
    x, res, dy = (draw(seed, (16, 2, HIDDEN), BF16) for seed in range(3))
    primals = (*(x, res)[: 1 + residual], draw(3, (HIDDEN,), F32))
    specs = (*[P("a")] * (1 + residual), P())

    def pull_back(*primals, dy, copies):
        _, vjp = jax.vjp(lambda *p: norm(*p, copies=copies or 1)[: copies or 1], *primals)
        (dx, *_) = vjp((dy,) * (copies or 1))
        return dx

    def on_mesh(*arrays):
        f = functools.partial(pull_back, copies=copies)
        run = lambda *arrays: f(*arrays[:-1], dy=arrays[-1])  # noqa: E731
        if in_shard_map:
            run = jax.shard_map(run, mesh=mesh, in_specs=(*specs, P("a")), out_specs=P("a"))
        return run(*arrays)

    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(a, P(*s)) for a, s in zip((*primals, dy), (*specs, P("a")), strict=True)
        ]
        compiled = jax.jit(on_mesh).lower(*arrays).compile()
    (reads,) = re.findall(
        r'custom-call\((.*?)\), custom_call_target="jax_rmsnorm_backward"', compiled.as_text()
    )
    assert reads.count("%") == 4  # x, rrms, dy, gamma
    rounded = functools.reduce(lambda a, b: a + b, [dy] * copies)
    expected = jax.jit(functools.partial(pull_back, copies=None))(*primals, dy=rounded)
    assert_same_bits([compiled(*arrays)], [expected])


@RESIDUAL
def test_export(residual):
    arrays = operands(residual)
    exported = jax.export.export(
        jax.jit(gradients), disabled_checks=jax_rmsnorm.DISABLED_EXPORT_CHECKS
    )(*arrays)
    again = jax.export.deserialize(exported.serialize())
    assert_same_bits(again.call(*arrays), jax.jit(gradients)(*arrays))


@RESIDUAL
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(("hidden", "copies"), [(64, 3), (21, 3), (64, 6)])
def test_lowering_by_platform(platform, hidden, copies, residual):
    """One custom call each way with all gradients; where a kernel cannot add them up, with the one float32 sum."""
    x, gamma = jnp.ones((4, hidden), BF16), jnp.ones(hidden)
    primals = (x, x, gamma) if residual else (x, gamma)

    def pull_back(*primals):
        results, vjp = jax.vjp(functools.partial(norm, copies=copies), *primals)
        return vjp(results)

    traced = jax.jit(pull_back).trace(*primals)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    if platform == "tpu" or (platform == "cuda" and jax_rmsnorm._ffi.CUDA.module is None):
        assert "custom_call" not in text
        return
    fused = platform == "cpu" or hidden == 64
    name = "add_" if residual and fused else ""
    assert re.findall(r"custom_call @jax_rmsnorm_(\w*)forward", text) == [name]
    ((called, read, rest),) = re.findall(
        r"custom_call @jax_rmsnorm_(\w*)backward\((.*?)\) (.*)", text
    )
    reads = copies if fused and copies <= 4 else 1
    beside = 4 if residual and fused else 3  # x, rrms, gamma, and dh where it is fused
    assert called == name
    assert len(read.split(",")) == reads + beside
    assert f"gradients = {reads} : i64" in rest
    read_types, _ = rest.split("->")
    assert (f"tensor<4x{hidden}xf32>" in read_types) == (reads == 1)


def test_gradients_of_products_go_straight_to_the_kernel():
    """In the compiled program no pass adds up what comes back from the readers of y: the custom call reads it all."""
    rows, hidden = 48, 64
    x, residual = draw(0, (rows, hidden), F32), draw(1, (rows, hidden), F32)
    gamma = draw(2, (hidden,), F32)
    matrices = [draw(3 + i, (hidden, width), F32) for i, width in enumerate((32, 16, 16))]

    def total(x, residual, gamma, *matrices, copies):
        y, h = add_rms_norm(x, residual, gamma, copies=copies)
        ys = y if copies else (y,) * len(matrices)
        products = [jnp.sin(y @ matrix) for y, matrix in zip(ys, matrices, strict=True)]
        return sum(jnp.sum(p * p) for p in products) + jnp.sum(h**3)

    def compiled(copies) -> str:
        f = jax.grad(functools.partial(total, copies=copies), (0, 1, 2))
        return jax.jit(f).lower(x, residual, gamma, *matrices).compile().as_text()

    def additions(text: str) -> list[str]:
        return re.findall(rf"= f32\[{rows},{hidden}\]\S* add\(.*", text)

    with_copies, without = compiled(3), compiled(None)
    assert len(additions(without)) >= 2, "what this test looks for must be seen where it is"
    assert additions(with_copies) == []
    assert with_copies.count('custom_call_target="jax_rmsnorm_add_forward"') == 1
    (backward,) = re.findall(
        r'custom-call\((.*?)\), custom_call_target="jax_rmsnorm_add_backward"', with_copies
    )
    assert backward.count("%") == 7  # h, rrms, dh, three dy, gamma
