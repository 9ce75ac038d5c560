"""The operations on sharded arrays under `jax.jit`: values, gradients, and what the compiled program communicates."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import draw, needs_8_devices
from compare import assert_same_bits
from compiled import collectives, kernels
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import (
    AXIS_TYPES,
    add_gradients,
    assert_gradients,
    compile_on,
    norm_gradients,
    put,
    rope_gradients,
)

from jax_rmsnorm import DISABLED_EXPORT_CHECKS, rms_norm

pytestmark = needs_8_devices
BF16, F32 = jnp.bfloat16, jnp.float32
SHAPE = (8, 16, 64)
X, DY, DH = (draw(seed, SHAPE, BF16) for seed in (0, 1, 2))
RESIDUAL = draw(3, SHAPE, F32)
GAMMA = draw(4, (64,), BF16, offset=1.0)
HEADS = (4, 8, 6, 16)
Q, DQ = draw(5, HEADS, BF16), draw(6, HEADS, BF16)
COS, SIN = draw(7, (8, 8), F32), draw(8, (8, 8), F32)
GAMMA_Q = draw(9, (16,), BF16, offset=1.0)


def make_mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)


# (spec of x, spec of gamma, collectives of rms_norm's forward and backward, shape of a device's shard)
LAYOUTS = pytest.mark.parametrize(
    ("spec", "gamma_spec", "communication", "shard"),
    [
        (["data"], [], {"all-reduce f32[64]": 1}, "2,16,64"),
        ([None, ("data", "model")], [], {"all-reduce f32[64]": 1}, "8,2,64"),
        (["data", "model"], [], {"all-reduce f32[64]": 1}, "2,8,64"),
        ([], [], {}, "8,16,64"),
        ([None, None, "model"], ["model"], {"all-reduce f32[8,16]": 2}, None),
        (["data", None, "model"], ["model"], {"all-reduce f32[2,16]": 2, "all-reduce f32[32]": 1}, None),
    ],
    ids=str,
)  # fmt: skip


@AXIS_TYPES
@LAYOUTS
def test_rms_norm(spec, gamma_spec, communication, shard, axis_type):
    mesh = make_mesh(axis_type)
    operands = put(mesh, X, *spec), put(mesh, GAMMA, *gamma_spec), put(mesh, DY, *spec)
    compiled = compile_on(mesh, norm_gradients, *operands)
    assert collectives(compiled) == communication
    names = () if shard is None else ("forward", "backward")
    assert kernels(compiled) == {f"{name} bf16[{shard}]": 1 for name in names}
    y, dx, dgamma = compiled(*operands)
    for array, like in ((y, operands[0]), (dx, operands[0]), (dgamma, operands[1])):
        assert array.sharding.is_equivalent_to(like.sharding, array.ndim)
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)


@AXIS_TYPES
@LAYOUTS
def test_add_rms_norm(spec, gamma_spec, communication, shard, axis_type):
    mesh = make_mesh(axis_type)
    x, residual, dy, dh = (put(mesh, a, *spec) for a in (X, RESIDUAL, DY, DH))
    operands = x, residual, put(mesh, GAMMA, *gamma_spec), dy, dh
    compiled = compile_on(mesh, add_gradients, *operands)
    assert collectives(compiled) == communication
    if shard is not None:
        wanted = {f"add_forward bf16[{shard}]": 1, f"add_backward f32[{shard}]": 1}
        assert kernels(compiled) == wanted
    y, h, dx, dresidual, dgamma = compiled(*operands)
    h_want, want = oracle.add_rms_norm(X, RESIDUAL, GAMMA, DY, DH)
    np.testing.assert_array_equal(np.asarray(h), h_want)
    oracle.assert_close(y, want.y, what="y")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    assert_gradients(dresidual, dgamma, want)


@AXIS_TYPES
@pytest.mark.parametrize(
    ("spec", "communication", "shard"),
    [
        (["data", None, "model"], {"all-reduce f32[16]": 1}, "1,8,3,16"),
        ([None, "data", "model"], {"all-reduce f32[16]": 1}, "4,2,3,16"),
        (["data", "model"], {"all-reduce f32[16]": 1}, "1,4,6,16"),
    ],
    ids=str,
)
def test_rms_norm_rope(spec, communication, shard, axis_type):
    """Batch, sequence or heads sharded; each device takes the positions that it needs of whole tables."""
    mesh = make_mesh(axis_type)
    whole = (put(mesh, array) for array in (GAMMA_Q, COS, SIN))
    operands = put(mesh, Q, *spec), *whole, put(mesh, DQ, *spec)
    compiled = compile_on(mesh, rope_gradients, *operands)
    assert collectives(compiled) == communication
    wanted = {f"rope_forward bf16[{shard}]": 1, f"rope_backward bf16[{shard}]": 1}
    assert kernels(compiled) == wanted
    y, dx, dgamma = compiled(*operands)
    want = oracle.rms_norm_rope(Q, GAMMA_Q, COS, SIN, DQ)
    oracle.assert_close(y, want.y, terms=want.y_terms, what="y")
    assert_gradients(dx, dgamma, want)


def test_rope_with_sharded_head_size():
    """A head is rotated whole: it is gathered, and the values are right."""
    mesh = make_mesh()
    operands = (
        *(put(mesh, Q, "data", None, None, "model"), put(mesh, GAMMA_Q, "model")),
        *(put(mesh, table, None, "model") for table in (COS, SIN)),
        put(mesh, DQ, "data", None, None, "model"),
    )
    y, dx, dgamma = compile_on(mesh, rope_gradients, *operands)(*operands)
    want = oracle.rms_norm_rope(Q, GAMMA_Q, COS, SIN, DQ)
    oracle.assert_close(y, want.y, terms=want.y_terms, what="y")
    assert_gradients(dx, dgamma, want)


@AXIS_TYPES
def test_sharded_gamma_leaves_activations_alone(axis_type):
    """As of weights that are kept in parts: gamma is gathered, and no activation moves."""
    mesh = make_mesh(axis_type)
    operands = put(mesh, X, "data"), put(mesh, GAMMA, "model"), put(mesh, DY, "data")
    compiled = compile_on(mesh, norm_gradients, *operands)
    moved = {"all-gather bf16[64]", "all-gather f32[64]", "all-reduce f32[64]"}
    assert set(collectives(compiled)) <= moved
    y, dx, dgamma = compiled(*operands)
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)


@AXIS_TYPES
def test_no_communication_without_gradient_of_gamma(axis_type):
    mesh = make_mesh(axis_type)
    operands = put(mesh, X, "data"), put(mesh, GAMMA), put(mesh, DY, "data")

    def dx(x, gamma, dy):
        _, vjp = jax.vjp(lambda x: rms_norm(x, gamma), x)
        return vjp(dy)

    compiled = compile_on(mesh, dx, *operands)
    assert not collectives(compiled)
    assert_same_bits(compiled(*operands), norm_gradients(X, GAMMA, DY)[1:2])


def test_dgamma_is_added_up_in_float32():
    """And rounded once: rounded to bfloat16 first, each of five devices' 1 + 7 · 2⁻¹¹ would be 1, and the sum 5."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    dy = jnp.where(jnp.arange(16) < 10, jnp.tile(jnp.array([1.0, 7 * 2.0**-11]), 8), 0.0)
    dy = jnp.broadcast_to(dy[:, None], (16, 4)).astype(BF16)
    operands = put(mesh, jnp.ones((16, 4), BF16), "data"), put(mesh, jnp.ones(4, BF16))
    gradients = jax.jit(functools.partial(norm_gradients, eps=0.0))
    _, _, dgamma = gradients(*operands, put(mesh, dy, "data"))
    np.testing.assert_array_equal(np.asarray(dgamma, np.float32), 5 + 2.0**-5)


