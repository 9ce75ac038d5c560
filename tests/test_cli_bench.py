"""``jax-rmsnorm bench`` in runs of a few small shapes, and its parts."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from jax.profiler import ProfileData

from jax_rmsnorm import cli
from jax_rmsnorm.cli._bench import inputs, names, peers, profile, results, shapes, timing
from jax_rmsnorm.cli._bench.check import Check
from jax_rmsnorm.cli._bench.contenders import JaxContender, Plain, make_forward
from jax_rmsnorm.cli._bench.results import Cell, Row
from jax_rmsnorm.cli._bench.shapes import Case
from jax_rmsnorm.cli._errors import OptionError

FAST = dataclasses.replace(
    timing.PLANS["cpu"],
    seconds=1e-3,
    sample_seconds=2e-3,
    min_rounds=3,
    max_rounds=3,
    budget_seconds=0.0,
)
SEVERAL_SETS = dataclasses.replace(FAST, min_sets=3, max_sets=3, chain_calls=3)
TINY = ("--shapes", "8x96", "600x64", "--dtypes", "bfloat16/float32")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.PLANS, "cpu", FAST)


def bench(*options: str) -> int:
    return cli.main(["bench", *options])


def test_a_run_writes_table_json_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    json_path, plot_path = tmp_path / "bench.json", tmp_path / "bench.png"
    rivals = ("jnp", "flax")
    files = (f"--json={json_path}", f"--plot={plot_path}")
    with jax.numpy_dtype_promotion("standard"):  # as Flax needs it
        assert bench(*TINY, "--against", *rivals, *files) == 0

    printed = capsys.readouterr().out
    for text in ("backward, bfloat16/float32", "600x64", "geometric mean", "speed-up", *rivals):
        assert text in printed
    assert jax.__version__ in printed

    found = json.loads(json_path.read_text())
    assert found["environment"]["jax"] == jax.__version__
    assert len(found["cases"]) == 2 * 2
    for case in found["cases"]:
        assert set(case["contenders"]) == {"kernel", *rivals}
        times = {name: cell["call"]["median_us"] for name, cell in case["contenders"].items()}
        assert all(0 < time < 1e6 for time in times.values())
        kernel_time = times.pop("kernel")
        best = min(times, key=times.__getitem__)
        assert case["best_other"] == best
        kernel = case["contenders"]["kernel"]
        assert case["speedup"] == pytest.approx(times[best] / kernel_time)
        speed = case["moved_bytes"] / kernel["call"]["median_us"] * 1e6
        assert kernel["bytes_per_second"] == pytest.approx(speed)
        lower, upper = kernel["call"]["quartiles_us"]
        assert lower <= kernel["call"]["median_us"] <= upper
        assert ("chain" in kernel) == (case["rows"] == 8)
    for mean in found["geometric_means"]:
        group = [math.log(case["speedup"]) for case in found["cases"] if case["op"] == mean["op"]]
        assert mean["speedup"] == pytest.approx(math.exp(sum(group) / 2))

    image = matplotlib.image.imread(plot_path)
    assert min(image.shape[:2]) > 500
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.3) & (image[..., 2] < 0.3)
    assert red.sum() > 500  # the kernel's line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shapes", "huge"), "--shapes: must be a table"),
        (("--shapes", "0x128"), "--shapes: must be a table"),
        (("--dtypes", "float64"), "--dtypes: must be one of"),
        (("--dtypes", "bfloat16/int8"), "--dtypes: must be one of"),
        (("--ops", "sideways"), "--ops"),
        (("--against", "numpy"), "--against: must be of roof, jnp"),
        (("--against", "roof"), "--against: roof: it is a CUDA kernel"),
        (("--json", "no/such/folder/x.json"), "--json: there is no folder"),
        (("--plot", "chart.txt"), "--plot: must end in .png"),
    ],
)
def test_wrong_options_exit_with_2_and_name_the_option(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench(*options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_without_rich_it_says_what_to_install():
    code = "import sys; sys.modules['rich'] = None; from jax_rmsnorm.cli import main; sys.exit(main(['bench']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install rich" in done.stderr
    assert "Traceback" not in done.stderr


def test_shapes_and_dtypes_are_parsed_in_order_and_once():
    assert shapes.parse_shapes(["16x4096", "cpu", "7x5"]) == [
        (16, 4096),
        (4096, 1024),
        (1024, 4096),
        (65536, 128),
        (7, 5),
    ]
    assert shapes.parse_dtypes(["bfloat16/float32", "float32", "float32/float32"]) == [
        ("bfloat16", "float32"),
        ("float32", "float32"),
    ]
    with pytest.raises(OptionError, match="--shapes"):
        shapes.parse_shapes(["4096x"])


def test_names_and_contenders_agree():
    assert tuple(peers.CONTENDERS) == (names.KERNEL, *names.RIVALS)


class Spoiled(JaxContender):
    """The right result, spoiled."""

    name = "jnp"

    def __init__(self, spoil: Any) -> None:
        self._spoil = spoil

    def call(self, case: Case) -> timing.Call:
        right = Plain().call(case)
        spoiled = lambda head, rest: self._spoil(right.function(head, rest))  # noqa: E731
        return timing.Call(spoiled, right.operands)


def raise_error(_: Any) -> Any:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize(
    ("op", "spoil", "status", "message"),
    [
        ("forward", lambda r: (r[0] * 1.01,), "wrong", "y has a relative error"),
        ("forward", lambda r: (r[0] * 0,), "wrong", "y has a relative error of 1 in row"),
        ("forward", lambda r: (r[0].at[3, 1].set(jnp.nan),), "wrong", "y is not finite"),
        ("forward", lambda r: (r[0].at[-1].multiply(0.9),), "wrong", "in row 11"),
        ("backward", lambda r: (r[0], r[1].at[0].multiply(1.01)), "wrong", "dgamma has a rel"),
        ("backward", lambda r: (-r[0], r[1]), "wrong", "dx has a relative error of 2"),
        ("backward", raise_error, "failed", "ZeroDivisionError: on purpose"),
    ],
)
def test_a_wrong_rival_is_reported_and_not_timed(
    op, spoil, status, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(peers.CONTENDERS, "jnp", Spoiled(spoil))
    path = tmp_path / "bench.json"
    assert bench("--shapes=12x40", "--dtypes=float32", f"--ops={op}", f"--json={path}") == 0
    (case,) = json.loads(path.read_text())["cases"]
    rival = case["contenders"]["jnp"]
    assert rival["status"] == status
    assert message in rival["message"]
    assert "call" not in rival
    assert case["speedup"] is None
    assert case["contenders"]["kernel"]["call"]["median_us"] > 0
    assert message in capsys.readouterr().out


def test_a_wrong_kernel_fails_the_run(monkeypatch, capsys):
    monkeypatch.setitem(peers.CONTENDERS, "kernel", Spoiled(lambda r: (r[0] * 1.1,)))
    assert bench("--shapes=12x40", "--dtypes=float32", "--ops=forward") == 1
    assert "the kernel did not pass: forward float32 12x40" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kernel", "jnp_saved"])
@pytest.mark.parametrize("op", shapes.OPS)
def test_a_loop_over_several_sets_runs_them_all(op, name):
    case = Case(op, 24, 48, "float32", "float32")
    sets = inputs.draw(case, 3)
    prepared = peers.CONTENDERS[name].prepare(case, sets, SEVERAL_SETS)
    _, found = prepared._state
    for own, other, got in zip(sets, [*sets[1:], sets[0]], found, strict=True):
        assert Check(case, own).problem(got) is None
        assert Check(case, other).problem(got) is not None
    assert 0 < prepared.sample() < 1


def test_what_each_run_costs_the_host_is_no_part_of_a_queued_sample(monkeypatch):
    case, plan = Case("forward", 8, 96, "float32", "float32"), SEVERAL_SETS
    plan = dataclasses.replace(plan, queued_runs=3)
    prepared = timing.PreparedCall(Plain().call(case), case, inputs.draw(case, 3), plan)
    monkeypatch.setattr(prepared, "_seconds", lambda runs: 0.5 + 0.25 * runs)
    calls = 3 * plan.trips(case, 3)
    assert prepared.sample() == pytest.approx(0.25 / calls)


@pytest.mark.parametrize("op", shapes.OPS)
def test_a_chain_neither_fades_nor_overflows(op):
    case = Case(op, 4, 256, "bfloat16", "bfloat16")
    start = inputs.stationary(inputs.draw(case, 1)[0])
    prepared = peers.CONTENDERS["kernel"].prepare(case, [start], SEVERAL_SETS, chain=True)
    for _ in range(3):
        prepared.sample()
    head, _ = prepared._state
    size = float(jnp.sqrt(jnp.mean(head.astype(jnp.float32) ** 2)))
    assert 0.7 < size < 1.4


def test_a_function_that_writes_nothing_is_seen():
    case = Case("forward", 6, 32, "bfloat16", "bfloat16")
    sets = inputs.draw(case, 2)
    idle = make_forward(lambda x, gamma: jnp.full_like(x, jnp.nan))
    left = timing.PreparedCall(idle, case, sets, SEVERAL_SETS).results()[0]
    assert float(timing.share_of_poison(left)) == 1
    right = peers.CONTENDERS["jnp"].prepare(case, sets, SEVERAL_SETS).results()[0]
    assert float(timing.share_of_poison(right)) == 0


PROFILE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "main" } }
  event_metadata { key: 2 value { id: 2 name: "finish" } }
  event_metadata { key: 3 value { id: 3 name: "custom-call.1" } }
  lines {
    name: "Stream #17(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 5000000 }
    events { metadata_id: 2 offset_ps: 6000000 duration_ps: 1000000 }
    events { metadata_id: 1 offset_ps: 8000000 duration_ps: 6000000 }
    events { metadata_id: 2 offset_ps: 15000000 duration_ps: 1000000 }
    events { metadata_id: 1 offset_ps: 17000000 duration_ps: 9000000 }
    events { metadata_id: 2 offset_ps: 27000000 duration_ps: 1000000 }
  }
  lines {
    name: "XLA Ops"
    events { metadata_id: 3 offset_ps: 0 duration_ps: 90000000 }
  }
}
planes { name: "/host:CPU" lines { name: "python" } }
"""


