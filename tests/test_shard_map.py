"""rms_norm on arrays sharded over rows: within shard_map, and under jit with Auto and Explicit mesh axes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from checks import draw, needs_8_devices
from compare import assert_near, assert_same_bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rmsnorm import rms_norm

F32 = jnp.float32
X, GAMMA, DY = draw(0, (16, 8, 24), F32), draw(1, (24,), F32), draw(2, (16, 8, 24), F32)
pytestmark = needs_8_devices
CHECK = pytest.mark.parametrize("check_vma", [True, False])
# (mesh shape, spec of x)
MESHES = pytest.mark.parametrize(
    ("shape", "spec"),
    [((8,), P("a")), ((4, 2), P("a", "b")), ((4, 2), P("b"))],
    ids=str,
)


def make_mesh(shape: tuple[int, ...], axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("a", "b")[: len(shape)], (axis_type,) * len(shape))


def gradients(f, x, gamma, dy):
    """y, dx and dgamma."""
    y, vjp = jax.vjp(f, x, gamma)
    return y, *vjp(dy)


def loss(x, gamma):
    """With a function after the norm whose own gradient depends on what the norm's type says."""
    y = rms_norm(x, gamma)
    return jnp.sum(jnp.sin(y) * y)


EXPECTED = jax.jit(functools.partial(gradients, rms_norm))(X, GAMMA, DY)
LOSS_GRADIENTS = jax.jit(jax.grad(loss, (0, 1)))(X, GAMMA)


@MESHES
@CHECK
def test_gradient_outside(shape, spec, check_vma):
    norm = jax.shard_map(
        rms_norm, mesh=make_mesh(shape), in_specs=(spec, P()), out_specs=spec, check_vma=check_vma
    )
    y, dx, dgamma = jax.jit(lambda *a: gradients(norm, *a))(X, GAMMA, DY)
    assert_same_bits([y, dx], list(EXPECTED[:2]))
    assert_near(dgamma, EXPECTED[2])


@MESHES
def test_gradient_inside(shape, spec):
    """With check_vma JAX sums the gradient of a replicated gamma, once."""

    @jax.shard_map(mesh=make_mesh(shape), in_specs=(spec, P(), spec), out_specs=(spec, spec, P()))
    def inside(x, gamma, dy):
        return gradients(rms_norm, x, gamma, dy)

    y, dx, dgamma = inside(X, GAMMA, DY)
    assert_same_bits([y, dx], list(EXPECTED[:2]))
    assert_near(dgamma, EXPECTED[2])


@MESHES
def test_gradient_inside_without_check_vma(shape, spec):
    """Without check_vma the sum over devices is the caller's."""
    mesh = make_mesh(shape)

    @jax.shard_map(
        mesh=mesh, in_specs=(spec, P(), spec), out_specs=(spec, spec, P()), check_vma=False
    )
    def inside(x, gamma, dy):
        y, dx, dgamma = gradients(rms_norm, x, gamma, dy)
        return y, dx, jax.lax.psum(dgamma, tuple(spec))

    y, dx, dgamma = inside(X, GAMMA, DY)
    assert_same_bits([y, dx], list(EXPECTED[:2]))
    assert_near(dgamma, EXPECTED[2])


@MESHES
@CHECK
def test_function_after_the_norm(shape, spec, check_vma):
    """The gradient of a sharded loss, taken inside, and taken outside of a loss summed over the devices."""
    mesh = make_mesh(shape)
    if check_vma:
        inside = jax.shard_map(
            jax.grad(loss, (0, 1)), mesh=mesh, in_specs=(spec, P()), out_specs=(spec, P())
        )
        assert_near(jax.jit(inside)(X, GAMMA), LOSS_GRADIENTS)

    @jax.shard_map(mesh=mesh, in_specs=(spec, P()), out_specs=P(), check_vma=check_vma)
    def total(x, gamma):
        return jax.lax.psum(loss(x, gamma), tuple(spec))

    value, gradient = jax.jit(jax.value_and_grad(total, (0, 1)))(X, GAMMA)
    assert_near(value, loss(X, GAMMA))
    assert_near(gradient, LOSS_GRADIENTS)


def test_second_order_inside():
    @jax.shard_map(mesh=make_mesh((8,)), in_specs=(P("a"), P()), out_specs=(P("a"), P()))
    def inside(x, gamma):
        return jax.grad(lambda x, g: jnp.sum(jnp.sin(jax.grad(loss)(x, g))), (0, 1))(x, gamma)

    expected = jax.grad(lambda x, g: jnp.sum(jnp.sin(jax.grad(loss)(x, g))), (0, 1))
    assert_near(jax.jit(inside)(X, GAMMA), jax.jit(expected)(X, GAMMA))


@CHECK
def test_without_gamma(check_vma):
    @jax.shard_map(
        mesh=make_mesh((8,)), in_specs=(P("a"), P("a")), out_specs=P("a"), check_vma=check_vma
    )
    def inside(x, dy):
        _, vjp = jax.vjp(rms_norm, x)
        return vjp(dy)[0]

    assert_same_bits(inside(X, DY), jax.vjp(rms_norm, X)[1](DY)[0])


def test_gamma_of_each_device():
    """Sharded gamma with replicated x: x's gradient is the one that is summed."""
    gammas = draw(3, (8, 24), F32)

    @jax.jit
    def each(x, gamma):
        y, vjp = jax.vjp(rms_norm, x, gamma)
        return y, *vjp(jnp.cos(y))

    @jax.shard_map(mesh=make_mesh((8,)), in_specs=(P(), P("a")), out_specs=(P("a"), P(), P("a")))
    def inside(x, gamma):
        y, dx, dgamma = each(x, gamma[0])
        return y[None], dx, dgamma[None]

    expected = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(each(X, gamma) for gamma in gammas)
    )
    y, dx, dgamma = jax.jit(inside)(X, gammas)
    assert_same_bits(y, expected[0])
    assert_near([dx, dgamma], [expected[1].sum(0), expected[2]])


def test_vmap_inside():
    @jax.shard_map(mesh=make_mesh((8,)), in_specs=(P("a"), P(), P("a")), out_specs=P("a"))
    def inside(x, gamma, dy):
        return jax.vmap(lambda x, dy: gradients(rms_norm, x, gamma, dy)[1])(x, dy)

    assert_same_bits(inside(X, GAMMA, DY), EXPECTED[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@MESHES
def test_jit(shape, spec, axis_type):
    mesh = make_mesh(shape, axis_type)
    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (X, DY))
        gamma = jax.device_put(GAMMA, NamedSharding(mesh, P()))
        y, dx, dgamma = jax.jit(lambda *a: gradients(rms_norm, *a))(x, gamma, dy)
        assert_same_bits([y, dx], list(EXPECTED[:2]))
        assert_near(dgamma, EXPECTED[2])
        assert_near(jax.jit(jax.grad(loss, (0, 1)))(x, gamma), LOSS_GRADIENTS)


@MESHES
def test_result_types_under_explicit_axes(shape, spec):
    mesh = make_mesh(shape, AxisType.Explicit)
    types = []

    @jax.jit
    def f(x, gamma, dy):
        y, dx, dgamma = gradients(rms_norm, x, gamma, dy)
        types.extend(jax.typeof(a) for a in (y, dx, dgamma))
        return y, dx, dgamma

    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (X, DY))
        jax.block_until_ready(f(x, jax.device_put(GAMMA, NamedSharding(mesh, P())), dy))
        assert [t.sharding.spec for t in types] == [jax.typeof(x).sharding.spec] * 2 + [P(None)]
