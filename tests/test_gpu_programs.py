"""Programs for GPUs, compiled without any: what several of them communicate, what becomes of a norm's neighbours."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled import collectives, kernels
from gpu_topology import compile_for, make_mesh, needs_gpu_compiler, shape_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import AXIS_TYPES, add_gradients, norm_gradients, rope_gradients

from jax_rmsnorm import add_rms_norm, rms_norm

pytestmark = needs_gpu_compiler
BF16, F32 = jnp.bfloat16, jnp.float32
SHAPE = (8, 96, 1024)
# (spec of x, spec of gamma, collectives of a forward and a backward on 2 x 2 GPUs, shape of a GPU's shard)
LAYOUTS = pytest.mark.parametrize(
    ("spec", "gamma_spec", "communication", "shard"),
    [
        (["data"], [], {"all-reduce f32[1024]": 1}, "4,96,1024"),
        ([None, ("data", "model")], [], {"all-reduce f32[1024]": 1}, "8,24,1024"),
        (["data", "model"], [], {"all-reduce f32[1024]": 1}, "4,48,1024"),
        ([], [], {}, "8,96,1024"),
        ([None, None, "model"], ["model"], {"all-reduce f32[8,96]": 2}, None),
        (["data", None, "model"], ["model"], {"all-reduce f32[4,96]": 2, "all-reduce f32[512]": 1}, None),
    ],
    ids=str,
)  # fmt: skip


def mesh_of_four(axis_type: AxisType) -> jax.sharding.Mesh:
    return make_mesh(axis_type, data=2, model=2)


@AXIS_TYPES
@LAYOUTS
def test_rms_norm(spec, gamma_spec, communication, shard, axis_type):
    mesh = mesh_of_four(axis_type)
    x, gamma = shape_of(mesh, SHAPE, BF16, *spec), shape_of(mesh, SHAPE[-1:], F32, *gamma_spec)
    compiled = compile_for(mesh, norm_gradients, x, gamma, x)
    assert collectives(compiled) == communication
    names = () if shard is None else ("forward", "backward")
    assert kernels(compiled) == {f"{name} bf16[{shard}]": 1 for name in names}


@AXIS_TYPES
@LAYOUTS
def test_add_rms_norm(spec, gamma_spec, communication, shard, axis_type):
    mesh = mesh_of_four(axis_type)
    x, gamma = shape_of(mesh, SHAPE, BF16, *spec), shape_of(mesh, SHAPE[-1:], F32, *gamma_spec)
    compiled = compile_for(mesh, add_gradients, x, x, gamma, x, x)
    assert collectives(compiled) == communication
    names = () if shard is None else ("add_forward", "add_backward")
    assert kernels(compiled) == {f"{name} bf16[{shard}]": 1 for name in names}


@AXIS_TYPES
@pytest.mark.parametrize(
    ("spec", "shard"),
    [
        (["data", None, "model"], "4,64,8,128"),
        ([None, "data", "model"], "8,32,8,128"),
        (["data", "model"], "4,32,16,128"),
    ],
    ids=str,
)
def test_rms_norm_rope(spec, shard, axis_type):
    mesh = mesh_of_four(axis_type)
    q = shape_of(mesh, (8, 64, 16, 128), BF16, *spec)
    gamma, table = shape_of(mesh, (128,), F32), shape_of(mesh, (64, 64), F32)
    compiled = compile_for(mesh, rope_gradients, q, gamma, table, table, q)
    assert collectives(compiled) == {"all-reduce f32[128]": 1}
    assert kernels(compiled) == {f"rope_{way} bf16[{shard}]": 1 for way in ("forward", "backward")}


def readers_loss(x: jax.Array, gamma: jax.Array, *matrices: jax.Array, copies: int | None) -> Any:
    """Of products with matrices, each of which reads the norm."""
    y = rms_norm(x, gamma, copies=copies)
    ys = (y,) * len(matrices) if copies is None else y
    products = (jnp.sin(y @ matrix) for y, matrix in zip(ys, matrices, strict=True))
    return sum(jnp.sum(jnp.square(product), dtype=F32) for product in products)


@AXIS_TYPES
@pytest.mark.parametrize("in_shard_map", [False, True])
@pytest.mark.parametrize("copies", [None, 3, 6])
def test_sums_over_gpus_are_added_up_first(copies, in_shard_map, axis_type):
    """Each reader has a share of its matrix's columns on each GPU: one all-reduce for all of their gradients."""
    mesh = mesh_of_four(axis_type)
    x, gamma = shape_of(mesh, (8, 96, 1024), BF16, "data"), shape_of(mesh, (1024,), F32)
    matrices = [shape_of(mesh, (1024, 256), BF16, None, "model")] * (copies or 3)
    loss = functools.partial(readers_loss, copies=copies)
    if in_shard_map:
        loss = jax.shard_map(
            lambda *operands: jax.lax.psum(readers_loss(*operands, copies=copies), ("data", "model")),
            mesh=mesh,
            in_specs=(P("data"), P(), *[P(None, "model")] * len(matrices)),
            out_specs=P(),
        )  # fmt: skip
    compiled = compile_for(mesh, jax.grad(loss, (0, 1)), x, gamma, *matrices)
    assert collectives(compiled) == {"all-reduce bf16[4,96,1024]": 1, "all-reduce f32[1024]": 1}