def test_eagerly():
    mesh = make_mesh()
    y, dx, dgamma = norm_gradients(put(mesh, X, "data"), put(mesh, GAMMA), put(mesh, DY, "data"))
    assert y.sharding.spec == dx.sharding.spec == P("data")
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)


def test_numpy_operands():
    mesh = make_mesh()
    shardings = [NamedSharding(mesh, P(*spec)) for spec in (["data"], [], ["data"])]
    operands = [np.asarray(a) for a in (X, GAMMA, DY)]
    compiled = jax.jit(norm_gradients, in_shardings=shardings).lower(*operands).compile()
    assert collectives(compiled) == {"all-reduce f32[64]": 1}
    y, dx, dgamma = compiled(*operands)
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)


def test_rows_in_unequal_parts():
    """Six examples over four devices: no kernel call for parts of unequal size, but the right values."""
    mesh = make_mesh()
    sharding = NamedSharding(mesh, P("data"))

    def gradients(x, gamma, dy):
        x, dy = (jax.lax.with_sharding_constraint(a[:6], sharding) for a in (x, dy))
        return norm_gradients(x, gamma, dy)

    y, dx, dgamma = jax.jit(gradients)(X, GAMMA, DY)
    want = oracle.rms_norm(X[:6], GAMMA, DY[:6])
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)


