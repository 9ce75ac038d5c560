"""``jax-rmsnorm bench --sweep`` in a run of three tiny shapes, and its parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from rich.console import Console

from jax_rmsnorm import cli
from jax_rmsnorm.cli._bench import (
    profile,
    shapes,
    sweep,
    sweep_report,
    sweep_session,
    sweep_timing,
)
from jax_rmsnorm.cli._bench.check import Check
from jax_rmsnorm.cli._bench.contenders import JaxContender, Kernel, Plain
from jax_rmsnorm.cli._bench.inputs import Pool
from jax_rmsnorm.cli._bench.profile import DeviceTime
from jax_rmsnorm.cli._bench.results import Cell, Row
from jax_rmsnorm.cli._bench.shapes import Case
from jax_rmsnorm.cli._bench.timing import Call

FAST = dataclasses.replace(
    sweep_timing.PLANS["cpu"],
    seconds=1e-3,
    sample_seconds=2e-3,
    max_rounds=3,
)
ELEMENTS = 2**14
SEVERAL_SETS = dataclasses.replace(FAST, min_sets=3, max_sets=3)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweep_timing.PLANS, "cpu", FAST)
    monkeypatch.setitem(sweep.TENSOR_BYTES, "cpu", 2 * ELEMENTS)


def bench(*options: str) -> int:
    return cli.main(["bench", *options])


def test_a_sweep_prints_counts_and_writes_every_point(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    assert bench("--sweep", "3", "--seed", "5", "--json", str(path)) == 0

    printed = capsys.readouterr().out
    for text in (
        "3 of 3 shapes",
        "of 3 shapes are slower than jnp by more than 5% and 0.3 µs",
        "roof did not take part: it is a CUDA kernel",
    ):
        assert text in printed

    found = json.loads(path.read_text())
    assert found["sweep"] == {"shapes": 3, "seed": 5}
    drawn = sweep.draw_shapes(3, 5, ELEMENTS)
    cases = [(case["op"], case["rows"], case["hidden"]) for case in found["cases"]]
    assert cases == [(op, *shape) for op in shapes.OPS for shape in drawn]
    for case in found["cases"]:
        assert case["x_dtype"] == case["gamma_dtype"] == "bfloat16"
        times = {name: cell["call"]["median_us"] for name, cell in case["contenders"].items()}
        assert all(0 < time < 1e6 for time in times.values())
        assert case["speedup"] == pytest.approx(times["jnp"] / times["kernel"])


def test_a_kernel_that_is_wrong_fails_the_sweep(monkeypatch, capsys):
    class Wrong(Plain):
        def call(self, case: Case) -> Call:
            right = super().call(case)
            return Call(lambda *args: (right.function(*args)[0] * 1.1,), right.operands)

    monkeypatch.setattr(sweep_session, "Kernel", Wrong)
    assert bench("--sweep", "1", "--ops", "forward", "--dtypes", "float32") == 1
    captured = capsys.readouterr()
    assert "the kernel did not pass: forward float32" in captured.err
    assert "y has a relative error of 0.1" in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sweep", "0"), "--sweep: must be 1 or more, got 0"),
        (("--sweep", "many"), "argument --sweep: invalid int value"),
        (("--sweep", "2", "--shapes", "8x8"), "--shapes: not together with --sweep"),
        (("--sweep", "2", "--remat"), "--remat: only together with --step"),
        (("--sweep", "2", "--step"), "--sweep: not together with --step"),
        (("--sweep", "2", "--dtypes", "float32", "float16"), "--dtypes: takes one with --sweep"),
        (("--seed", "0"), "--seed: only together with --sweep"),
    ],
)
def test_wrong_options_exit_with_2_and_name_the_option(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench(*options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("elements", [2**23, 2**26])
def test_shapes_are_repeatable_within_limits_and_log_uniform(elements):
    drawn = sweep.draw_shapes(4000, 1, elements)
    assert drawn == sweep.draw_shapes(4000, 1, elements)
    assert drawn[:50] == sweep.draw_shapes(50, 1, elements)
    assert drawn[:50] != sweep.draw_shapes(50, 2, elements)
    rows, hidden = np.array(drawn).T
    assert rows.min() == 1
    most_rows = min(2**20, elements // 32)
    assert most_rows / 2 < rows.max() <= most_rows
    assert 32 <= hidden.min() < 40
    assert 2**16 < hidden.max() <= 2**17
    assert elements / 2 < (rows * hidden).max() <= elements
    # By chance, an eighth of the three sizes in ten that are not rounded.
    assert np.mean(hidden % 8 == 0) == pytest.approx(0.7 + 0.3 / 8, abs=0.03)
    for octave in range(5, 17):
        inside = (hidden >= 2**octave) & (hidden < 2 ** (octave + 1))
        assert np.mean(inside) == pytest.approx(1 / 12, abs=0.02)


def test_a_row_longer_than_the_limit_is_still_a_row():
    assert {rows for rows, _ in sweep.draw_shapes(50, 0, 16)} == {1}


def row(op: shapes.Op, rows: int, kernel: float, roof: float | None, plain: float | None) -> Row:
    """With times in microseconds; hidden is 16384 in 2-byte elements, so 1024 rows are 32 MiB."""

    def cell(microseconds: float | None) -> Cell:
        if microseconds is None:
            return Cell("failed", "on purpose")
        return Cell("timed", device=DeviceTime(microseconds * 1e-6, 1.0, {}))

    cells = {"kernel": cell(kernel), "roof": cell(roof), "jnp": cell(plain)}
    return Row(Case(op, rows, 16384, "bfloat16", "bfloat16"), 4, cells)


def test_the_farthest_from_the_roof_are_large_and_in_order():
    rows = [
        row("forward", 1024, 10, 9, 20),
        row("forward", 1023, 10, 1, 20),
        row("forward", 2048, 10, 7, 20),
        row("forward", 4096, 10, None, 20),
        row("forward", 4096, 10, 8, None),
    ]
    found = sweep.farthest_from_roof(rows)
    assert [one.of_roof("kernel") for one in found] == pytest.approx([0.7, 0.8, 0.9])


def test_slower_than_plain_is_by_a_share_and_by_seconds():
    rows = [
        row("forward", 1, 2.0, None, 1.75),  # by 14 %, but 0.25 µs
        row("forward", 2, 2.0, None, 1.65),
        row("backward", 3, 100.0, None, 96.0),  # by 4 µs, but 4.2 %
        row("backward", 4, 100.0, None, 60.0),
        row("backward", 5, 100.0, None, 101.0),
        row("backward", 6, 100.0, None, None),
    ]
    assert [one.case.rows for one in sweep.slower_than_plain(rows)] == [4, 2]


def test_the_tables_show_ten_of_all_and_the_notes_count():
    rows = [row("forward", 1024 + i, 100, 50 + i, 200) for i in range(12)]
    rows += [row("backward", 2048 + i, 100, 90, 50 + i) for i in range(11)]
    console = Console(width=200, record=True, highlight=False)
    console.print(*sweep_report.tables(rows), *sweep_report.notes(rows, {}), sep="\n")
    printed = console.export_text()
    assert "forward, tensors of 32 MiB or more: farthest from the roof (10 of 12)" in printed
    assert "backward, tensors of 32 MiB or more: farthest from the roof (10 of 11)" in printed
    assert "slower than jnp (10 of 11)" in printed
    assert "backward, bfloat16: 11 of 11 shapes are slower than jnp" in printed
    assert "forward, bfloat16: 0 of 12 shapes are slower than jnp" in printed
    lines = printed.splitlines()
    shown = [line for line in lines if line.startswith(" forward ")]
    assert len(shown) == 10
    assert "1024x16384" in shown[0]
    assert "0.500" in shown[0]
    assert "2.00x" in shown[0]


class Variants(JaxContender):
    """In the roof's place: two calls, of which the second is said to be the faster."""

    name = "roof"

    def call(self, case: Case) -> Call:
        raise NotImplementedError

    def calls(self, case: Case) -> Sequence[Call]:
        assert case.tensor_bytes % 16 == 0
        self.measured = case
        return [Call(lambda x, _, k=k: (x + k,), lambda inputs: (inputs.x, ())) for k in (1, 2)]


