"""What the device did: kernel durations from JAX's profiler."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

CALLS = 16
_DEVICE_PLANE = "/device:GPU:"
# Other lines of a device's plane repeat the events of its streams, grouped by program or by operation.
_STREAM_LINE = "Stream"
_MARK_BYTES = 2**27  # which a mark reads and writes: together more than any cache holds


class ProfileError(Exception):
    """The profile holds nothing to go by; the message says what it does hold."""


class DeviceTime(NamedTuple):
    """Seconds of a call in which a kernel runs, gaps left out; and the duration of each kernel, by its name.

    A kernel may start before the one in front of it has ended (programmatic dependent launch): what they share counts
    once, for the first.
    """

    seconds: float
    events_per_call: float
    kernels: Mapping[str, float]


class _Event(NamedTuple):
    start: float
    nanoseconds: float
    name: str


def measure(calls: Sequence[Callable[[], Any]]) -> DeviceTime:
    """Profiles the calls, which should be compiled already and do the same work.

    Raises:
        ProfileError: there is no device activity in the profile.
    """
    data = _record(lambda: jax.block_until_ready([call() for call in calls]))
    return summarize(data, len(calls))


class Mark:
    """A program to run between groups of calls: its kernels' names tell them apart, its data empties the cache."""

    def __init__(self) -> None:
        # No norm has a sine in it, so no kernel of one has the name that XLA makes of it.
        self._data = jnp.zeros(_MARK_BYTES // 4)
        self._program = jax.jit(jnp.sin).lower(self._data).compile()
        self()
        self.kernels = frozenset(measure([self] * 2).kernels)

    def __call__(self) -> None:
        jax.block_until_ready(self._program(self._data))


def measure_groups(groups: Sequence[Sequence[Callable[[], Any]]], mark: Mark) -> list[DeviceTime]:
    """Profiles several groups of calls at once, as `measure` does each; every group finds a cache without its data.

    Raises:
        ProfileError: there are not as many groups of device activity in the profile.
    """

    def run() -> None:
        for group in groups:
            mark()
            jax.block_until_ready([call() for call in group])

    return summarize_groups(_record(run), [len(group) for group in groups], mark.kernels)


def _record(run: Callable[[], Any]) -> Any:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        paths = sorted(Path(folder).rglob("*.xplane.pb"))
        if not paths:
            raise ProfileError("the profiler wrote no *.xplane.pb")
        return ProfileData.from_file(str(paths[0]))


def summarize(data: Any, calls: int) -> DeviceTime:
    """The device time of one of ``calls`` calls: their median, if each made the same number of events.

    Args:
        data: a `jax.profiler.ProfileData` (which is no type to a type checker).
        calls: number of calls in it, one after the other.
    """
    return _device_time(_sorted_events(data), calls)


def summarize_groups(data: Any, calls: Sequence[int], marks: Collection[str]) -> list[DeviceTime]:
    """The device time of a call of each group, where kernels of the names ``marks`` stand in front of every group."""
    events = _sorted_events(data)
    marked = itertools.groupby(
        itertools.dropwhile(lambda event: event.name not in marks, events),
        key=lambda event: event.name in marks,
    )
    groups = [list(group) for is_mark, group in marked if not is_mark]
    if len(groups) != len(calls):
        raise ProfileError(f"{len(groups)} groups of kernels instead of {len(calls)}")
    return list(itertools.starmap(_device_time, zip(groups, calls, strict=True)))


def _device_time(events: Sequence[_Event], calls: int) -> DeviceTime:
    per_call = len(events) / calls
    if per_call.is_integer():
        nanoseconds = statistics.median(map(sum, _split(list(_shares(events)), int(per_call))))
    else:
        nanoseconds = sum(_shares(events)) / calls
    kernels: dict[str, float] = {}
    for event in events:
        kernels[event.name] = kernels.get(event.name, 0.0) + event.nanoseconds / calls / 1e9
    return DeviceTime(nanoseconds / 1e9, per_call, kernels)


def _sorted_events(data: Any) -> list[_Event]:
    events = sorted(_events(data))
    if not events:
        raise ProfileError(f"no events on a stream of a GPU; the profile has {_describe(data)}")
    return events


def _events(data: Any) -> Iterator[_Event]:
    for plane in data.planes:
        if plane.name.startswith(_DEVICE_PLANE):
            for line in plane.lines:
                if line.name.startswith(_STREAM_LINE):
                    for event in line.events:
                        yield _Event(event.start_ns, event.duration_ns, event.name)


def _shares(events: Iterable[_Event]) -> Iterator[float]:
    """Of each event, in order of their starts, the nanoseconds that no event before it covers."""
    covered = -math.inf
    for event in events:
        end = event.start + event.nanoseconds
        yield max(0.0, end - max(event.start, covered))
        covered = max(covered, end)


def _split(values: Sequence[float], size: int) -> Iterable[Sequence[float]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _describe(data: Any) -> str:
    planes = {plane.name: [line.name for line in plane.lines] for plane in data.planes}
    return "; ".join(f"{name}: {', '.join(lines) or 'no lines'}" for name, lines in planes.items())
