"""The CUDA kernels' launch configuration: the forward of long rows, and rotary embeddings."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from launches import SIZES, covered

cuda = pytest.importorskip("jax_rmsnorm._cuda", reason="the CUDA module is not part of this build")


@settings(max_examples=300)
@given(
    st.integers(1025, 131_072 // 8),
    st.integers(1, 2**20),
    st.sampled_from(["bfloat16", "float32"]),
    st.sampled_from(["bfloat16", "float32"]),
)
def test_long_rows_forward(packets, rows, x, gamma):
    """Few stay in registers, many that an SM has room for three of are staged, longer ones go through a ring."""
    hidden = packets * 16 // SIZES[x]
    config = cuda.forward_config(rows=rows, hidden=hidden, x=x, gamma=gamma)
    ring = cuda.forward_config(rows=rows, hidden=hidden, x=x, gamma=gamma, margin=1)
    assert (ring["method"], ring["scope"]) == ("ring", "cluster")
    cluster = ring["cluster"]
    rounds = 4 if cluster > 2 or SIZES[gamma] > SIZES[x] else 8
    if rows * cluster <= rounds * 132:
        assert (config["method"], config["cluster"]) == ("plain", cluster)
        assert config["grid"] == rows * cluster
    else:
        stages = 1 if cluster == 1 else 3
        stage = hidden * SIZES[x] + 16 + 7 * 1024
        staged = hidden <= 24 * 1024 and stages * stage <= 227 * 1024
        assert config["method"] == ("staged" if staged else "ring")


@settings(max_examples=300)
@given(
    st.integers(1, 40).map(lambda n: 8 * n),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.booleans(),
    st.sampled_from(list(SIZES)),
    st.sampled_from(list(SIZES)),
    st.integers(0, 100),
)
@example(128, 128, False, "bfloat16", "bfloat16", 0)
@example(128, 64, False, "bfloat16", "bfloat16", 0)
@example(256, 64, True, "float32", "bfloat16", 8)
def test_rotary(hidden, width, interleaved, x, dy, margin):
    """A thread has the packets that meet, and the row fits; where it would not, there is no kernel."""
    width = min(width, hidden)
    rope = {"hidden": hidden, "width": width, "interleaved": interleaved, "x": x}
    fused = {"fusion": "rotary", "rotary_width": width, "interleaved": interleaved}
    call = {"rows": 1000, "hidden": hidden, "x": x, "margin": margin, **fused}
    configs = []
    if cuda.fuses_rope(**rope, dy=None):
        configs.append(cuda.forward_config(**call))
    if cuda.fuses_rope(**rope, dy=dy):
        configs.append(cuda.backward_config(**call, dy=dy))
    for config in configs:
        assert config["scope"] == "lanes"
        assert 1 <= config["threads_per_row"] <= 32
        assert config["block"] % config["threads_per_row"] == 0
        assert covered(config) >= hidden
        if not interleaved:
            assert width == 2 * config["width"] * config["threads_per_row"]


@pytest.mark.parametrize("hidden", [64, 128, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_kernels_cover_the_usual_heads(hidden, interleaved):
    for dy in (None, "bfloat16"):
        assert cuda.fuses_rope(
            hidden=hidden, width=hidden, interleaved=interleaved, x="bfloat16", dy=dy
        )
