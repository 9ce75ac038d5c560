"""The same inputs give the same bits, in any company, on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import DTYPES, draw
from compare import assert_same_bits

from jax_rmsnorm import rms_norm


@jax.jit
def results(x, gamma, dy):
    y, vjp = jax.vjp(lambda x, g: rms_norm(x, g, implementation="kernel"), x, gamma)
    return y, *vjp(dy)


def operands(rows: int, hidden: int, dtype=jnp.float32):
    shape = rows, hidden
    return draw(0, shape, dtype), draw(1, hidden, jnp.float32), draw(2, shape, dtype)


def test_again():
    arguments = operands(700, 331)
    first = results(*arguments)
    for _ in range(5):
        assert_same_bits(results(*arguments), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 64, 331, 1024, 40_001])
def test_rows_do_not_depend_on_other_rows(hidden, dtype):
    x, gamma, dy = map(np.asarray, operands(40, hidden, dtype))
    y, dx, _ = map(np.asarray, results(x, gamma, dy))
    for first, last in [(0, 1), (39, 40), (3, 20), (20, 33)]:
        rows = slice(first, last)
        y_part, dx_part, _ = results(x[rows], gamma, dy[rows])
        assert_same_bits([y_part, dx_part], [y[rows], dx[rows]])


@pytest.mark.parametrize("hidden", [7, 1024])
def test_rows_do_not_depend_on_their_place(hidden):
    """Nor on the alignment of their first element."""
    row, gamma, dy = operands(1, hidden)
    many = [jnp.broadcast_to(a, (1000, hidden)) for a in (row, dy)]
    y, dx, _ = results(many[0], gamma, many[1])
    expected = results(row, gamma, dy)
    for actual, one in [(y, expected[0]), (dx, expected[1])]:
        assert_same_bits(actual, jnp.broadcast_to(one, actual.shape))


def test_rank_and_grouping_do_not_matter():
    x, gamma, dy = operands(24, 50)
    y, dx, dgamma = results(x, gamma, dy)
    shape = 2, 3, 4, 50
    expected = y.reshape(shape), dx.reshape(shape), dgamma
    assert_same_bits(results(x.reshape(shape), gamma, dy.reshape(shape)), expected)


HASH = """
import hashlib, os, sys
import jax, jax.numpy as jnp, numpy as np
from jax_rmsnorm import rms_norm

for rows, hidden, dtype in [(3000, 257, "float32"), (64, 5000, "bfloat16"), (5, 70_000, "float16")]:
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((rows, hidden)), dtype) for _ in range(2))
    gamma = jnp.asarray(rng.standard_normal(hidden), "float32")
    y, vjp = jax.vjp(rms_norm, x, gamma)
    for array in (y, *vjp(dy)):
        assert np.any(np.asarray(array))
        print(hashlib.sha256(np.asarray(array).tobytes()).hexdigest())
names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in names), file=sys.stderr)
"""


def test_threads_do_not_matter():
    digests, threads = set(), set()
    for count in (1, 5):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "NPROC": str(count)}
        done = subprocess.run(
            [sys.executable, "-c", HASH],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
        threads.add(int(done.stderr.split()[-1]))
    assert threads == {1, 5}
    assert len(digests) == 1
    assert len(digests.pop().split()) == 9
