"""The fused operations on the GPU: every layout of their kernels, in mixes of dtypes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import DTYPES, PAIRWISE_DTYPES, check_add_call, check_rope_call, draw

import jax_rmsnorm
from jax_rmsnorm import _ffi

# The first and last lengths of each scope and method, aligned; and two that are not.
HIDDEN = (8, 16, 64, 72, 128, 512, 520, 1024, 4096, 8192, 8200, 16_384, 16_392, 65_536, 131_072)
UNALIGNED = (100, 4097)


@pytest.mark.parametrize("sm_margin", [0, 1])
@pytest.mark.parametrize("hidden", [*HIDDEN, *UNALIGNED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add(hidden, dtype, sm_margin):
    """Few rows; with a margin, by the backward kernels for many."""
    check_add_call((5, hidden), dtype, dtype, dtype, dtype, sm_margin=sm_margin)


@pytest.mark.parametrize("hidden", [96, 1536, 12_288, 40_000])
@pytest.mark.parametrize("rounding", ["once", "before_gamma"])
@pytest.mark.parametrize("sm_margin", [0, 1])
def test_dtype_mixes_of_add(hidden, rounding, sm_margin):
    for x, gamma, y, residual in PAIRWISE_DTYPES:
        options = {"rounding": rounding, "sm_margin": sm_margin}
        check_add_call((3, hidden), x, residual, gamma, y, **options)


@pytest.mark.parametrize("rows", [1, 33, 1000, 4097])
@pytest.mark.parametrize("hidden", [24, 1032, 2048, 20_480])
def test_rows_of_add(rows, hidden):
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16)
    check_add_call((rows, hidden), *dtypes, zero_centered_gamma=True)


ROTARY = [  # head_dim, rotated width, whether interleaved
    (64, 64, False),
    (128, 128, False),
    (128, 64, False),
    (256, 256, False),
    (512, 512, False),
    (64, 64, True),
    (128, 32, True),
    (256, 256, True),
]


def test_the_rotations_are_those_of_kernels():
    for hidden, width, interleaved in ROTARY:
        options = {"hidden": hidden, "width": width, "interleaved": interleaved}
        assert _ffi.CUDA.module.fuses_rope(**options, x="bfloat16", dy=None)
        backward = _ffi.CUDA.module.fuses_rope(**options, x="bfloat16", dy="bfloat16")
        assert backward == (interleaved or width == hidden)


@pytest.mark.parametrize(("head_dim", "width", "interleaved"), ROTARY)
@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("sm_margin", [0, 1])
def test_dtype_mixes_of_rope(head_dim, width, interleaved, heads, sm_margin):
    options = {"interleaved": interleaved, "sm_margin": sm_margin, "table_gradients": False}
    for x, gamma, y, table in PAIRWISE_DTYPES:
        shape, tables = (2, 7, heads, head_dim), (7, width // 2)
        check_rope_call(shape, tables, x, table, gamma, y, **options)


@pytest.mark.parametrize("lead", [(), (9,)], ids=str)
@pytest.mark.parametrize("rounding", ["once", "before_gamma"])
@pytest.mark.parametrize("length", [301, 1301])
def test_many_rows_of_rope(lead, rounding, length):
    """More than there are slots, one row at a time for each of them or two; and positions of each example's own."""
    shape, tables = (9, length, 6, 128), (*lead, length, 64)
    dtypes = (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16)
    check_rope_call(shape, tables, *dtypes, rounding=rounding)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_bits_of_rope(dtype):
    """A row's bits whether its slot takes one at a time or two, and with any margin."""
    x, gamma = draw(0, (17, 512, 8, 128), dtype), draw(1, (128,), jnp.float32)
    cos, sin = draw(2, (512, 64), jnp.float32), draw(3, (512, 64), jnp.float32)

    @functools.partial(jax.jit, static_argnames="margin")
    def rope(x, margin=0):
        return jax_rmsnorm.rms_norm_rope(
            x, gamma, cos, sin, implementation="kernel", sm_margin=margin
        )

    y = np.asarray(rope(x))
    np.testing.assert_array_equal(rope(x[3:5]), y[3:5])
    np.testing.assert_array_equal(rope(x, margin=50), y)


def test_gamma_of_add_batched_by_vmap():
    for groups, rows in ((3, 200), (300, 2)):
        x, residual, dy, dh = (draw(i, (groups, rows, 1024), jnp.bfloat16) for i in range(4))
        gamma = draw(4, (groups, 1024), jnp.float32)
        (_, h), vjp = jax.vjp(jax.vmap(jax_rmsnorm.add_rms_norm), x, residual, gamma)
        dx, _, dgamma = map(np.asarray, vjp((dy, dh)))
        for i in range(0, groups, max(1, groups // 7)):
            _, want = oracle.add_rms_norm(x[i], residual[i], gamma[i], dy[i], dh[i])
            oracle.assert_close(dx[i], want.dx, terms=want.dx_terms, what="dx")
            oracle.assert_close(dgamma[i], want.dgamma, terms=want.dgamma_terms, what="dgamma")
        assert h.shape == x.shape


@pytest.mark.parametrize("summand", ["x", "residual"])
@pytest.mark.parametrize("hidden", [72, 1024, 4096, 16_384, 65_536, 131_072])
def test_overwriting(hidden, summand):
    """By each kernel with an addend: registers, a staged row, a loop that reads h again."""
    x, residual = (draw(i, (70, hidden), jnp.bfloat16) for i in range(2))
    gamma = draw(2, hidden, jnp.float32)
    norm = functools.partial(jax_rmsnorm.add_rms_norm, implementation="kernel")
    overwriting = functools.partial(norm, overwrite=summand)
    want = norm(x, residual, gamma)
    donating = jax.jit(overwriting, donate_argnums=("x", "residual").index(summand))
    for got in (overwriting(x, residual, gamma), donating(x + 0, residual + 0, gamma)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, overwriting(x, x, gamma), norm(x, x, gamma))


@pytest.mark.parametrize("hidden", [72, 1024, 4096, 12_288])
def test_bits_of_add(hidden):
    """The same bits again, and a row's own bits in any batch."""
    arrays = [np.asarray(draw(i, (700, hidden), jnp.bfloat16)) for i in range(4)]
    gamma = draw(4, hidden, jnp.float32)

    @jax.jit
    def gradients(x, residual, dy, dh):
        results, vjp = jax.vjp(jax_rmsnorm.add_rms_norm, x, residual, gamma)
        return *results, *vjp((dy, dh))

    def run(rows):
        return tuple(map(np.asarray, gradients(*(array[rows] for array in arrays))))

    whole = run(slice(None))
    for again, first in zip(run(slice(None)), whole, strict=True):
        np.testing.assert_array_equal(again, first)
    for rows in (slice(0, 1), slice(5, 21), slice(600, 700)):
        for part, first in zip(run(rows)[:4], whole[:4], strict=True):
            np.testing.assert_array_equal(part, first[rows])
