"""What a run found: a cell for each case and contender, and what follows from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from .names import KERNEL, ROOF
from .profile import DeviceTime
from .shapes import Case
from .timing import Timing

Status = Literal["timed", "wrong", "failed"]


@dataclasses.dataclass
class Cell:
    """One contender in one case. Times are in seconds a call."""

    status: Status
    message: str = ""
    timing: Timing | None = None
    chain: Timing | None = None
    device: DeviceTime | None = None

    @property
    def seconds(self) -> float | None:
        """The median of a call in a loop, or the device's time where that alone was measured."""
        if self.timing is not None:
            return self.timing.median
        return None if self.device is None else self.device.seconds


def failure(error: Exception) -> Cell:
    """The cell of a contender that raised."""
    return Cell("failed", describe(error))


def describe(error: Exception) -> str:
    """An error on one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One case with all its contenders."""

    case: Case
    sets: int
    cells: Mapping[str, Cell]

    def seconds(self, name: str, *, chain: bool = False) -> float | None:
        """A contender's time; None if there is none."""
        cell = self.cells.get(name)
        if cell is None:
            return None
        if not chain:
            return cell.seconds
        return None if cell.chain is None else cell.chain.median

    def bytes_per_second(self, name: str) -> float | None:
        seconds = self.seconds(name)
        return None if seconds is None else self.case.moved_bytes / seconds

    def of_roof(self, name: str) -> float | None:
        """The roof's time over a contender's."""
        return _ratio(self.seconds(ROOF), self.seconds(name))

    def best_other(self, *, chain: bool = False) -> str | None:
        """The fastest norm that is not this package's."""
        times = {
            name: seconds
            for name in self.cells
            if name not in (KERNEL, ROOF) and (seconds := self.seconds(name, chain=chain))
        }
        return min(times, key=times.__getitem__, default=None)

    def speedup(self, *, over: str | None, chain: bool = False) -> float | None:
        """A contender's time over the kernel's."""
        if over is None:
            return None
        return _ratio(self.seconds(over, chain=chain), self.seconds(KERNEL, chain=chain))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Geometric means over the shapes of one operation and its dtypes, of those rows that have the ratio."""

    op: str
    dtypes: str
    speedup: float | None
    of_roof: float | None
    over: Mapping[str, float | None]


def summarize(rows: Iterable[Row]) -> Iterator[Summary]:
    """One summary for each operation and dtypes, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.op, row.case.dtypes), []).append(row)
    for (op, dtypes), group in groups.items():
        names = dict.fromkeys(name for row in group for name in row.cells if name != KERNEL)
        yield Summary(
            op=op,
            dtypes=dtypes,
            speedup=_geometric_mean(row.speedup(over=row.best_other()) for row in group),
            of_roof=_geometric_mean(row.of_roof(KERNEL) for row in group),
            over={name: _geometric_mean(row.speedup(over=name) for row in group) for name in names},
        )


def to_json(
    rows: Iterable[Row], environment: Mapping[str, Any], absent: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that was found, in microseconds and bytes."""
    rows = list(rows)
    return {
        "environment": dict(environment),
        "absent": dict(absent),
        "cases": [_row_to_json(row) for row in rows],
        "geometric_means": [dataclasses.asdict(summary) for summary in summarize(rows)],
    }


def _row_to_json(row: Row) -> dict[str, Any]:
    best = row.best_other()
    return {
        **dataclasses.asdict(row.case),
        "moved_bytes": row.case.moved_bytes,
        "input_sets": row.sets,
        "best_other": best,
        "speedup": row.speedup(over=best),
        "contenders": {name: _cell_to_json(row, name) for name in row.cells},
    }


def _cell_to_json(row: Row, name: str) -> dict[str, Any]:
    cell = row.cells[name]
    found: dict[str, Any] = {"status": cell.status}
    if cell.message:
        found["message"] = cell.message
    for key, timing in (("call", cell.timing), ("chain", cell.chain)):
        if timing is not None:
            found[key] = {
                "median_us": timing.median * 1e6,
                "quartiles_us": [timing.lower * 1e6, timing.upper * 1e6],
                "samples": timing.samples,
            }
    if cell.seconds is not None:
        found["bytes_per_second"] = row.bytes_per_second(name)
        found["of_roof"] = row.of_roof(name)
    if cell.device is not None:
        found["device"] = {
            "us": cell.device.seconds * 1e6,
            "events_per_call": cell.device.events_per_call,
            "kernels_us": {kernel: s * 1e6 for kernel, s in cell.device.kernels.items()},
        }
    return found


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def _geometric_mean(ratios: Iterable[float | None]) -> float | None:
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None
