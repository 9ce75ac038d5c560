"""The table, and what is printed around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .names import KERNEL, ROOF
from .results import Cell, Row, Summary, summarize


def make_console() -> Console:
    """Standard output, with text as it is: no markup, no coloured numbers, no hard wraps."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def print_environment(console: Console, environment: Mapping[str, str]) -> None:
    """A line for each of what the times depend on."""
    for name, value in environment.items():
        console.print(f"{name}: {value}")
    console.print()


def print_table(console: Console, shown: Table) -> None:
    """Prints the table as wide as it is: a cell that is cut off says nothing."""
    endless = console.options.update(width=10**4)
    width = Measurement.get(console, endless, shown).maximum
    Console(file=console.file, highlight=False, markup=False, width=width).print(shown)


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Writes all that was found; called after every case, so that a run that is cut short leaves what it has."""
    path.write_text(json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def progress(row: Row, seconds: float) -> str:
    """One line on a case that is done."""
    cells = ", ".join(f"{name} {_plain(cell)}" for name, cell in row.cells.items())
    return f"{row.case}: {cells} ({seconds:.1f} s)"


def _plain(cell: Cell) -> str:
    return cell.status if cell.timing is None else f"{microseconds(cell.timing.median)} µs"


class _Column(NamedTuple):
    header: str
    of_row: Callable[[Row], str | None]
    of_summary: Callable[[Summary], str | None] = lambda summary: None


def table(rows: Sequence[Row]) -> Table:
    """A section for each operation and its dtypes, with a line a shape and one of geometric means."""
    others = list(
        dict.fromkeys(name for row in rows for name in row.cells if name not in (KERNEL, ROOF))
    )
    columns = list(_columns(rows, others))
    shown = Table(
        box=SIMPLE_HEAD, pad_edge=False, title="microseconds a call", title_justify="left"
    )
    shown.add_column("rows x hidden")
    for column in columns:
        shown.add_column(column.header, justify="right")
    for summary in summarize(rows):
        shown.add_row(f"{summary.op}, {summary.dtypes}", style="bold")
        for row in rows:
            if (row.case.op, row.case.dtypes) == (summary.op, summary.dtypes):
                shown.add_row(row.case.size, *(column.of_row(row) or "-" for column in columns))
        means = (column.of_summary(summary) or "" for column in columns)
        shown.add_row("geometric mean", *means, end_section=True)
    return shown


def _columns(rows: Sequence[Row], others: Sequence[str]) -> Iterator[_Column]:
    yield _Column(KERNEL, lambda row: entry(row, KERNEL))
    yield _Column("±", lambda row: _spread(row.cells[KERNEL]))
    if any(row.cells[KERNEL].device for row in rows):
        yield _Column("profiled", lambda row: _device(row.cells[KERNEL]))
    yield _Column("GB/s", lambda row: gigabytes(row.bytes_per_second(KERNEL)))
    if any(ROOF in row.cells for row in rows):
        yield _Column(ROOF, lambda row: entry(row, ROOF))
        yield _Column(
            "of roof",
            lambda row: decimals(row.of_roof(KERNEL)),
            lambda summary: decimals(summary.of_roof),
        )
    yield _Column("best other", lambda row: row.best_other())
    yield _Column(
        "speed-up",
        lambda row: times(row.speedup(over=row.best_other())),
        lambda summary: times(summary.speedup),
    )
    for name in others:
        yield _Column(
            name,
            lambda row, name=name: entry(row, name),
            lambda summary, name=name: times(summary.over.get(name)),
        )
    if any(row.cells[KERNEL].chain for row in rows):
        yield _Column("chain", lambda row: _chain(row, KERNEL))
        yield _Column("best other chain", _best_chain)


def notes(rows: Sequence[Row], absent: Mapping[str, str], cache_bytes: int) -> Iterator[str]:
    """What the table's numbers mean, and what it could not say in a cell."""
    yield (
        f"{KERNEL} and all other names: the median over several runs of a compiled loop of calls; ±: half "
        "the distance of its quartiles. GB/s: of x and y, or x, dy and dx. speed-up: the best other's "
        "time over the kernel's. geometric mean: of these, and of each contender's time over the kernel's."
    )
    if any(row.cells[KERNEL].device for row in rows):
        yield "profiled: the kernel's own launches without the gaps between them, from the profiler."
    if any(row.cells[KERNEL].chain for row in rows):
        yield "chain: calls that each take the result of the call before."
    if all(row.sets == 1 for row in rows):
        yield "All calls of a case have the same inputs, which a cache may hold."
    warm = [row.case for row in rows if row.sets * row.case.moved_bytes < cache_bytes]
    if warm:
        sizes = ", ".join(dict.fromkeys(case.size for case in warm))
        yield f"The input sets of {sizes} fit in the device's cache together: these times are warm."
    for name, reason in absent.items():
        yield f"{name} did not take part: {reason}."
    for row in rows:
        for name, cell in row.cells.items():
            if cell.message:
                yield f"{name}, {row.case}: {cell.status}: {cell.message}"


def entry(row: Row, name: str) -> str | None:
    """A contender's microseconds, or what became of it."""
    cell = row.cells.get(name)
    if cell is None:
        return None
    return cell.status if cell.seconds is None else microseconds(cell.seconds)


def _spread(cell: Cell) -> str | None:
    if cell.timing is None:
        return None
    return microseconds((cell.timing.upper - cell.timing.lower) / 2)


def _device(cell: Cell) -> str | None:
    return None if cell.device is None else microseconds(cell.device.seconds)


def _chain(row: Row, name: str) -> str | None:
    seconds = row.seconds(name, chain=True)
    return None if seconds is None else microseconds(seconds)


def _best_chain(row: Row) -> str | None:
    name = row.best_other(chain=True)
    return None if name is None else f"{name} {_chain(row, name)}"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}" if seconds < 1e-5 else f"{seconds * 1e6:.1f}"


def gigabytes(bytes_per_second: float | None) -> str | None:
    if bytes_per_second is None:
        return None
    return f"{bytes_per_second / 1e9:.{0 if bytes_per_second >= 1e11 else 1}f}"


def decimals(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.3f}"


def times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f}x"
