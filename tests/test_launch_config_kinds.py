"""The CUDA kernels' launch configuration: the forward of long rows, rotary embeddings, and blocks held back."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from launches import H200, SIZES, covered

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


SHARES = {"forward": 0.815, "backward": 0.88}  # of the specified bandwidth


@st.composite
def large_calls(draw: st.DrawFn) -> tuple[str, dict[str, Any], int]:
    """A direction, a call, and the bytes that it moves, but for what is small beside them."""
    x, other = draw(st.sampled_from([("bfloat16",) * 2, ("float32",) * 2, ("float32", "bfloat16")]))
    hidden, rows = 8 * draw(st.integers(1, 20_000)), draw(st.integers(1, 2**20))
    call = {"rows": rows, "hidden": hidden, "x": x, "margin": draw(st.integers(0, 64))}
    if draw(st.booleans()):
        return "forward", call | {"y": other}, rows * hidden * (SIZES[x] + SIZES[other])
    groups = draw(st.one_of(st.just(1), st.integers(2, 1000)))
    gradients, with_dh = draw(st.integers(1, 4)), draw(st.booleans())
    fusion = "add" if gradients > 1 or with_dh else "none"
    call |= {"dy": other, "groups": groups, "partial_rows": 256, "fusion": fusion}
    call |= {"gradients": gradients, "gradient_of_h": with_dh}
    moved = (2 + with_dh) * SIZES[x] + gradients * SIZES[other]
    return "backward", call, groups * rows * hidden * moved


def alone(rows: int, hidden: int, groups: int = 1) -> tuple[str, dict[str, Any], int]:
    call = {"rows": rows, "hidden": hidden, "groups": groups, "partial_rows": 256}
    return "backward", call, groups * rows * hidden * 3 * 2


@settings(max_examples=500)
@given(large_calls())
@example(alone(16_384, 4096))
@example(alone(4096, 4096))
@example(alone(128, 4096, groups=133))
@example(alone(50, 128, groups=20_000))
def test_persistent_blocks_are_held_back(large_call):
    """No longer than the memory needs for all that a call moves, where most of it comes from memory."""
    direction, call, moved = large_call
    configure = {"forward": cuda.forward_config, "backward": cuda.backward_config}[direction]
    config = configure(**call, **H200)
    assert configure(**call)["turn_ns"] == 0, "a device of which the bandwidth is not known"
    if config["method"] != "ring" or config["scope"] == "loop" or moved <= 4 * H200["l2_bytes"]:
        assert config["turn_ns"] == 0
        return
    clusters = config["grid"] // config["cluster"]
    slots = config["block"] // config["threads_per_row"] * config["rows"]
    items = call.get("groups", 1) * config["blocks_per_group"]
    turns = -(-items // clusters) * -(-call["rows"] // (config["blocks_per_group"] * slots))
    needed = moved / (SHARES[direction] * H200["memory_bandwidth"])
    assert turns * config["turn_ns"] <= needed < turns * (config["turn_ns"] + 1)


@pytest.mark.parametrize("hidden", [101, 1001, 4097, 4100, 50_257])
def test_rows_that_are_not_aligned_are_held_back_in_the_backward(hidden):
    """In the forward they take more instructions, and do not ask for more than their share."""
    rows = 2**30 // hidden
    call = {"rows": rows, "hidden": hidden, "alignment": "tensors"} | H200
    assert cuda.forward_config(**call)["turn_ns"] == 0
    config = cuda.backward_config(**call)
    assert config["method"] == "bulk"
    turns = -(-rows // (config["blocks_per_group"] * config["slots"]))
    needed = rows * hidden * 3 * 2 / (SHARES["backward"] * H200["memory_bandwidth"])
    assert turns * config["turn_ns"] <= needed < turns * (config["turn_ns"] + 1)
