"""What SM margins cost: the kernel's bandwidth at each, beside the SMs that are left to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .._errors import CommandError, OptionError
from . import environment, inputs, report, shapes
from .check import Check
from .contenders import Kernel
from .shapes import Case, Op
from .timing import PLANS, Plan, Timing, race

_MARGINS = (0, 1, 4, 8, 16, 32, 64)
_SHAPE = (16384, 4096)
_DTYPE = "bfloat16"
_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Point:
    """One operation at one margin.

    Attributes:
        sms: how many the device has.
        timing: of a call.
        free_seconds: the median without a margin.
    """

    case: Case
    margin: int
    sms: int
    timing: Timing
    free_seconds: float

    @property
    def of_bandwidth(self) -> float:
        """The bandwidth as a fraction of that without a margin."""
        return self.free_seconds / self.timing.median

    @property
    def of_sms(self) -> float:
        """The SMs left to the kernel, as a fraction."""
        return (self.sms - self.margin) / self.sms

    @property
    def falls_faster(self) -> bool:
        """Whether it loses notably more bandwidth than SMs."""
        return self.of_bandwidth < self.of_sms - _TOLERANCE


def run(ops: Sequence[Op] | None, json: Path | None) -> None:
    """Measures, prints the table, writes the file.

    Raises:
        OptionError: there is no GPU.
        CommandError: there is no kernel here, or its results are wrong.
    """
    if environment.find_device(PLANS) != "gpu":
        raise OptionError("--margins: needs a GPU: kernels on a CPU have no SMs to leave free")
    environment.require_kernels("gpu")
    surroundings = environment.describe()
    console = report.make_console()
    report.print_environment(console, surroundings)

    sms: int = jax.devices()[0].core_count
    margins = [margin for margin in _MARGINS if margin < sms]
    points: list[Point] = []
    for op in ops or shapes.OPS:
        case = Case(op, *_SHAPE, _DTYPE, _DTYPE)
        points += measure(case, margins, sms, PLANS["gpu"])
        if json is not None:
            report.write_json(json, to_json(points, surroundings))
    report.print_table(console, table(points))
    console.print(
        f"{sms} SMs. ±: half the distance of the quartiles. falls faster: more than {100 * _TOLERANCE:.0f} points "
        "below the SMs that are left."
    )


def measure(case: Case, margins: Sequence[int], sms: int, plan: Plan) -> Iterator[Point]:
    """Times the kernel at all margins in turns; the first of them is 0.

    Raises:
        CommandError: a result is wrong.
    """
    sets = inputs.draw(case, plan.sets(case))
    check = Check(case, sets[0])
    ready = [Kernel(margin).prepare(case, sets, plan) for margin in margins]
    for margin, prepared in zip(margins, ready, strict=True):
        problem = check.problem(prepared.results())
        if problem is not None:
            raise CommandError(f"sm_margin={margin}, {case}: {problem}")
    times = race([prepared.sample for prepared in ready], plan)
    for margin, timing in zip(margins, times, strict=True):
        yield Point(case, margin, sms, timing, times[0].median)


def table(points: Sequence[Point]) -> Table:
    """A section for each operation, a line for each margin."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, title="SM margins", title_justify="left")
    for header in ("sm_margin", "µs", "±", "GB/s", "of margin 0's", "SMs left"):
        shown.add_column(header, justify="right")
    shown.add_column("")
    for case in dict.fromkeys(point.case for point in points):
        shown.add_row(str(case), style="bold")
        for point in points:
            if point.case == case:
                shown.add_row(*_line(point))
        shown.add_section()
    return shown


def _line(point: Point) -> Iterator[str]:
    timing = point.timing
    yield str(point.margin)
    yield report.microseconds(timing.median)
    yield report.microseconds((timing.upper - timing.lower) / 2)
    yield report.gigabytes(point.case.moved_bytes / timing.median) or ""
    yield f"{point.of_bandwidth:.3f}"
    yield f"{point.of_sms:.3f}"
    yield "falls faster" if point.falls_faster else ""


def to_json(points: Sequence[Point], surroundings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was found, in microseconds."""
    return {"environment": dict(surroundings), "margins": list(map(_point_to_json, points))}


def _point_to_json(point: Point) -> dict[str, Any]:
    return {
        **dataclasses.asdict(point.case),
        "sm_margin": point.margin,
        "sms": point.sms,
        "median_us": point.timing.median * 1e6,
        "quartiles_us": [point.timing.lower * 1e6, point.timing.upper * 1e6],
        "samples": point.timing.samples,
        "of_bandwidth": point.of_bandwidth,
        "of_sms": point.of_sms,
        "falls_faster": point.falls_faster,
    }