def test_a_profile_holds_all_programs_and_keeps_the_fastest_variant(monkeypatch):
    groups: list[Any] = []

    def measure_groups(calls: Sequence[Sequence[Any]], mark: Any) -> list[DeviceTime]:
        groups.extend([call() for call in group] for group in calls)
        return [DeviceTime(1e-6 * (20 - number), 1.0, {}) for number in range(len(calls))]

    monkeypatch.setattr(profile, "measure_groups", measure_groups)
    variants = Variants()
    contenders = {"kernel": Kernel(), "jnp": Plain(), "roof": variants}
    pool = Pool(ELEMENTS, 3, "bfloat16", "float32")
    timer = sweep_timing.Timer(contenders, SEVERAL_SETS, pool)
    cases = [Case(op, 5, 37, "bfloat16", "float32") for op in shapes.OPS]
    rows = timer.profile(cases, mark=None)

    # 5 x 37 elements of 2 bytes are 23 words of 16 bytes and a part of one.
    assert variants.measured.shape == (24, 8)
    assert [one.case for one in rows] == cases
    assert [one.sets for one in rows] == [3, 3]
    microseconds = [{name: one.seconds(name) * 1e6 for name in one.cells} for one in rows]
    assert microseconds[0] == pytest.approx({"kernel": 20, "jnp": 19, "roof": 17})
    assert microseconds[1] == pytest.approx({"kernel": 16, "jnp": 15, "roof": 13})

    sets = pool.draw(cases[0], 3)
    for case, (kernel, plain, *_) in zip(cases, (groups[:4], groups[4:]), strict=True):
        for results in (kernel, plain):
            assert len(results) == profile.CALLS
            for number, result in enumerate(results):
                assert Check(case, sets[number % 3]).problem(result) is None
                assert Check(case, sets[(number + 1) % 3]).problem(result) is not None