def parse(text: str) -> ProfileData:
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


def test_device_time_is_the_median_over_calls_of_their_kernels():
    found = profile.summarize(parse(PROFILE), calls=3)
    assert found.seconds == pytest.approx(7e-6)
    assert found.events_per_call == 2
    assert found.kernels == pytest.approx({"main": 20e-6 / 3, "finish": 1e-6})


def test_calls_of_unequal_length_give_the_mean():
    assert profile.summarize(parse(PROFILE), calls=4).seconds == pytest.approx(23e-6 / 4)


def test_time_that_kernels_share_counts_once():
    """The finish of each call starts 2 us before its kernel ends, and ends with it or 1 us after it."""
    early = PROFILE.replace(
        "offset_ps: 6000000 duration_ps: 1000000", "offset_ps: 3000000 duration_ps: 3000000"
    )
    early = early.replace(
        "offset_ps: 15000000 duration_ps: 1000000", "offset_ps: 12000000 duration_ps: 2000000"
    )
    early = early.replace(
        "offset_ps: 27000000 duration_ps: 1000000", "offset_ps: 24000000 duration_ps: 3000000"
    )
    found = profile.summarize(parse(early), calls=3)
    assert found.seconds == pytest.approx(6e-6)
    assert found.kernels == pytest.approx({"main": 20e-6 / 3, "finish": 8e-6 / 3})


