"""What a run has measured so far: losses, which travel with the checkpoint, and speed."""

from __future__ import annotations

import dataclasses
import time


@dataclasses.dataclass
class History:
    """Losses in bits per byte.

    Attributes:
        train: of each step, before it.
        held_out: (steps done, loss) pairs.
    """

    train: list[float] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def recent(self, steps: int = 20) -> float:
        """The mean training loss of the last steps."""
        last = self.train[-steps:]
        return sum(last) / len(last)


class Throughput:
    """Bytes per second over the stretches between `start` and `stop`."""

    def __init__(self, bytes_per_step: int) -> None:
        self._bytes_per_step = bytes_per_step
        self._steps = 0
        self._seconds = 0.0
        self._started: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        self._started = step, time.perf_counter()

    def stop(self, step: int) -> None:
        if self._started is not None:
            self._steps, self._seconds = self._until(step)
            self._started = None

    def bytes_per_second(self, step: int) -> float | None:
        """Up to ``step``; None before anything was measured."""
        steps, seconds = self._until(step)
        return steps * self._bytes_per_step / seconds if steps else None

    def _until(self, step: int) -> tuple[int, float]:
        if self._started is None:
            return self._steps, self._seconds
        first, since = self._started
        return self._steps + step - first, self._seconds + time.perf_counter() - since
