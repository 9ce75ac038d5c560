"""One run: every case with every contender, checked, timed in turns, and reported."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import CommandError, OptionError
from . import environment, inputs, report, results, shapes
from .check import Check
from .contenders import Contender
from .names import KERNEL, RIVALS, ROOF
from .peers import CONTENDERS
from .results import Cell, Row, describe, failure
from .shapes import Case
from .timing import PLANS, Plan, Prepared, race

_CACHE_BYTES = {"cpu": 0, "gpu": 60 * 2**20}  # the second level on an H200
_PROFILED = {KERNEL, ROOF, "jnp"}  # enough to tell launch gaps from kernels


@dataclasses.dataclass(frozen=True)
class Request:
    """The options as they were given; None is for the device's default."""

    shapes: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    ops: Sequence[shapes.Op] | None = None
    against: Sequence[str] | None = None
    json: Path | None = None
    plot: Path | None = None
    profile: bool = True


def run(request: Request) -> None:
    """Measures, prints the table, writes the files.

    Raises:
        OptionError: an option names something that is not there.
        CommandError: there is no kernel here, or its results are wrong.
    """
    device = environment.find_device(PLANS)
    defaults = shapes.DEFAULTS[device]
    cases = list(
        shapes.cases(
            request.ops or shapes.OPS,
            shapes.parse_dtypes(request.dtypes or defaults.dtypes),
            shapes.parse_shapes(request.shapes or defaults.shapes),
        )
    )
    contenders, absent = _choose(request.against, device)
    environment.require_kernels(device)
    started = time.perf_counter()
    surroundings = environment.describe()
    console = report.make_console()
    report.print_environment(console, surroundings)

    runner = _Runner(contenders, PLANS[device], profile=request.profile and device == "gpu")
    rows: list[Row] = []
    for case in cases:
        began = time.perf_counter()
        rows.append(runner.measure(case))
        console.print(report.progress(rows[-1], time.perf_counter() - began))
        if request.json is not None:
            report.write_json(request.json, results.to_json(rows, surroundings, absent))

    console.print()
    report.print_table(console, report.table(rows))
    console.print(f"{len(rows)} cases in {time.perf_counter() - started:.0f} s.")
    for note in report.notes(rows, absent, _CACHE_BYTES[device]):
        console.print(note)
    if request.plot is not None:
        from . import chart

        title = f"RMSNorm on {surroundings['device']}, jax {surroundings['jax']}"
        chart.draw(rows, request.plot, title)
    bad = [f"{row.case}" for row in rows if row.cells[KERNEL].status != "timed"]
    if bad:
        raise CommandError(f"the kernel did not pass: {', '.join(bad)}")


def _choose(
    names: Sequence[str] | None, device: str
) -> tuple[Mapping[str, Contender], dict[str, str]]:
    """The kernel and its rivals, and for each that cannot take part the reason."""
    for name in names or ():
        if name not in RIVALS:
            raise OptionError(f"--against: must be of {', '.join(RIVALS)}, got {name!r}")
    wanted = names or (RIVALS if device == "gpu" else ("jnp",))
    reasons = {name: CONTENDERS[name].why_not(device) for name in dict.fromkeys(wanted)}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    if names and absent:
        raise OptionError(
            "--against: " + "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        )
    return {name: CONTENDERS[name] for name in (KERNEL, *reasons) if name not in absent}, absent


@dataclasses.dataclass
class _Runner:
    contenders: Mapping[str, Contender]
    plan: Plan
    profile: bool

    def measure(self, case: Case) -> Row:
        """Prepares, checks and times all contenders on the same inputs."""
        sets = inputs.draw(case, self.plan.sets(case))
        check = Check(case, sets[0])
        cells: dict[str, Cell] = {}
        ready: dict[str, Prepared] = {}
        for name, contender in self.contenders.items():
            try:
                ready[name] = contender.prepare(case, sets, self.plan)
                problem = contender.problem(ready[name].results(), check)
                cells[name] = Cell("timed") if problem is None else Cell("wrong", problem)
            except Exception as error:  # a rival may raise anything, and the run goes on
                cells[name] = failure(error)
        ready = {
            name: prepared for name, prepared in ready.items() if cells[name].status == "timed"
        }
        for name, timing in self._race(ready, cells):
            cells[name].timing = timing
        if self.profile:
            self._profile(ready, cells)
        if case.is_latency:
            del ready
            for name, timing in self._race(self._chains(case, sets, cells), cells):
                cells[name].chain = timing
        return Row(case, len(sets), cells)

    def _race(self, ready: Mapping[str, Prepared], cells: dict[str, Cell]) -> Iterator[Any]:
        return zip(ready, race([one.sample for one in ready.values()], self.plan), strict=True)

    def _chains(
        self, case: Case, sets: Sequence[inputs.Inputs], cells: Mapping[str, Cell]
    ) -> dict[str, Prepared]:
        stationary = [inputs.stationary(sets[0])]
        chains: dict[str, Prepared] = {}
        for name, cell in cells.items():
            if cell.status == "timed":
                try:
                    contender = self.contenders[name]
                    chains[name] = contender.prepare(case, stationary, self.plan, chain=True)
                except Exception as error:
                    cell.message = f"no chain: {describe(error)}"
        return chains

    def _profile(self, ready: Mapping[str, Prepared], cells: Mapping[str, Cell]) -> None:
        for name in _PROFILED & ready.keys():
            try:
                cells[name].device = ready[name].profile()
            except Exception as error:  # profilers fail in many ways, and the times are there
                cells[name].message = f"no device time: {describe(error)}"