def test_a_profile_without_kernels_says_what_it_has():
    with pytest.raises(profile.ProfileError, match="/host:CPU: python"):
        profile.summarize(parse('planes { name: "/host:CPU" lines { name: "python" } }'), calls=1)


def test_ratios_and_means_leave_out_what_was_not_timed():
    def cell(microseconds: float) -> Cell:
        return Cell("timed", timing=timing.Timing(microseconds * 1e-6, 0.0, 0.0, 3))

    case = Case("backward", 1024, 1024, "float32", "float32")
    rows = [
        Row(case, 4, {"kernel": cell(10), "roof": cell(9), "a": cell(20), "b": cell(30)}),
        Row(case, 4, {"kernel": cell(10), "roof": cell(4), "a": Cell("failed"), "b": cell(80)}),
    ]
    assert [row.best_other() for row in rows] == ["a", "b"]
    assert rows[0].of_roof("kernel") == pytest.approx(0.9)
    assert rows[0].bytes_per_second("kernel") == pytest.approx(3 * 4 * 2**20 / 10e-6)
    (summary,) = results.summarize(rows)
    assert summary.speedup == pytest.approx(4)
    assert summary.of_roof == pytest.approx(0.6)
    assert summary.over["a"] == pytest.approx(2)
    assert summary.over["b"] == pytest.approx(math.sqrt(24))


def test_a_race_takes_turns():
    order: list[str] = []

    def runner(name: str, seconds: list[float]):
        def run() -> float:
            order.append(name)
            return seconds.pop()

        return run

    first, second = timing.race([runner("a", [3.0, 1.0, 2.0]), runner("b", [5.0] * 3)], FAST)
    assert order == ["a", "b"] * 3
    assert first == timing.Timing(2.0, 1.5, 2.5, 3)
    assert second.median == 5


def test_sets_and_trips_fill_the_cache_and_the_time():
    plan = timing.PLANS["gpu"]
    large = Case("forward", 16384, 4096, "bfloat16", "bfloat16")
    small = Case("forward", 1, 4096, "bfloat16", "bfloat16")
    assert plan.sets(large) * large.moved_bytes >= 4 * 60 * 2**20
    assert plan.sets(small) == plan.max_sets
    seconds = plan.trips(large, 4) * 4 * large.moved_bytes / plan.bytes_per_second
    assert np.isclose(seconds, plan.seconds, rtol=0.1)