def test_copies_on_one_gpu():
    """The kernel reads the gradient of each, and no pass in front of it adds them up."""
    mesh = make_mesh(AxisType.Auto, data=1)
    x, gamma = shape_of(mesh, (768, 1024), BF16), shape_of(mesh, (1024,), F32)
    matrices = [shape_of(mesh, (1024, 256), BF16)] * 3
    slopes = jax.grad(functools.partial(readers_loss, copies=3), (0, 1))
    text = compile_for(mesh, slopes, x, gamma, *matrices).as_text()
    (operands,) = [
        line.partition("custom-call(")[2].partition(")")[0]
        for line in text.splitlines()
        if 'custom_call_target="jax_rmsnorm_backward"' in line
    ]
    assert operands.count("%") == 6  # x, rrms, three dy, gamma


@pytest.mark.usefixtures("as_measured")
def test_as_plain_jax_an_addition_stays_with_the_product_before_it():
    """Where a call for few elements is no kernel, its program has the same passes as the formula in plain JAX."""

    def ours(x, matrix, residual, gamma):
        return add_rms_norm(x @ matrix, residual, gamma)

    def formula(x, matrix, residual, gamma):
        h = x @ matrix + residual
        wide = h.astype(F32)
        rrms = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
        return (wide * rrms * gamma).astype(h.dtype), h

    mesh = make_mesh(AxisType.Auto, data=1)
    x, matrix = shape_of(mesh, (512, 1024), BF16), shape_of(mesh, (1024, 1024), BF16)
    operands = x, matrix, x, shape_of(mesh, (1024,), F32)
    programs = [compile_for(mesh, f, *operands) for f in (ours, formula)]
    assert kernels(programs[0]) == {}
    passes = [re.findall(r"= (.+?) (?:fusion|custom-call)\(", p.as_text()) for p in programs]
    assert passes[0] == passes[1] != []


def test_overwriting_a_donated_stream():
    """h is copied to a donated residual unless it overwrites it, and layers in a row need a stream less."""
    mesh = make_mesh(AxisType.Auto, data=1)
    x, matrix = shape_of(mesh, (8192, 1024), BF16), shape_of(mesh, (1024, 1024), BF16)
    operands = x, x, shape_of(mesh, (1024,), F32), matrix

    def layers(x, stream, gamma, matrix, *, count, overwrite):
        for _ in range(count):
            y, stream = add_rms_norm(x, stream, gamma, overwrite=overwrite, implementation="kernel")
            x = jax.nn.silu(y @ matrix)
        return stream, x[:1]

    def compiled(count, overwrite):
        f = functools.partial(layers, count=count, overwrite=overwrite)
        return compile_for(mesh, f, *operands, donate_argnums=1)

    def copies(program):
        return len(re.findall(r"= bf16\[8192,1024\]\S* copy\(", program.as_text()))

    assert copies(compiled(1, None)) == 1
    assert copies(compiled(1, "residual")) == 0
    default, overwriting = (compiled(4, overwrite) for overwrite in (None, "residual"))
    assert copies(overwriting) <= copies(default)
    spared = [program.memory_analysis().temp_size_in_bytes for program in (default, overwriting)]
    assert spared[0] - spared[1] >= 8192 * 1024 * 2