def test_a_mesh_axis_split_by_a_reshape():
    """Eight devices' features become two heads of four parts each, which no mesh axis names: gathered, and right."""
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    gamma, dy = draw(10, (32,), BF16, offset=1.0), DY.reshape(8, 16, 2, 32)

    def gradients(x, gamma, dy):
        return norm_gradients(x.reshape(8, 16, 2, 32), gamma, dy)

    operands = put(mesh, X, None, None, "model"), put(mesh, gamma), put(mesh, dy)
    y, dx, dgamma = compile_on(mesh, gradients, *operands)(*operands)
    want = oracle.rms_norm(X.reshape(8, 16, 2, 32), gamma, dy)
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)


@AXIS_TYPES
def test_scan_and_remat(axis_type):
    """Layers in a scan, computed again in the backward."""
    mesh = make_mesh(axis_type)

    def loss(x, gammas):
        layer = jax.checkpoint(lambda x, gamma: (rms_norm(x, gamma), None))
        y, _ = jax.lax.scan(layer, x, gammas)
        return jnp.sum(y.astype(F32) ** 3)

    gammas = jnp.stack([GAMMA, 2 * GAMMA, -GAMMA])
    operands = put(mesh, X, "data"), put(mesh, gammas)
    compiled = compile_on(mesh, jax.grad(loss, (0, 1)), *operands)
    assert collectives(compiled) == {"all-reduce f32[64]": 1}  # in the loop's body
    dx, dgammas = compiled(*operands)
    dx_want, dgammas_want = jax.jit(jax.grad(loss, (0, 1)))(X, gammas)
    assert_same_bits([dx], [dx_want])
    scale = jnp.max(jnp.abs(dgammas_want), axis=-1, keepdims=True).astype(F32)
    assert float(jnp.min(scale)) > 0
    assert float(
        jnp.max(jnp.abs((dgammas - dgammas_want).astype(F32)) / scale)
    ) < 2 * oracle.unit_roundoff(BF16)


@pytest.mark.parametrize("spmd_axis_name", [None, "data"])
def test_vmap(spmd_axis_name):
    """Per-example gradients of gamma: the batch is sharded, each device has its examples', and none are added up."""
    mesh = make_mesh()
    gradients = jax.vmap(norm_gradients, (0, None, 0), spmd_axis_name=spmd_axis_name)
    operands = put(mesh, X, "data"), put(mesh, GAMMA), put(mesh, DY, "data")
    compiled = compile_on(mesh, gradients, *operands)
    assert not collectives(compiled)
    assert kernels(compiled) == {"forward bf16[2,16,64]": 1, "backward bf16[2,16,64]": 1}
    assert_same_bits(compiled(*operands), jax.jit(gradients)(X, GAMMA, DY))


def test_second_order():
    mesh = make_mesh()

    def curvature(x, gamma):
        slope = jax.grad(lambda x: jnp.sum(rms_norm(x, gamma) ** 3))
        return jax.grad(lambda x: jnp.sum(slope(x) ** 2))(x)

    x, gamma = X.astype(F32), GAMMA.astype(F32)
    want = jax.jit(curvature)(x, gamma)
    got = jax.jit(curvature)(put(mesh, x, "data"), put(mesh, gamma))
    scale = float(jnp.max(jnp.abs(want)))
    assert scale > 0
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)


