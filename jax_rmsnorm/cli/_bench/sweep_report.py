"""The tables of a sweep: where the kernels are farthest from the roof, and where they lose to `jnp`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import report, sweep
from .names import KERNEL, ROOF
from .results import Row, summarize

_SHOWN = 10


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One for each operation where there is a roof, and one of those slower than `jnp` where there are any."""
    for op, group in sweep.by_op(rows).items():
        farthest = sweep.farthest_from_roof(group)
        if farthest:
            title = f"{op}, tensors of {_mebibytes(sweep.LARGE_BYTES)} MiB or more: farthest from the roof"
            yield _table(title, farthest)
    slower = sweep.slower_than_plain(rows)
    if slower:
        yield _table(f"slower than {sweep.PLAIN}", slower)


def _table(title: str, rows: Sequence[Row]) -> Table:
    shown = rows[:_SHOWN]
    count = f"{len(shown)} of {len(rows)}"
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=f"{title} ({count}); µs", title_justify="left"
    )
    headers = ("MiB", KERNEL, "GB/s", ROOF, "of roof", sweep.PLAIN, "speed-up")
    table.add_column("operation")
    table.add_column("rows x hidden")
    for header in headers:
        table.add_column(header, justify="right")
    for row in shown:
        cells = (
            _mebibytes(row.case.tensor_bytes),
            report.entry(row, KERNEL),
            report.gigabytes(row.bytes_per_second(KERNEL)),
            report.entry(row, ROOF),
            report.decimals(row.of_roof(KERNEL)),
            report.entry(row, sweep.PLAIN),
            report.times(row.speedup(over=sweep.PLAIN)),
        )
        table.add_row(row.case.op, row.case.size, *(cell or "-" for cell in cells))
    return table


def notes(rows: Sequence[Row], absent: Mapping[str, str]) -> Iterator[str]:
    """What was found in all, how the times were taken, and what went wrong."""
    for op, group in sweep.by_op(rows).items():
        slower = len(sweep.slower_than_plain(group))
        (summary,) = summarize(group)
        yield (
            f"{op}, {summary.dtypes}: {slower} of {len(group)} shapes are slower than {sweep.PLAIN} by more than "
            f"{sweep.SLOWER:.0%} and {sweep.SLOWER_SECONDS * 1e6:.1f} µs; the geometric mean of the speed-up is "
            f"{report.times(summary.over.get(sweep.PLAIN)) or '-'}."
        )
    if any(cell.device for row in rows for cell in row.cells.values()):
        yield "Times are those of a call's kernels from the profiler, without the gaps between them."
    if any(cell.timing for row in rows for cell in row.cells.values()):
        yield "Times are the medians of short runs of a compiled loop of calls, where there is no profile."
    for name, reason in absent.items():
        yield f"{name} did not take part: {reason}."
    yield from _messages(rows)


def _messages(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        for name, cell in row.cells.items():
            if cell.message:
                yield f"{name}, {row.case}: {cell.status}: {cell.message}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}" if count < 10 * 2**20 else f"{count / 2**20:.0f}"
