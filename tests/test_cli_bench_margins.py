"""``jax-rmsnorm bench --margins``: the refusal on a CPU, and its parts on a small shape."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from jax_rmsnorm import cli
from jax_rmsnorm.cli._bench import margins, shapes, timing
from jax_rmsnorm.cli._bench.contenders import Kernel
from jax_rmsnorm.cli._bench.margins import Point
from jax_rmsnorm.cli._bench.shapes import Case
from jax_rmsnorm.cli._bench.timing import Call, Timing
from jax_rmsnorm.cli._errors import CommandError

FAST = dataclasses.replace(
    timing.PLANS["cpu"],
    seconds=1e-3,
    sample_seconds=2e-3,
    min_rounds=3,
    max_rounds=3,
    budget_seconds=0.0,
)
CASE = Case("forward", 16, 64, "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--margins: needs a GPU"),
        (("--sweep", "2"), "--margins: not together with --sweep"),
        (("--dtypes", "float32"), "--dtypes: not together with --margins"),
    ],
)
def test_it_refuses_a_cpu_and_options_that_it_does_not_take(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", "--margins", *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def point(margin: int, microseconds: float) -> Point:
    return Point(CASE, margin, 100, Timing(microseconds * 1e-6, 0.0, 0.0, 3), 1e-5)


@pytest.mark.parametrize(
    ("microseconds", "falls_faster"), [(10.0, False), (12.7, False), (12.9, True), (20.0, True)]
)
def test_a_fall_is_flagged_from_two_points_below_the_sms(microseconds, falls_faster):
    found = point(20, microseconds)
    assert found.of_sms == pytest.approx(0.8)
    assert found.of_bandwidth == pytest.approx(10 / microseconds)
    assert found.falls_faster == falls_faster


def test_the_table_and_the_json_have_a_line_for_each_point():
    points = [point(0, 10.0), point(4, 10.0), point(32, 20.0)]
    console = Console(width=200, record=True)
    console.print(margins.table(points))
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines if "0." in line or "1.000" in line] == [
        "0",
        "4",
        "32",
    ]
    (flagged,) = (line for line in lines if "falls faster" in line)
    assert flagged.split()[:6] == ["32", "20.0", "0.00", "0.2", "0.500", "0.680"]

    found = margins.to_json(points, {"device": "none"})
    assert found["environment"] == {"device": "none"}
    assert [one["sm_margin"] for one in found["margins"]] == [0, 4, 32]
    assert [one["falls_faster"] for one in found["margins"]] == [False, False, True]
    assert found["margins"][2]["median_us"] == pytest.approx(20)
    assert found["margins"][2]["rows"] == CASE.rows


@pytest.mark.parametrize("op", shapes.OPS)
def test_all_margins_are_checked_and_timed(op):
    case = dataclasses.replace(CASE, op=op)
    found = list(margins.measure(case, [0, 4], 132, FAST))
    assert [one.margin for one in found] == [0, 4]
    assert found[0].of_bandwidth == 1
    assert all(0 < one.timing.median < 1 for one in found)


def test_a_wrong_result_ends_the_run(monkeypatch):
    class Wrong(Kernel):
        def call(self, case: Case) -> Call:
            right = super().call(case)
            return Call(lambda *args: (right.function(*args)[0] * 0,), right.operands)

    monkeypatch.setattr(margins, "Kernel", Wrong)
    with pytest.raises(CommandError, match=r"sm_margin=0, forward .* relative error of 1"):
        list(margins.measure(CASE, [0, 4], 132, FAST))