def test_what_does_not_compile_is_a_failure_and_the_rest_is_timed(monkeypatch):
    class Broken(Plain):
        def call(self, case: Case) -> Call:
            return Call(lambda x, gamma: x.no_such_method(), super().call(case).operands)

    monkeypatch.setattr(
        profile, "measure_groups", lambda groups, mark: [DeviceTime(1e-6, 1.0, {}) for _ in groups]
    )
    pool = Pool(ELEMENTS, 3, "float32", "float32")
    timer = sweep_timing.Timer({"kernel": Kernel(), "jnp": Broken()}, SEVERAL_SETS, pool)
    cases = [Case("forward", 4, 48, "float32", "float32")]
    for (one,) in (timer.profile(cases, mark=None), timer.loop(cases)):
        assert one.cells["jnp"].status == "failed"
        assert "no_such_method" in one.cells["jnp"].message
        assert one.seconds("jnp") is None
        assert 0 < one.seconds("kernel") < 1


@pytest.mark.parametrize("fails", ["mark", "measure_groups"])
def test_without_a_profile_calls_are_timed_in_loops(fails, monkeypatch, capsys):
    def fail(*_: Any) -> Any:
        raise profile.ProfileError("on purpose")

    monkeypatch.setattr(sweep_session, "Mark", fail if fails == "mark" else lambda: None)
    monkeypatch.setattr(profile, "measure_groups", fail)
    console = Console(width=200)
    mark = object() if fails == "measure_groups" else sweep_session._make_mark(console)
    timer = sweep_timing.Timer({"kernel": Kernel()}, FAST, Pool(ELEMENTS, 1, "float32", "float32"))
    runner = sweep_session._Runner(timer, mark, [], console)
    (one,) = runner.measure([Case("forward", 4, 48, "float32", "float32")])
    assert one.cells["kernel"].timing.median > 0
    assert "in loops" in capsys.readouterr().out


def test_inputs_of_a_pool_differ_and_are_normal():
    pool = Pool(ELEMENTS, 3, "bfloat16", "float32")
    case = Case("forward", 128, 128, "bfloat16", "float32")
    sets = pool.draw(case, 3)
    arrays = [np.asarray(a, np.float32) for one in sets for a in (one.x, one.dy)]
    for number, array in enumerate(arrays):
        assert array.shape == case.shape
        assert array.std() == pytest.approx(1, abs=0.05)
        for other in arrays[:number]:
            assert abs(np.corrcoef(array.ravel(), other.ravel())[0, 1]) < 0.05
    assert sets[0].x.dtype == jnp.bfloat16
    assert sets[0].gamma.dtype == jnp.float32
    assert sets[0].gamma.shape == (128,)


MARKED = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "mark" } }
  event_metadata { key: 2 value { id: 2 name: "main" } }
  event_metadata { key: 3 value { id: 3 name: "finish" } }
  event_metadata { key: 4 value { id: 4 name: "stray" } }
  lines {
    name: "Stream #17(Compute)"
    events { metadata_id: 4 offset_ps: 0 duration_ps: 1000000 }
    events { metadata_id: 1 offset_ps: 10000000 duration_ps: 9000000 }
    events { metadata_id: 2 offset_ps: 20000000 duration_ps: 3000000 }
    events { metadata_id: 2 offset_ps: 30000000 duration_ps: 5000000 }
    events { metadata_id: 1 offset_ps: 40000000 duration_ps: 9000000 }
    events { metadata_id: 2 offset_ps: 50000000 duration_ps: 2000000 }
    events { metadata_id: 3 offset_ps: 53000000 duration_ps: 1000000 }
  }
}
"""


def parse(text: str) -> ProfileData:
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


def test_marks_separate_the_groups_of_a_profile():
    first, second = profile.summarize_groups(parse(MARKED), [2, 1], {"mark"})
    assert first.seconds == pytest.approx(4e-6)
    assert (first.events_per_call, second.events_per_call) == (1, 2)
    assert second.seconds == pytest.approx(3e-6)
    assert second.kernels == pytest.approx({"main": 2e-6, "finish": 1e-6})


def test_groups_that_are_missing_are_an_error():
    with pytest.raises(profile.ProfileError, match="2 groups of kernels instead of 3"):
        profile.summarize_groups(parse(MARKED), [2, 1, 1], {"mark"})
