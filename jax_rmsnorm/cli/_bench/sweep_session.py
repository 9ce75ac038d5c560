"""One sweep: random shapes, timed in batches, and those that deserve a look."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .._errors import CommandError, OptionError
from . import environment, report, results, shapes, sweep, sweep_report
from .contenders import Kernel, Plain, Roof
from .inputs import Pool
from .names import KERNEL, ROOF
from .profile import Mark
from .results import Cell, Row, describe
from .shapes import ITEM_BYTES, Case
from .sweep_timing import PLANS, Contenders, Timer

_BATCH = 8  # shapes: few enough for memory, enough for a profile to be worth its start
_CHECKED_SHAPES = 4
_CHECKED_ELEMENTS = 2**20  # float64 takes its time over larger tensors


@dataclasses.dataclass(frozen=True)
class Request:
    """The options as they were given; None is for the default."""

    count: int
    seed: int | None = None
    dtypes: Sequence[str] | None = None
    ops: Sequence[shapes.Op] | None = None
    json: Path | None = None
    profile: bool = True


def run(request: Request) -> None:
    """Measures, prints the tables, writes the file.

    Raises:
        OptionError: an option names something that is not there.
        CommandError: there is no kernel here, or its results are wrong.
    """
    device = environment.find_device(PLANS)
    dtypes = shapes.parse_dtypes(request.dtypes or ["bfloat16"])
    if len(dtypes) > 1:
        raise OptionError(f"--dtypes: takes one with --sweep, got {len(dtypes)}")
    environment.require_kernels(device)
    contenders, absent = _contenders(device)
    started = time.perf_counter()
    surroundings = environment.describe()
    console = report.make_console()
    report.print_environment(console, surroundings)

    seed = request.seed or 0
    elements = sweep.TENSOR_BYTES[device] // ITEM_BYTES[dtypes[0][0]]
    drawn = sweep.draw_shapes(request.count, seed, elements)
    largest = max(rows * hidden for rows, hidden in drawn)
    small = [shape for shape in drawn if shape[0] * shape[1] <= _CHECKED_ELEMENTS]
    plan = PLANS[device]
    runner = _Runner(
        timer=Timer(contenders, plan, Pool(largest, plan.max_sets, *dtypes[0])),
        mark=_make_mark(console) if request.profile and device == "gpu" else None,
        checked=small[:_CHECKED_SHAPES],
        console=console,
    )
    rows: list[Row] = []
    for start in range(0, len(drawn), _BATCH):
        batch = drawn[start : start + _BATCH]
        rows += runner.measure(list(shapes.cases(request.ops or shapes.OPS, dtypes, batch)))
        seconds = time.perf_counter() - started
        console.print(f"{start + len(batch)} of {len(drawn)} shapes ({seconds:.0f} s)")
        if request.json is not None:
            drawing = {"shapes": request.count, "seed": seed}
            found = results.to_json(rows, surroundings, absent)
            report.write_json(request.json, {"sweep": drawing, **found})

    console.print()
    for table in sweep_report.tables(rows):
        report.print_table(console, table)
    for note in sweep_report.notes(rows, absent):
        console.print(note)
    bad = [f"{row.case}" for row in rows if row.cells[KERNEL].status != "timed"]
    if bad:
        raise CommandError(f"the kernel did not pass: {', '.join(bad)}")


def _contenders(device: str) -> tuple[Contenders, dict[str, str]]:
    """Those that take part, and the reason if the roof does not."""
    contenders: Contenders = {KERNEL: Kernel(), sweep.PLAIN: Plain()}
    roof = Roof()
    reason = roof.why_not(device)
    return (contenders, {ROOF: reason}) if reason else ({**contenders, ROOF: roof}, {})


def _make_mark(console: Console) -> Mark | None:
    try:
        return Mark()
    except Exception as error:  # profilers fail in many ways, and there are other ways to time
        console.print(f"Calls are timed in loops, without a profile: {describe(error)}")
        return None


@dataclasses.dataclass
class _Runner:
    timer: Timer
    mark: Mark | None
    checked: Sequence[shapes.Shape]
    console: Console

    def measure(self, cases: Sequence[Case]) -> list[Row]:
        """Times the cases, and checks the kernel's results where that was asked for."""
        return [self._check(row) for row in self._time(cases)]

    def _time(self, cases: Sequence[Case]) -> list[Row]:
        if self.mark is not None:
            try:
                return self.timer.profile(cases, self.mark)
            except Exception as error:  # as above
                self.console.print(f"The next shapes are timed in loops: {describe(error)}")
        return self.timer.loop(cases)

    def _check(self, row: Row) -> Row:
        if row.case.shape not in self.checked or row.cells[KERNEL].status != "timed":
            return row
        problem = self.timer.problem(row.case)
        if problem is None:
            return row
        return dataclasses.replace(row, cells={**row.cells, KERNEL: Cell("wrong", problem)})
