"""Hundreds of megabytes, for which persistent blocks are held back to their share of the memory's bandwidth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import draw
from launches import H200

import jax_rmsnorm
from jax_rmsnorm import _ffi

SHAPES = [  # in each scope, two or three packets a lane or a thread
    (3_000_000, 16, jnp.bfloat16),
    (700_000, 128, jnp.bfloat16),
    (120_000, 768, jnp.bfloat16),
    (40_000, 1024, jnp.float32),
    (20_001, 4096, jnp.bfloat16),
    (5_003, 16_384, jnp.bfloat16),
    (2_000, 36_864, jnp.bfloat16),
    # Rows that are not aligned, one or several for a warp, a block, or a cluster.
    (3_000_001, 17, jnp.bfloat16),
    (700_001, 101, jnp.float16),
    (400_000, 190, jnp.bfloat16),
    (150_001, 513, jnp.bfloat16),
    (80_001, 1001, jnp.float32),
    (60_000, 1023, jnp.bfloat16),
    (20_001, 4097, jnp.bfloat16),
    (16_001, 4100, jnp.bfloat16),
    (13_103, 5121, jnp.float32),
    (9_001, 7001, jnp.bfloat16),
    (1_335, 50_257, jnp.bfloat16),
]


def assert_same_bits(part, whole):
    width = jnp.dtype(part.dtype).itemsize * 8
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=f"uint{width}")
    assert part.shape == whole.shape
    assert bool(jnp.all(bits(part) == bits(whole)))


def large(shape, dtype, seed=0):
    """Two tensors, drawn on the GPU; the first is positive, so that sums over it are not of noise alone."""
    first, second = jax.random.split(jax.random.key(seed))
    return 0.5 + jax.random.uniform(first, shape, dtype), jax.random.normal(second, shape, dtype)


@pytest.mark.parametrize(("rows", "hidden", "dtype"), SHAPES)
def test_backward(rows, hidden, dtype):
    """A row's dx as in a small batch, to the bit; the same dgamma again, and the sum that it should be."""
    alignment = "rows" if hidden * dtype.dtype.itemsize % 16 == 0 else "tensors"
    call = {"rows": rows, "hidden": hidden, "x": dtype.dtype.name, "dy": dtype.dtype.name}
    config = _ffi.CUDA.module.backward_config(**call, alignment=alignment, **H200)
    assert config["turn_ns"] > 0
    x, dy = large((rows, hidden), dtype)
    gamma = draw(1, hidden, jnp.float32)

    @jax.jit
    def gradients(x, dy):
        norm = functools.partial(jax_rmsnorm.rms_norm, implementation="kernel")
        return jax.vjp(norm, x, gamma)[1](dy)

    dx, dgamma = gradients(x, dy)
    for start in (0, rows // 2, rows - 9):
        few = slice(start, start + 9)
        assert_same_bits(gradients(x[few], dy[few])[0], dx[few])
    again = gradients(x, dy)
    assert_same_bits(again[0], dx)
    assert_same_bits(again[1], dgamma)

    @jax.jit
    def want(x, dy):
        x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
        terms = dy * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        return jnp.sum(terms, 0), jnp.sum(jnp.abs(terms), 0)

    total, magnitude = map(np.asarray, want(x, dy))
    assert np.all(np.abs(np.asarray(dgamma) - total) <= 2e-6 * magnitude)


@pytest.mark.parametrize(("rows", "hidden"), [(2_000_000, 64), (40_000, 4096), (4_000, 40_960)])
def test_forward_with_a_margin(rows, hidden):
    config = _ffi.CUDA.module.forward_config(rows=rows, hidden=hidden, margin=8, **H200)
    assert config["turn_ns"] > 0
    x, _ = large((rows, hidden), jnp.bfloat16)
    gamma = draw(1, hidden, jnp.float32)
    norm = jax.jit(jax_rmsnorm.rms_norm, static_argnames=("sm_margin", "implementation"))
    y = norm(x, gamma, sm_margin=8, implementation="kernel")
    assert_same_bits(y, norm(x, gamma, implementation="kernel"))


def test_add_and_rope():
    """The fused backwards: a batch of eight, and its members alone."""
    shape = (8, 4096, 16, 128)
    for fusion in ("add", "rotary"):
        config = _ffi.CUDA.module.backward_config(
            rows=8 * 4096 * 16, hidden=128, fusion=fusion, rotary_width=128, heads=16, **H200
        )
        assert config["turn_ns"] > 0
    x, dy = large(shape, jnp.bfloat16)
    residual, dh = large(shape, jnp.bfloat16, seed=1)
    gamma = draw(1, 128, jnp.float32)
    angles = draw(3, (4096, 64), jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    options = {"implementation": "kernel"}

    @jax.jit
    def add(x, residual, dy, dh):
        norm = functools.partial(jax_rmsnorm.add_rms_norm, **options)
        return jax.vjp(norm, x, residual, gamma)[1]((dy, dh))[0]

    @jax.jit
    def rope(x, dy):
        norm = functools.partial(jax_rmsnorm.rms_norm_rope, cos=cos, sin=sin, **options)
        return jax.vjp(norm, x, gamma)[1](dy)[0]

    added, rotated = add(x, residual, dy, dh), rope(x, dy)
    for i in (0, 5):
        assert_same_bits(add(x[i], residual[i], dy[i], dh[i]), added[i])
        assert_same_bits(rope(x[i], dy[i]), rotated[i])
