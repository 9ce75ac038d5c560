"""How the kernels behave in XLA's runtime: CUDA graphs, many streams, very large tensors, the sanitizers."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import draw

import jax_rmsnorm

HERE = pathlib.Path(__file__).parent


def test_more_than_two_to_the_31_elements():
    """64-bit offsets, forward and backward: the last rows equal those of a small call."""
    hidden = 4096
    rows = 2**31 // hidden + 5
    tail = 16
    last = draw(0, (tail, hidden), jnp.bfloat16)
    gamma = draw(1, hidden, jnp.bfloat16)
    norm = jax.jit(jax_rmsnorm.rms_norm)
    vjp = jax.jit(lambda x, g, dy: jax.vjp(jax_rmsnorm.rms_norm, x, g)[1](dy))

    @jax.jit
    def grow(last):
        return jnp.zeros((rows, hidden), last.dtype).at[-tail:].set(last)

    x = grow(last)
    np.testing.assert_array_equal(norm(x, gamma)[-tail:], norm(last, gamma))
    dx, dgamma = vjp(x, gamma, x)
    small_dx, small_dgamma = vjp(last, gamma, last)
    np.testing.assert_array_equal(dx[-tail:], small_dx)
    scale = float(jnp.max(jnp.abs(small_dgamma)))
    np.testing.assert_allclose(
        dgamma.astype(jnp.float32), small_dgamma.astype(jnp.float32), atol=0.01 * scale
    )


def test_recorded_into_a_cuda_graph(tmp_path):
    """XLA replays the norms from a CUDA graph: the profile shows one graph launch a call, and the kernels in it."""
    x, gamma = draw(0, (8192, 512), jnp.bfloat16), draw(1, 512, jnp.bfloat16)

    def chain(x):
        for _ in range(4):
            x = jax_rmsnorm.rms_norm(x, gamma)
        return x.astype(jnp.float32).sum()

    def compile_with(commands: str):
        options = {
            "xla_gpu_graph_min_graph_size": 1,
            "xla_gpu_enable_command_buffer": commands,
        }
        return jax.jit(jax.grad(chain)).lower(x).compile(compiler_options=options)

    def profile(compiled, folder) -> collections.Counter[tuple[str, str]]:
        """How often each event happened, by the plane (host or device) and name."""
        for _ in range(2):  # the first calls record
            jax.block_until_ready(compiled(x))
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(compiled(x))
        (file,) = folder.glob("**/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        return collections.Counter(
            (plane.name, event.name)
            for plane in planes
            for line in plane.lines
            for event in line.events
        )

    def count(events: collections.Counter[tuple[str, str]], plane: str, part: str) -> int:
        return sum(n for key, n in events.items() if plane in key[0] and part in key[1])

    with_graph, without = compile_with("FUSION,CUSTOM_CALL"), compile_with("")
    np.testing.assert_array_equal(with_graph(x), without(x))
    graph_events = profile(with_graph, tmp_path / "graph")
    plain_events = profile(without, tmp_path / "plain")
    assert count(graph_events, "host", "cuGraphLaunch") == 3, graph_events
    assert count(plain_events, "host", "cuGraphLaunch") == 0, plain_events
    for kernel in ("ForwardKernel", "BackwardKernel", "FinishKernel"):
        assert count(graph_events, "GPU", kernel) == 12, graph_events
        assert count(plain_events, "GPU", kernel) == 12, plain_events
    np.testing.assert_array_equal(with_graph(x), without(x))


def test_many_threads_and_streams():
    """Hidden sizes that share kernels, but not the shared memory that they ask for."""
    x = [
        draw(i, (256, hidden), jnp.bfloat16)
        for i, hidden in enumerate((1024, 2048, 4096, 8192) * 2)
    ]
    vjp = jax.jit(lambda x: jax.vjp(jax_rmsnorm.rms_norm, x, jnp.ones(x.shape[-1]))[1](x))
    want = [jax.tree.map(np.asarray, vjp(a)) for a in x]

    def work(i):
        return [jax.tree.map(np.asarray, vjp(x[(i + n) % 8])) for n in range(50)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, results in enumerate(pool.map(work, range(8))):
            for n, got in enumerate(results):
                jax.tree.map(np.testing.assert_array_equal, got, want[(i + n) % 8])


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizer(tool):
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=jax_rmsnorm"]
    if tool == "initcheck":
        # It does not see what the host writes to pinned memory, and would report XLA's own copies from there.
        command += ["--check-api-memory-access", "no"]
    result = subprocess.run(
        [*command, "--error-exitcode", "86", sys.executable, str(HERE / "sanitized.py")],
        capture_output=True,
        text=True,
        timeout=900,
        env={
            **os.environ,
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",  # a cudaMalloc each: overruns are seen
            "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
        },
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[:4000]
    assert "SUMMARY: 0 " in output, output[-4000:]
    assert "sanitized: 57 calls" in output, output[-4000:]