def test_shard_map_over_some_axes():
    """XLA splits plain JAX over the axes that are left to it."""
    mesh = make_mesh()
    specs = P(None, "model"), P(), P(None, "model")
    gradients = jax.shard_map(
        lambda *a: norm_gradients(*a)[:2],
        mesh=mesh,
        in_specs=specs,
        out_specs=specs[0],
        axis_names={"model"},
    )
    operands = put(mesh, X, "data", "model"), put(mesh, GAMMA), put(mesh, DY, "data", "model")
    compiled = compile_on(mesh, gradients, *operands)
    assert not collectives(compiled)
    y, dx = compiled(*operands)
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")


@AXIS_TYPES
@pytest.mark.parametrize("sizes", [(8, 1), (1, 1)], ids=str)
def test_shard_map_over_all_axes_of_several_devices(sizes, axis_type):
    """Those of one device may be left to XLA: there is nothing to split."""
    mesh = jax.make_mesh(
        sizes, ("data", "model"), (axis_type,) * 2, devices=jax.devices()[: sizes[0]]
    )
    specs = P("data"), P(), P("data")
    gradients = jax.shard_map(
        lambda *a: norm_gradients(*a)[:2], mesh=mesh, in_specs=specs, out_specs=P("data"), axis_names={"data"}
    )  # fmt: skip
    operands = put(mesh, X, "data"), put(mesh, GAMMA), put(mesh, DY, "data")
    compiled = compile_on(mesh, gradients, *operands)
    assert not collectives(compiled)
    names = "forward", "backward"
    assert kernels(compiled) == {f"{name} bf16[{8 // sizes[0]},16,64]": 1 for name in names}
    assert_same_bits(compiled(*operands), jax.jit(norm_gradients)(X, GAMMA, DY)[:2])


def test_kernel_is_refused_where_there_is_none():
    mesh = make_mesh()
    norm = functools.partial(rms_norm, implementation="kernel")
    on_parts = put(mesh, X, None, None, "model")
    with pytest.raises(Exception, match="normalized axis sharded over model"):
        jax.jit(norm)(on_parts, put(mesh, GAMMA))
    on_rows = put(mesh, X, "data"), put(mesh, GAMMA)
    some = jax.shard_map(
        norm, mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P(None, "model"), axis_names={"model"}
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="shard_map over some axes"):
        jax.jit(some)(*on_rows)
    with pytest.raises(NotImplementedError, match="exported program"):
        jax.export.export(jax.jit(norm), disabled_checks=DISABLED_EXPORT_CHECKS)(*on_rows)


@pytest.mark.parametrize("in_shard_map", [False, True])
def test_export(in_shard_map):
    """Plain JAX, which the process that runs it splits; within shard_map the kernel stays."""
    mesh = make_mesh()
    operands = put(mesh, X, "data"), put(mesh, GAMMA), put(mesh, DY, "data")
    f: Any = lambda *operands: norm_gradients(*operands)[:2]  # noqa: E731
    if in_shard_map:
        rows = P("data")
        f = jax.shard_map(f, mesh=mesh, in_specs=(rows, P(), rows), out_specs=rows)
    exported = jax.export.export(jax.jit(f), disabled_checks=DISABLED_EXPORT_CHECKS)(*operands)
    assert ("@jax_rmsnorm_backward" in exported.mlir_module()) == in_shard_map
    y, dx = jax.jit(jax.export.deserialize(exported.serialize()).call)(*operands)
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")


def test_axes_of_one_device():
    mesh = jax.make_mesh((8, 1), ("data", "model"), (AxisType.Auto,) * 2)
    operands = put(mesh, X, "data", None, "model"), put(mesh, GAMMA, "model"), put(mesh, DY, "data")
    compiled = compile_on(mesh, norm_gradients, *operands)
    assert collectives(compiled) == {"all-reduce f32[64]": 1}
    y, dx, dgamma = compiled(*operands)
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)
