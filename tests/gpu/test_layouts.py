"""Values and gradients in every layout of the launch configuration, aligned and not, in mixes of dtypes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import DTYPES, PAIRWISE_DTYPES, check_call, draw

import jax_rmsnorm
from jax_rmsnorm import _ffi

# Each scope, at its first and last length, in the middle, and off by one. Multiples of 8 are aligned.
HIDDEN = (
    *(1, 2, 3, 7, 8, 9, 16, 64, 100, 128, 256, 264, 512, 513, 635, 640, 1000, 1001, 1024),
    *(1032, 2048),
    *(2560, 3001, 4096, 4097, 4100, 5120, 7168, 8191, 8192, 8200, 10_001, 12_288, 16_384, 16_392),
    *(20_001, 32_768, 50_257),
    *(65_536, 65_544, 100_000, 131_072, 131_080, 262_144, 262_152, 524_288, 524_289, 600_000),
)


def test_every_layout_is_among_the_shapes():
    seen = set()
    for rows, hidden, x in itertools.product((5, 1000), HIDDEN, ("float32", "bfloat16")):
        for configure in (_ffi.CUDA.module.forward_config, _ffi.CUDA.module.backward_config):
            for margin in (0, 1):
                alignment = "tensors" if hidden % 8 else "rows"
                config = configure(
                    rows=rows, hidden=hidden, x=x, alignment=alignment, margin=margin
                )
                seen.add((config["method"], config["scope"], config["aligned"]))
    assert seen == {
        *itertools.product(("ring",), ("lanes", "block", "cluster"), (True,)),
        *itertools.product(("ring",), ("block", "cluster"), (False,)),
        *itertools.product(("bulk",), ("lanes", "block", "cluster"), (False,)),
        *itertools.product(("plain",), ("lanes", "block", "loop"), (True, False)),
        ("plain", "cluster", True),
        *itertools.product(("staged",), ("block",), (True, False)),
        *itertools.product(("windows",), ("lanes", "block", "cluster"), (False,)),
        *itertools.product(("few",), ("lanes", "block", "cluster"), (True, False)),
    }


@pytest.mark.parametrize("sm_margin", [0, 1])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden(hidden, dtype, sm_margin):
    """Few rows; with a margin, by the kernels for many."""
    check_call((5, hidden), dtype, dtype, dtype, sm_margin=sm_margin)


@pytest.mark.parametrize("hidden", [96, 101, 1536, 6144, 6145, 40_000, 40_001, 400_000])
@pytest.mark.parametrize("rounding", ["once", "before_gamma"])
@pytest.mark.parametrize("sm_margin", [0, 1])
def test_dtype_mixes(hidden, rounding, sm_margin):
    for x, gamma, y, _ in PAIRWISE_DTYPES:
        check_call((3, hidden), x, gamma, y, rounding=rounding, sm_margin=sm_margin)


@pytest.mark.parametrize("rows", [1, 2, 33, 1000, 4097])
@pytest.mark.parametrize("hidden", [24, 130, 1032, 2048, 5001, 12_288])
def test_rows(rows, hidden):
    check_call((rows, hidden), jnp.bfloat16, jnp.float32, jnp.bfloat16, zero_centered_gamma=True)


@pytest.mark.parametrize(
    ("hidden", "x", "y"),
    [
        (20_001, jnp.bfloat16, jnp.bfloat16),
        (20_002, jnp.float16, jnp.float16),
        (10_001, jnp.float32, jnp.float32),
        (20_001, jnp.bfloat16, jnp.float32),
    ],
)
@pytest.mark.parametrize("rows", [301, 1000])
def test_unaligned_rows_of_clusters(rows, hidden, x, y):
    """Many rows that begin anywhere in a granule of 16 bytes, and whose parts in a block do too."""
    config = _ffi.CUDA.module.backward_config(
        rows=rows, hidden=hidden, x=x.dtype.name, dy=y.dtype.name, alignment="tensors"
    )
    assert (config["method"], config["scope"], config["aligned"]) == ("bulk", "cluster", False)
    check_call((rows, hidden), x, jnp.float32, y)


@pytest.mark.parametrize("hidden", [101, 1001, 4097, 4104, 20_001])
@pytest.mark.parametrize(("x_offset", "dy_offset"), [(8, 8), (56, 0), (0, 56), (24, 40)])
def test_tensors_that_begin_within_a_line(hidden, x_offset, dy_offset):
    """At a multiple of 16 bytes, which is all that XLA asks of an argument, and not of the 128 that it gives itself."""
    torch = pytest.importorskip("torch", reason="PyTorch makes the tensors that begin anywhere")
    shape = (40_000_000 // hidden, hidden)
    x, dy = (draw(i, shape, jnp.bfloat16) for i in (0, 2))
    gamma = draw(1, hidden, jnp.float32)

    def moved(array, offset):
        there = torch.empty(array.size + offset, dtype=torch.bfloat16, device="cuda")[offset:]
        there.copy_(torch.from_dlpack(array).reshape(-1))
        torch.cuda.synchronize()
        return jnp.from_dlpack(there.reshape(shape), copy=False)

    def address(array):
        return array.addressable_data(0).unsafe_buffer_pointer()

    @jax.jit
    def gradients(x, dy):
        norm = functools.partial(jax_rmsnorm.rms_norm, implementation="kernel")
        y, vjp = jax.vjp(norm, x, gamma)
        return y, *vjp(dy)

    moved_x, moved_dy = moved(x, x_offset), moved(dy, dy_offset)
    assert address(moved_x) % 128 == 2 * x_offset
    assert address(moved_dy) % 128 == 2 * dy_offset
    for got, want in zip(gradients(moved_x, moved_dy), gradients(x, dy), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("hidden", [64, 65, 333, 3000, 3001, 20_001, 40_960])
def test_gamma_batched_by_vmap(hidden):
    """Groups of rows with a gamma and a dgamma each: few large ones, and more than there are SMs."""
    for groups, rows in ((3, 200), (300, 2)):
        x, dy = (draw(i, (groups, rows, hidden), jnp.bfloat16) for i in (0, 2))
        gamma = draw(1, (groups, hidden), jnp.float32)
        y, vjp = jax.vjp(jax.vmap(jax_rmsnorm.rms_norm), x, gamma)
        y, dx, dgamma = map(np.asarray, (y, *vjp(dy)))
        for i in range(0, groups, max(1, groups // 7)):
            want = oracle.rms_norm(x[i], gamma[i], dy[i])
            oracle.assert_close(y[i], want.y, what="y")
            oracle.assert_close(dx[i], want.dx, terms=want.dx_terms, what="dx")
            oracle.assert_close(dgamma[i], want.dgamma, terms=want.dgamma_terms, what="dgamma")


@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [
        *itertools.product(
            (
                *(72, 333, 635, 1001, 1023, 1024, 3001, 4096, 4100, 5121, 8191, 8200, 16_384),
                *(17_504, 20_001, 24_576, 40_960, 50_257, 65_536, 130_001),
            ),
            (jnp.bfloat16,),
        ),
        *itertools.product(
            (73, 334, 1001, 2049, 5121, 8192, 16_384, 20_001), (jnp.float32, jnp.float16)
        ),
    ],
)
def test_bits(hidden, dtype):
    """The same bits again; a row's own bits in any batch, with any margin."""
    rows = max(1100, 3 * 2**20 // hidden)  # too many for the kernels of few
    x, dy = (np.asarray(draw(i, (rows, hidden), dtype)) for i in (0, 2))
    gamma = draw(1, hidden, jnp.float32)

    @functools.partial(jax.jit, static_argnames="margin")
    def gradients(x, dy, margin):
        y, vjp = jax.vjp(lambda x, g: jax_rmsnorm.rms_norm(x, g, sm_margin=margin), x, gamma)
        return y, *vjp(dy)

    def run(x, dy, margin=0):
        return tuple(map(np.asarray, gradients(x, dy, margin)))

    y, dx, dgamma = run(x, dy)
    for again, first in zip(run(x, dy), (y, dx, dgamma), strict=True):
        np.testing.assert_array_equal(again, first)
    for rows in (slice(0, 1), slice(5, 21), slice(600, 700)):
        part_y, part_dx, _ = run(x[rows], dy[rows])
        np.testing.assert_array_equal(part_y, y[rows])
        np.testing.assert_array_equal(part_dx, dx[rows])
    margin_y, margin_dx, _ = run(x, dy, margin=100)
    np.testing.assert_array_equal(margin_y, y)
    np.testing.assert_array_equal(margin_dx, dx)


@pytest.mark.parametrize("hidden", [333, 1001, 5001, 20_001])
def test_bits_of_tiny_values(hidden):
    """Squares below the smallest normal number are rounded wherever in its packets a row begins."""
    row = draw(0, hidden, jnp.bfloat16, scale=2.0**-67)
    norm = jax.jit(functools.partial(jax_rmsnorm.rms_norm, eps=0.0))
    for rows in (9, 4 * 2**20 // hidden):  # few, and many
        y = np.asarray(norm(jnp.broadcast_to(row, (rows, hidden)))[:9])
        assert np.isfinite(y.astype(np.float32)).all()
        np.testing.assert_array_equal(y, np.broadcast_to(y[0], y.shape))


def test_offset_pointers():
    """A slice that XLA hands over in place begins where no 16-byte access can."""
    x = draw(0, (64 * 128 + 1,), jnp.bfloat16)

    @jax.jit
    def norm(x):
        return jax_rmsnorm.rms_norm(jax.lax.slice(x, (1,), (64 * 128 + 1,)).reshape(64, 128))

    rows = x[1:].reshape(64, 128)
    want = oracle.rms_norm(rows, None, rows)
    oracle.assert_close(norm(x), want.y, what="y")
    dx = jax.jit(jax.grad(lambda x: jnp.sum(norm(x) * rows, dtype=jnp.float32)))(x)[1:]
    oracle.assert_close(dx.reshape(64, 128), want.dx, terms=want.dx_terms, what="dx")


def test_no_rows():
    x = jnp.zeros((0, 128), jnp.bfloat16)
    y, vjp = jax.vjp(jax_rmsnorm.rms_norm, x, jnp.ones(128))
    dx, dgamma = vjp(y)
    assert y.shape == dx.shape == (0, 128)
    np.testing.assert_array_equal(dgamma, np.zeros(128, np.float32))
