"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 20


def make_console() -> Console:
    """Standard output, with text as it is: no markup, no coloured numbers, no hard wraps."""
    return Console(highlight=False, markup=False, soft_wrap=True)


class Reporter(Protocol):
    """Used as a context manager around the training loop."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def update(self, step: int, loss: float, bytes_per_second: float | None) -> None:
        """``step`` steps are done, the last ones at this loss in bits per byte."""


def reporter(console: Console, *, first: int, last: int) -> Reporter:
    """For the steps from ``first`` to ``last``, in the form that fits the console."""
    return _Bar(console, first, last) if console.is_terminal else _Lines(console, first, last)


def rate(bytes_per_second: float | None) -> str:
    return "- bytes/s" if bytes_per_second is None else f"{bytes_per_second:,.0f} bytes/s"


class _Bar:
    def __init__(self, console: Console, first: int, last: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=last, completed=first, status="")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, bytes_per_second: float | None) -> None:
        status = f"{loss:.3f} bits/byte, {rate(bytes_per_second)}"
        self._progress.update(self._task, completed=step, status=status)


class _Lines:
    def __init__(self, console: Console, first: int, last: int) -> None:
        self._console = console
        self._last = last
        self._every = max(1, (last - first) // _LINES)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def update(self, step: int, loss: float, bytes_per_second: float | None) -> None:
        if step % self._every == 0 or step == self._last:
            self._console.print(
                f"step {step}/{self._last}: {loss:.3f} bits/byte, {rate(bytes_per_second)}"
            )
