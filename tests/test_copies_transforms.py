"""``copies=`` under JAX's transformations, and what it compiles to."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import draw, needs_8_devices
from compare import assert_near, assert_same_bits
from jax.sharding import PartitionSpec as P

import jax_rmsnorm
from jax_rmsnorm import add_rms_norm, rms_norm

F32, BF16 = jnp.float32, jnp.bfloat16
ROWS, HIDDEN, BATCH, COPIES = 4, 24, 3, 3
RESIDUAL = pytest.mark.parametrize("residual", [False, True])


def norm(x, residual, gamma, **options):
    """The copies of y, with a residual those and h."""
    if residual is None:
        return rms_norm(x, gamma, copies=COPIES, **options)
    ys, h = add_rms_norm(x, residual, gamma, copies=COPIES, **options)
    return *ys, h


def gradients(x, residual, gamma, *dys, **options):
    """The results and the gradients of x, residual and gamma."""
    results, vjp = jax.vjp(functools.partial(norm, **options), x, residual, gamma)
    return *results, *vjp(tuple(dys[: len(results)]))


def operands(residual: bool, rows=(ROWS,)) -> list[jax.Array | None]:
    """x, residual or None, gamma, and gradients of three copies and of h."""
    shapes = [
        (*rows, HIDDEN),
        (*rows, HIDDEN) if residual else None,
        (HIDDEN,),
        *[(*rows, HIDDEN)] * 4,
    ]
    return [None if shape is None else draw(seed, shape, F32) for seed, shape in enumerate(shapes)]


def primitives(f, *arguments) -> list[str]:
    return re.findall(r"= rms_norm_(\w+)\[", str(jax.make_jaxpr(f)(*arguments)))


def loss(x, residual, gamma, *weights, **options):
    """With functions behind the norm whose own derivatives depend on its results."""
    results = norm(x, residual, gamma, **options)
    return sum(jnp.vdot(w, jnp.sin(y)) for w, y in zip(weights, results, strict=False))


SLOPES = jax.grad(loss, (0, 1, 2))


@RESIDUAL
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_copies_that_are_not_used_cost_nothing(used, residual):
    """Their gradient is known to be zero: it is no operand of the backward."""
    x, r, gamma, *weights = operands(residual)

    def partial_loss(x, r, gamma):
        results = norm(x, r, gamma)
        return sum(jnp.vdot(weights[i], results[i]) for i in used)

    slopes = jax.grad(partial_loss, (0, 1, 2) if residual else (0, 2))
    jaxpr = str(jax.make_jaxpr(slopes)(x, r, gamma))
    assert re.findall(r"= rms_norm_(\w+)\[", jaxpr) == [
        "add_forward" if residual else "forward",
        "backward",
    ]
    assert re.findall(r"gradients=(\d+)", jaxpr) == [str(len(used))]
    dys = [weights[i] if i in used else jnp.zeros_like(x) for i in range(COPIES)]
    *_, want_dx, _, want_dgamma = gradients(x, r, gamma, *dys, jnp.zeros_like(x))
    dx, *_, dgamma = slopes(x, r, gamma)
    assert_near((dx, dgamma), (want_dx, want_dgamma))


def test_h_alone():
    x, r, gamma, *_, dh = operands(True)
    slopes = jax.grad(lambda x, r: jnp.vdot(dh, norm(x, r, gamma)[-1]), (0, 1))
    assert primitives(slopes, x, r) == ["add_forward"]
    assert_same_bits(slopes(x, r), (dh, dh))


@RESIDUAL
@pytest.mark.parametrize(
    "axes",
    [
        axes
        for axes in itertools.product((None, 0), (None, 1), (None, 0), (None, 0))
        if any(axis is not None for axis in axes)
    ],
    ids=str,
)
def test_vmap(axes, residual):
    """Batched or not: x and residual, gamma, the gradients of the first copy, those of the others and of h."""
    x_axis, gamma_axis, dy_axis, others_axis = axes
    full = [x_axis, x_axis if residual else None, gamma_axis, dy_axis, *[others_axis] * 3]
    arrays = [
        a if axis is None or a is None else jnp.stack([a, -2 * a, a * a], axis)
        for a, axis in zip(operands(residual), full, strict=True)
    ]
    examples = [
        [
            a if axis is None or a is None else jnp.take(a, i, axis)
            for a, axis in zip(arrays, full, strict=True)
        ]
        for i in range(BATCH)
    ]
    expected = jax.tree.map(lambda *a: jnp.stack(a), *(gradients(*e) for e in examples))
    assert_same_bits(jax.jit(jax.vmap(gradients, tuple(full)))(*arrays), expected)


@RESIDUAL
@pytest.mark.parametrize("copies", [3, 6])
def test_second_order(residual, copies):
    x, r, gamma, *weights = operands(residual)

    def derivative(x, r, gamma, *weights, **options):
        def inner(x, r, gamma):
            if r is None:
                ys = rms_norm(x, gamma, copies=copies, **options)
            else:
                ys, _ = add_rms_norm(x, r, gamma, copies=copies, **options)
            return sum(
                jnp.vdot(w, jnp.sin(y * y))
                for w, y in zip(itertools.cycle(weights), ys, strict=False)
            )

        slopes = jax.grad(inner, (0, 2))
        return jax.grad(lambda *a: sum(jnp.sum(jnp.sin(s)) for s in slopes(*a)), (0, 2))(
            x, r, gamma
        )

    arguments = (x, r, gamma, *weights)
    actual = jax.jit(functools.partial(derivative, implementation="kernel"))(*arguments)
    with jax.enable_x64(True):
        wide = [None if a is None else np.asarray(a, np.float64) for a in arguments]
        expected = jax.tree.map(np.asarray, derivative(*wide, implementation="xla"))
    assert_near(actual, expected, 1e-4)


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
    x, r, gamma, *weights = operands(residual)
    arguments = (x, r, gamma, *weights)
    argnums = (0, 1, 2) if residual else (0, 2)
    plain = jax.jit(jax.value_and_grad(loss, argnums))
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums))
    assert_same_bits(remat(*arguments), plain(*arguments))
    forward = "@jax_rmsnorm_add_forward" if residual else "@jax_rmsnorm_forward"
    assert remat.lower(*arguments).as_text().count(forward) == 2


@needs_8_devices
@RESIDUAL
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, jit, residual):
    """Each device has its rows; the gradient of the shared gamma is summed over them, inside and from outside."""
    x, r, gamma, *weights = operands(residual, (16, 2))
    arguments = (x, r, gamma, *weights)
    mesh = jax.make_mesh((8,), ("a",), (jax.sharding.AxisType.Auto,))
    rows, maybe_rows = P("a"), P("a") if residual else None
    specs = (rows, maybe_rows, P(), *[rows] * 4)
    wrap = jax.jit if jit else lambda f: f
    expected = jax.grad(loss, (0, 1, 2) if residual else (0, 2))(*arguments)

    total = jax.shard_map(
        lambda *a: jax.lax.psum(loss(*a), "a"),
        mesh=mesh,
        in_specs=specs,
        out_specs=P(),
        check_vma=check_vma,
    )
    slopes = jax.grad(total, (0, 1, 2) if residual else (0, 2))
    assert_near(wrap(total)(*arguments), loss(*arguments))
    assert_near(wrap(slopes)(*arguments), expected)
    if check_vma:
        inside = jax.shard_map(
            jax.grad(loss, (0, 1, 2) if residual else (0, 2)),
            mesh=mesh,
            in_specs=specs,
            out_specs=(rows, rows, P()) if residual else (rows, P()),
        )
        assert_near(wrap(inside)(*arguments), expected)


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

    def f(x, gamma, dy):
        if residual:
            (_, h), vjp = jax.vjp(functools.partial(add_rms_norm, copies=copies), x, x, gamma)
            return vjp(((dy,) * copies, h))
        _, vjp = jax.vjp(functools.partial(rms_norm, copies=copies), x, gamma)
        return vjp((dy,) * copies)

    text = jax.jit(f).trace(x, gamma, x).lower(lowering_platforms=(platform,)).as_text()
    backwards = re.findall(r"custom_call @jax_rmsnorm_(?:add_)?backward\((.*?)\) \{(.*)", text)
    cuda = jax_rmsnorm._ffi.CUDA.module is not None
    if platform == "tpu" or (platform == "cuda" and not cuda):
        assert "custom_call" not in text
        return
    (forward,) = re.findall(r"custom_call @jax_rmsnorm_(\w*)forward", text)
    ((backward_operands, rest),) = backwards
    fused = platform == "cpu" or hidden == 64
    assert forward == ("add_" if residual and fused else "")
    reads = copies if fused and copies <= 4 else 1
    beside = 4 if residual and fused else 3  # x, rrms, gamma, and dh where it is fused
    assert len(backward_operands.split(",")) == reads + beside
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
    (backward,) = [
        line
        for line in with_copies.splitlines()
        if 'custom_call_target="jax_rmsnorm_add_backward"' in line
    ]
    inside = re.search(r"custom-call\((.*?)\), custom_call_target", backward)
    assert inside is not None
    assert len(re.findall(r"%", inside.group(1))) == 7  # h, rrms, dh, three dy, gamma
