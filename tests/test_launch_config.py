"""The CUDA kernels' launch configuration: a plain function, so that it is tested on any host."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from launches import SIZES, covered

cuda = pytest.importorskip("jax_rmsnorm._cuda", reason="the CUDA module is not part of this build")

MAX_THREADS = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One call on one device."""

    hidden: int
    rows: int
    x: str
    dy: str
    alignment: str
    groups: int
    partial_rows: int
    sm_count: int
    shared_memory: int
    max_cluster: int
    margin: int
    fusion: str = "none"

    def forward(self, **changes: Any) -> dict[str, Any]:
        arguments = dataclasses.asdict(dataclasses.replace(self, **changes))
        for name in ("dy", "groups", "partial_rows"):
            del arguments[name]
        return cuda.forward_config(**arguments)

    def backward(self, **changes: Any) -> dict[str, Any]:
        return cuda.backward_config(**dataclasses.asdict(dataclasses.replace(self, **changes)))

    def both(self, **changes: Any) -> dict[str, dict[str, Any]]:
        return {"forward": self.forward(**changes), "backward": self.backward(**changes)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    x, dy = draw(st.sampled_from(list(SIZES))), draw(st.sampled_from(list(SIZES)))
    hidden = draw(
        st.one_of(st.integers(1, 300_000), st.integers(1, 2048), st.sampled_from([65_536, 131_072]))
    )
    alignment = draw(st.sampled_from(["rows", "tensors", "none"]))
    if alignment == "rows":
        hidden += -hidden % (16 // min(SIZES[x], SIZES[dy]))
    elif alignment == "tensors" and hidden % (16 // SIZES[x]) == 0:
        hidden += 1
    sm_count = draw(st.sampled_from([1, 8, 20, 66, 108, 132, 148, 170]))
    rows = draw(st.one_of(st.integers(1, 100), st.integers(1, 2**33)))
    return Case(
        hidden,
        rows,
        x,
        dy,
        alignment,
        draw(st.sampled_from([1, 1, 2, 7, 1000, 100_000])),
        max(draw(st.integers(1, 2048)), min(rows, 8)),  # one for each way in which rows may lie
        sm_count,
        draw(st.integers(99, 227)) * 1024,
        draw(st.sampled_from([1, 8, 16])),
        draw(st.integers(0, sm_count - 1)),
        draw(st.sampled_from(["none", "none", "add"])),
    )


MAPPING = ("scope", "width", "packets", "threads_per_row", "cluster")


def in_windows(case: Case, config: dict[str, Any]) -> bool:
    """Whether packets are where 16 bytes begin, and not where rows do."""
    return case.hidden % config["width"] != 0


def mapping(case: Case, direction: str, config: dict[str, Any]) -> dict[str, Any]:
    """Which thread has which elements, and the order in which sums are added up.

    The sums of windows, and of long rows in a forward, are added up by strips, which a staged row deals out as a
    cluster of any size does, and of which two warps may share one. A fourth window that is always empty makes no
    difference.
    """
    staged_or_cluster = config["method"] == "staged" or config["scope"] == "cluster"
    if staged_or_cluster and (in_windows(case, config) or direction == "forward"):
        return {"width": config["width"]}
    if not in_windows(case, config) or config["scope"] == "loop":
        return {name: config[name] for name in MAPPING}
    windows = config["packets"] * config["share"]
    return {
        "scope": config["scope"],
        "width": config["width"],
        "windows": 4 if windows == 3 and config["scope"] == "lanes" else windows,
        "threads": config["threads_per_row"] // config["share"],
    }


def packet(case: Case, direction: str) -> int:
    """Elements that 16 bytes of the narrower operand hold."""
    narrow = min(SIZES[case.x], SIZES[case.dy]) if direction == "backward" else SIZES[case.x]
    return 16 // narrow


def kernel(config: dict[str, Any]) -> str:
    return "loop" if config["scope"] == "loop" else config["method"]


def persistent(config: dict[str, Any]) -> bool:
    """Whether there is one block an SM, and no more. The forward has rings of several."""
    return kernel(config) == "ring" and config["aligned"]


def readers(config: dict[str, Any]) -> int:
    """Threads of a block, but for the warp that copies for them all."""
    return config["block"] - (32 if kernel(config) == "bulk" else 0)


def slots_of(config: dict[str, Any]) -> int:
    """Rows that a block takes at the same time."""
    return readers(config) // config["threads_per_row"]


@settings(max_examples=300)
@given(cases())
def test_the_row_fits(case):
    for direction, config in case.both().items():
        assert config["aligned"] == (case.alignment == "rows")
        wide = packet(case, direction)
        if config["aligned"] or kernel(config) in ("staged", "windows", "ring", "bulk", "few"):
            assert config["width"] == wide
        elif kernel(config) == "loop" or case.alignment == "none" or case.fusion == "add":
            assert config["width"] == 1
        else:
            assert config["width"] == math.gcd(wide, case.hidden)
        if config["scope"] == "loop":
            assert config["cluster"] == 1
        elif kernel(config) == "staged":
            # A packet may begin and end outside the row.
            extra = 16 if in_windows(case, config) else 0
            assert config["shared_memory"] >= case.hidden * SIZES[case.x] + extra
        else:
            # Where packets do not begin with the row, it may reach into one more.
            extra = 0 if case.hidden % config["width"] == 0 else config["width"] - 1
            assert covered(config) >= case.hidden + extra


@settings(max_examples=300)
@given(cases())
def test_kernel(case):
    """Persistent blocks share long rows, leave SMs alone, and add up the dgamma of many rows."""
    for direction, config in case.both().items():
        if kernel(config) in ("few", "plain", "staged", "windows"):
            assert (kernel(config) == "few") == (direction == "backward")
            assert config["cluster"] == 1 or kernel(config) != "staged"
            if kernel(config) == "plain" and config["scope"] == "cluster":
                assert config["aligned"]
                assert case.margin == 0
                assert case.fusion == "none"
        if kernel(config) == "few":
            assert case.alignment != "none"
            assert case.margin == 0
        if direction == "backward" and case.alignment == "none":
            assert kernel(config) == "loop"
        if direction == "backward" and case.alignment == "tensors":
            many = "bulk" if case.max_cluster > 1 else "ring"
            assert kernel(config) in ("few", "loop", many)
        if case.fusion == "add":
            assert direction == "backward" or kernel(config) in ("plain", "staged", "loop")
            assert config["aligned"] or kernel(config) == "loop"
            continue
        if direction == "forward" and case.alignment == "tensors" and case.hidden <= 20_000:
            assert kernel(config) in ("plain", "staged", "windows", "ring")
            few = case.rows * case.hidden * SIZES[case.x] <= 4 << 20
            assert few or kernel(config) != "windows" or config["cluster"] > 1
        if direction == "forward" and config["aligned"] and case.margin > 0:
            assert kernel(config) in ("ring", "loop")
        assert not config["more_registers"] or (
            config["method"] == "plain" and config["grid"] * config["block"] <= 512 * case.sm_count
        )
        # A kernel that waits for its predecessor may start before that has ended.
        assert config["dependent"] == (
            case.max_cluster > 1
            and (kernel(config) == "few" or (direction == "forward" and not persistent(config)))
        )


@given(st.integers(2049, 24_576), st.integers(1, 2**20), st.sampled_from(["bfloat16", "float32"]))
def test_long_rows_have_a_cluster(packets, rows, x):
    """As long as three packets of 16 bytes for each thread of sixteen blocks suffice."""
    hidden = packets * 16 // SIZES[x]
    device = {"sm_count": 132, "shared_memory": 227 * 1024, "max_cluster": 16}
    case = Case(hidden, rows, x, x, "rows", groups=1, partial_rows=64, margin=1, **device)
    for config in case.both().values():
        assert config["scope"] == "cluster"


@settings(max_examples=300)
@given(cases())
def test_threads(case):
    for config in case.both().values():
        block, threads = config["block"], config["threads_per_row"]
        assert block % 32 == 0
        most = 768 if config["share"] > 1 or kernel(config) == "bulk" else MAX_THREADS
        assert 32 <= block <= most
        # A block for few rows may have more than a row's: those are for dgamma alone.
        assert readers(config) % threads == 0 or (kernel(config) == "few" and block == 256)
        assert kernel(config) != "bulk" or readers(config) == config["slots"] * threads
        if config["scope"] == "lanes":
            assert threads // config["share"] in (1, 2, 4, 8, 16, 32)
        else:
            assert threads % 32 == 0
        cluster = config["cluster"]
        assert cluster & (cluster - 1) == 0 or in_windows(case, config)
        assert 1 <= cluster <= case.max_cluster
        assert cluster == 1 or config["scope"] == "cluster"
        assert config["grid"] >= 1
        assert config["grid"] % cluster == 0
        assert config["grid"] < 2**31


@settings(max_examples=300)
@given(cases(), cases())
def test_the_mapping_depends_on_the_row_alone(case, other):
    """A row's bits must be the same whatever stands beside it, and however many SMs are left to others."""
    names = ("rows", "groups", "partial_rows", "sm_count", "margin")
    changes = {name: getattr(other, name) for name in names}
    for direction, config in case.both().items():
        changed = case.both(**changes)[direction]
        assert mapping(case, direction, config) == mapping(case, direction, changed)


@settings(max_examples=300)
@given(cases())
def test_grid(case):
    """No more blocks than there is work for; persistent ones: no more than SMs that are not left to others."""
    usable = case.sm_count - case.margin
    for direction, config in case.both().items():
        slots = slots_of(config)
        clusters = config["grid"] // config["cluster"]
        # The forward interface has one group.
        groups = case.groups if direction == "backward" else 1
        if kernel(config) == "few":
            # Whatever the block has more of is for dgamma alone.
            assert 1 <= config["slots"] <= slots
            slots = config["slots"]
        rows = -(-groups * case.rows // slots)
        if kernel(config) == "few":
            assert clusters == -(-groups * config["tiles"] // config["cluster"]) + rows
        elif direction == "forward" and kernel(config) == "ring" and not config["aligned"]:
            assert clusters <= rows
            most = max(usable, config["cluster"])
            assert config["grid"] <= most or case.margin == 0
            assert config["grid"] * config["block"] <= 1024 * most
        elif direction == "forward" and kernel(config) != "ring" and case.margin == 0:
            assert clusters == min(rows, (2**31 - 1) // config["cluster"])
        else:
            assert config["grid"] <= max(config["cluster"], usable)
            assert clusters <= groups * -(-case.rows // slots)


@settings(max_examples=300)
@given(cases())
def test_partials(case):
    config = case.backward()
    if kernel(config) == "few":
        assert config["tile_packets"] in (2, 4, 8, 16, 32)
        tile = config["tile_packets"] * config["width"]
        assert (config["tiles"] - 1) * tile < case.hidden <= config["tiles"] * tile
        if config["tile_packets"] < 8:  # only as many as have an SM each
            assert case.groups * config["tiles"] <= case.sm_count
        return
    slots = slots_of(config)
    blocks = config["blocks_per_group"]
    assert 1 <= blocks <= min(case.partial_rows, -(-case.rows // slots))
    assert config["grid"] // config["cluster"] <= blocks * case.groups


@settings(max_examples=300)
@given(cases())
def test_rows_of_a_slot_are_alike(case):
    """Words of two elements begin where they do in all rows of a slot, of which gamma is in registers."""
    config = case.backward()
    if kernel(config) != "bulk" or min(SIZES[case.x], SIZES[case.dy]) == 4:
        return
    step = config["blocks_per_group"] * config["slots"]
    assert step >= case.rows or step * case.hidden % 2 == 0


@pytest.mark.parametrize("dtype", SIZES)
def test_lanes_of_bulk_copies(dtype):
    """Each choice has a kernel, which takes for granted that no choice with fewer windows would hold the row."""
    choices = {(1, 8), (2, 8), (3, 8), (4, 8), (3, 16), (4, 16), (3, 32), (4, 32)}
    width, seen = 16 // SIZES[dtype], set()
    for hidden in range(1, 128 * width):
        config = cuda.backward_config(
            rows=2**20, hidden=hidden, x=dtype, dy=dtype, alignment="tensors"
        )
        if config["scope"] != "lanes":
            continue
        needed = -(-(hidden - 1) // width) + 1  # windows, wherever the row begins
        held = [choice for choice in choices if math.prod(choice) >= needed]
        assert (config["packets"], config["threads_per_row"]) == min(held, key=math.prod)
        seen.add((config["packets"], config["threads_per_row"]))
    assert seen == choices


@settings(max_examples=300)
@given(cases())
def test_shared_memory(case):
    for direction, config in case.both().items():
        assert config["shared_memory"] <= config["most_shared_memory"] < case.shared_memory
        slots = slots_of(config)
        if kernel(config) not in ("ring", "bulk"):
            assert (config["shared_memory"] > 0) == (
                kernel(config) == "staged" or (direction == "forward" and config["share"] > 1)
            )
            continue
        sizes = SIZES[case.x] + (SIZES[case.dy] if direction == "backward" else 0)
        sizes += SIZES[case.x] if direction == "backward" and case.fusion == "add" else 0
        row = readers(config) * config["packets"] * config["width"] * sizes
        if kernel(config) == "bulk":
            # One place is filled while others are read, of which a row's last words may reach into the next.
            assert (2 if config["scope"] == "lanes" else 3) <= config["places"] <= 8
            copied = slots * case.hidden * sizes if config["cluster"] == 1 else row
            assert config["place_bytes"] >= copied + 2 * 128
            words = 32 * config["packets"] * config["width"] * SIZES[case.dy]
            assert config["shared_memory"] >= config["places"] * config["place_bytes"] + words
        else:
            assert config["shared_memory"] >= (2 if direction == "forward" else 3) * row
        if direction == "backward" and slots > 1:
            assert config["shared_memory"] >= 4 * slots * case.hidden


@settings(max_examples=300)
@given(cases())
def test_few_rows_stay_in_the_cache(case):
    config = case.backward()
    if kernel(config) == "few":
        elements = case.groups * case.rows * case.hidden
        read = SIZES[case.x] * (2 if case.fusion == "add" else 1) + SIZES[case.dy]
        assert elements * read <= 24 << 20
        assert not in_windows(case, config) or elements * SIZES[case.x] <= 4 << 20


@settings(max_examples=300)
@given(cases())
@example(Case(2048 * 8 + 8, 1, "bfloat16", "bfloat16", "rows", 1, 1, 132, 232_448, 16, 0))
def test_no_cliff(case):
    """Threads do at most about twice the work that the row needs; whole warps are the granularity."""
    for config in case.both().values():
        if config["scope"] == "loop":
            continue
        granularity = config["width"] * config["packets"] * 32 * config["cluster"]
        assert covered(config) < 2 * (case.hidden + config["width"]) + granularity


@settings(max_examples=100)
@given(
    st.integers(1, 300_000), st.booleans(), st.sampled_from(list(SIZES)), st.sampled_from([8, 16])
)
def test_neighbours_are_alike(hidden, aligned, dtype, max_cluster):
    """The next length of the same alignment costs at most twice as much."""
    step = 16 // SIZES[dtype] if aligned else 1
    hidden += -hidden % step
    for configure in (cuda.forward_config, cuda.backward_config):
        options = {
            "rows": 1000,
            "x": dtype,
            "alignment": "rows" if aligned else "tensors",
            "max_cluster": max_cluster,
        }
        if configure is cuda.backward_config:
            options["dy"] = dtype
        here, there = (configure(hidden=h, **options) for h in (hidden, hidden + step))
        if "loop" in (here["scope"], there["scope"]):
            continue
        small, large = sorted((covered(here), covered(there)))
        assert large <= 2 * max(small, 64)  # a window for each of eight lanes is the least


@pytest.mark.parametrize("hidden", [65_536])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", SIZES)
def test_long_rows_are_read_once(direction, dtype, hidden):
    """Up to 65,536 aligned elements, on a device with clusters."""
    configure = getattr(cuda, f"{direction}_config")
    assert configure(rows=8, hidden=hidden, x=dtype)["scope"] in ("block", "cluster")


@settings(max_examples=100)
@given(
    rows=st.integers(1, 2**24).map(lambda n: 2 * n),
    head_dim=st.sampled_from([16, 64, 128, 256]),
    sm_count=st.sampled_from([8, 66, 132]),
    margin=st.integers(0, 7),
)
def test_pairs_of_rotated_rows(rows, head_dim, sm_count, margin):
    """Blocks of a size with which no block has more rows than with another one."""
    config = cuda.backward_config(
        rows=rows,
        hidden=head_dim,
        fusion="rotary",
        rotary_width=head_dim,
        heads=2,
        sm_count=sm_count,
        margin=margin,
    )

    def most_rows(threads: int) -> int:
        run = threads // config["threads_per_row"] * config["rows"]
        return math.ceil(rows / (run * (sm_count - margin))) * run

    assert config["rows"] == 2
    assert 256 <= config["block"] <= 352
    assert most_rows(config["block"]) == min(map(most_rows, range(256, 353, 32)))


@pytest.mark.parametrize(
    ("hidden", "eager"), [(3072, True), (5120, True), (4096, False), (8192, False)]
)
def test_what_is_loaded_early(hidden, eager):
    """A row's reciprocal RMS, where there is little under way."""
    assert cuda.backward_config(rows=2**26 // hidden, hidden=hidden)["eager"] is eager


def test_bad_dtype():
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got float64"):
        cuda.forward_config(rows=1, hidden=1, x=jnp.dtype("float64").name)
