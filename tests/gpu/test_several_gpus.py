"""The operations on arrays that are sharded over the GPUs of this machine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import draw
from compiled import collectives, kernels
from jax.sharding import AxisType
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

from jax_rmsnorm import add_rms_norm

GPUS = jax.device_count()
pytestmark = pytest.mark.skipif(GPUS not in (2, 4, 8), reason="needs 2, 4 or 8 GPUs")
BF16, F32 = jnp.bfloat16, jnp.float32
SHAPE = (8, 96, 1024)
X, DY, DH = (draw(seed, SHAPE, BF16) for seed in (0, 1, 2))
RESIDUAL, GAMMA = draw(3, SHAPE, F32), draw(4, (1024,), BF16, offset=1.0)
HEADS = (8, 64, 16, 128)
Q, DQ = draw(5, HEADS, BF16), draw(6, HEADS, BF16)
COS, SIN, GAMMA_Q = (
    draw(7, (64, 64), F32),
    draw(8, (64, 64), F32),
    draw(9, (128,), BF16, offset=1.0),
)
SPECS = [["devices"], [None, "devices"], [None, None, "devices"]]
LAYOUTS = pytest.mark.parametrize("spec", SPECS, ids=str)


def make_mesh(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((GPUS,), ("devices",), (axis_type,))


def assert_program(compiled, spec, names) -> None:
    """Kernels on shards and one sum of dgamma, or with the normalized axis sharded a number a row each way."""
    if len(spec) == 3:
        assert collectives(compiled) == {"all-reduce f32[8,96]": 2}
    else:
        assert collectives(compiled) == {"all-reduce f32[1024]": 1}
        shard = f"{8 // GPUS},96,1024" if len(spec) == 1 else f"8,{96 // GPUS},1024"
        assert kernels(compiled) == {f"{name}[{shard}]": 1 for name in names}


def assert_added(gamma, y, h, dx, dresidual, dgamma) -> None:
    h_want, want = oracle.add_rms_norm(X, RESIDUAL, gamma, DY, DH)
    np.testing.assert_array_equal(np.asarray(h), h_want)
    oracle.assert_close(y, want.y, what="y")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    assert_gradients(dresidual, dgamma, want)


@AXIS_TYPES
@LAYOUTS
def test_rms_norm(spec, axis_type):
    mesh = make_mesh(axis_type)
    operands = put(mesh, X, *spec), put(mesh, GAMMA, *spec[2:]), put(mesh, DY, *spec)
    compiled = compile_on(mesh, norm_gradients, *operands)
    assert_program(compiled, spec, ("forward bf16", "backward bf16"))
    y, dx, dgamma = compiled(*operands)
    want = oracle.rms_norm(X, GAMMA, DY)
    oracle.assert_close(y, want.y, what="y")
    assert_gradients(dx, dgamma, want)


@AXIS_TYPES
@LAYOUTS
def test_add_rms_norm(spec, axis_type):
    mesh = make_mesh(axis_type)
    x, residual, dy, dh = (put(mesh, a, *spec) for a in (X, RESIDUAL, DY, DH))
    operands = x, residual, put(mesh, GAMMA, *spec[2:]), dy, dh
    compiled = compile_on(mesh, add_gradients, *operands)
    assert_program(compiled, spec, ("add_forward bf16", "add_backward f32"))
    assert_added(GAMMA, *compiled(*operands))


@AXIS_TYPES
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_rms_norm_rope(dimension, axis_type):
    mesh = make_mesh(axis_type)
    spec = [None] * dimension + ["devices"]
    whole = (put(mesh, array) for array in (GAMMA_Q, COS, SIN))
    operands = put(mesh, Q, *spec), *whole, put(mesh, DQ, *spec)
    compiled = compile_on(mesh, rope_gradients, *operands)
    assert collectives(compiled) == {"all-reduce f32[128]": 1}
    y, dx, dgamma = compiled(*operands)
    want = oracle.rms_norm_rope(Q, GAMMA_Q, COS, SIN, DQ)
    oracle.assert_close(y, want.y, terms=want.y_terms, what="y")
    assert_gradients(dx, dgamma, want)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_within_shard_map(spec, check_vma):
    mesh = make_mesh(AxisType.Auto)
    rows, whole = P(*spec), P()

    def sharded(f, specs, results):
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=results, check_vma=check_vma)

    def run(x, residual, gamma, dy, dh):
        norm = sharded(add_rms_norm, (rows, rows, whole), (rows, rows))
        (y, h), vjp = jax.vjp(norm, x, residual, gamma)
        return y, h, *vjp((dy, dh.astype(h.dtype)))

    gamma = GAMMA.astype(F32)  # whose gradients JAX adds up over devices in its own dtype here
    operands = [put(mesh, a, *spec) for a in (X, RESIDUAL)] + [put(mesh, gamma)]
    operands += [put(mesh, a, *spec) for a in (DY, DH)]
    compiled = compile_on(mesh, run, *operands)
    assert sum(kernels(compiled).values()) == 2
    assert all(name.startswith("all-reduce") for name in collectives(compiled))
    assert_added(gamma, *compiled(*operands))
