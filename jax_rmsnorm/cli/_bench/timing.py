"""How a JAX function is timed: many calls in one compiled loop, without a launch or an allocation of the host between.

On a GPU the body of that loop is a stretch of kernels that XLA replays as a CUDA graph. Results live in the loop's
state, which is donated from one run to the next: so no call pays for fresh memory, and what the state held first, NaN,
shows which elements a call did not write.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import profile
from .inputs import Inputs
from .shapes import Case


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is run, by platform.

    Attributes:
        rotation_bytes: what the input sets of a case hold together, so that no cache serves them.
        min_sets, max_sets: bounds on their number.
        chain_calls: calls in the body of a loop over dependent calls.
        seconds: about how long one run of a loop takes.
        bytes_per_second, call_seconds: the guess of a call's time behind that.
        warm_up_runs: runs of the loop, untimed, before each measurement.
        sample_seconds: how long a measurement takes at the least; it repeats the loop until then, once or more.
        queued_runs: if not 0, a measurement is the time of one run and so many more behind it, less that of one run
            alone, in which starting it and waiting for its end, half a millisecond of the host, cancel out.
        min_rounds, max_rounds: measurements of each contender.
        budget_seconds: time after which no round beyond the first ``min_rounds`` starts.
    """

    rotation_bytes: int
    min_sets: int
    max_sets: int
    chain_calls: int
    seconds: float
    bytes_per_second: float
    call_seconds: float
    warm_up_runs: int
    sample_seconds: float
    queued_runs: int
    min_rounds: int
    max_rounds: int
    budget_seconds: float

    def sets(self, case: Case) -> int:
        """Number of input sets of a case."""
        wanted = -(-self.rotation_bytes // case.moved_bytes)
        return min(max(wanted, self.min_sets), self.max_sets)

    def trips(self, case: Case, calls: int) -> int:
        """Trips of a loop whose body makes so many calls."""
        guess = case.moved_bytes / self.bytes_per_second + self.call_seconds
        return max(1, round(self.seconds / (calls * guess)))


# XLA's CPU backend runs independent calls at the same time: there, one call is the whole body, and its set stays the
# same for every contender. Whoever runs next after a contender that left a core idle pays for waking it, which takes a
# virtual machine milliseconds: hence samples long beside that, of warm loops.
PLANS = {
    "cpu": Plan(
        rotation_bytes=0,
        min_sets=1,
        max_sets=1,
        chain_calls=1,
        seconds=0.03,
        bytes_per_second=1e10,
        call_seconds=1e-5,
        warm_up_runs=1,
        sample_seconds=0.15,
        queued_runs=0,
        min_rounds=9,
        max_rounds=25,
        budget_seconds=2.0,
    ),
    # More than four times an H200's L2; with few rows, as many sets as a program takes arguments well.
    "gpu": Plan(
        rotation_bytes=2**28,
        min_sets=4,
        max_sets=128,
        chain_calls=64,
        seconds=0.005,
        bytes_per_second=3.5e12,
        call_seconds=2e-6,
        warm_up_runs=0,
        sample_seconds=0.0,
        queued_runs=3,
        min_rounds=7,
        max_rounds=15,
        budget_seconds=1.0,
    ),
}


class Prepared(abc.ABC):
    """One contender, ready to run one case."""

    @abc.abstractmethod
    def results(self) -> Sequence[jax.Array]:
        """(y, ...) or (dx, dgamma, ...) of the first input set, written over NaN where possible."""

    @abc.abstractmethod
    def sample(self) -> float:
        """Seconds a call, measured once."""

    def profile(self) -> profile.DeviceTime | None:
        """What the device did in a call, from the profiler; None where that is not measured."""
        return None


class Call(NamedTuple):
    """How to make one call: ``function(head, rest)`` returns a tuple that begins with an array like ``head``.

    ``operands`` makes (head, rest) of an input set: x and gamma, or dy and what the forward saved.
    """

    function: Callable[[jax.Array, Any], tuple[jax.Array, ...]]
    operands: Callable[[Inputs], tuple[jax.Array, Any]]


class PreparedCall(Prepared):
    """A JAX function in a loop over its input sets, or with ``chain`` over its own first result."""

    def __init__(
        self, call: Call, case: Case, sets: Sequence[Inputs], plan: Plan, *, chain: bool = False
    ) -> None:
        self._plan = plan
        self._function = call.function
        self._operands = [call.operands(inputs) for inputs in sets]
        self._calls = plan.chain_calls if chain else len(sets)
        trips = plan.trips(case, self._calls)
        self._calls_in_all = self._calls * trips
        head, rest = self._operands[0]
        results = jax.eval_shape(call.function, head, rest)
        if chain:
            others = [_poison(results[1:]) for _ in range(self._calls)]
            self._state = (jnp.array(head, copy=True), others)
            loop, arguments = _chain(call.function, trips), rest
        else:
            self._state = (jnp.int32(0), [_poison(results) for _ in sets])
            loop, arguments = _rotate(call.function, trips), self._operands
        self._arguments = arguments
        self._loop = jax.jit(loop, donate_argnums=0).lower(self._state, arguments).compile()
        self._run()

    def _run(self, times: int = 1) -> None:
        for _ in range(times):
            self._state = self._loop(self._state, self._arguments)
        jax.block_until_ready(self._state)

    def _seconds(self, runs: int) -> float:
        began = time.perf_counter()
        self._run(runs)
        return time.perf_counter() - began

    def results(self) -> Sequence[jax.Array]:
        _, results = self._state
        return results[0]

    def sample(self) -> float:
        for _ in range(self._plan.warm_up_runs):
            self._run()
        if queued := self._plan.queued_runs:
            alone = self._seconds(1)
            return (self._seconds(1 + queued) - alone) / (queued * self._calls_in_all)
        began = time.perf_counter()
        self._run()
        runs = 1
        while time.perf_counter() - began < self._plan.sample_seconds:
            self._run()
            runs += 1
        return (time.perf_counter() - began) / (runs * self._calls_in_all)

    def profile(self) -> profile.DeviceTime:
        function = jax.jit(self._function)
        jax.block_until_ready(function(*self._operands[0]))
        sets = itertools.islice(itertools.cycle(self._operands), profile.CALLS)
        return profile.measure([functools.partial(function, *operands) for operands in sets])


def _poison(results: Sequence[jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(jnp.full(result.shape, jnp.nan, result.dtype) for result in results)


def share_of_poison(result: jax.Array) -> jax.Array:
    """How much of a result still is, bit by bit, what the loop's state held first."""
    bits = jnp.dtype(f"uint{8 * result.dtype.itemsize}")
    (poison,) = _poison([jax.ShapeDtypeStruct((), result.dtype)])
    return jnp.mean(result.view(bits) == poison.view(bits), dtype=jnp.float32)


def _rotate(function: Callable[..., Any], trips: int) -> Callable[[Any, Any], Any]:
    """A program (state, operands) -> state that calls ``function`` on each operands in turn, ``trips`` times.

    Every result is part of the state, so none is dead; each call waits at a barrier for the result before it and
    for a token of the trip before, so that XLA neither merges calls nor hoists them out of the loop.
    """

    def program(state: Any, operands: Sequence[Any]) -> Any:
        def body(_: Any, state: Any) -> Any:
            token, _ = state
            results: list[Any] = []
            for current in operands:
                before = results[-1:]
                current, token, before = lax.optimization_barrier((current, token, before))
                results[-1:] = [*before, tuple(function(*current))]
            return token, results

        return lax.fori_loop(0, trips, body, state)

    return program


def _chain(function: Callable[..., Any], trips: int) -> Callable[[Any, Any], Any]:
    """A program (state, rest) -> state in which each call takes the first result of the call before.

    The state holds that result, and the other results of as many calls as the body of the loop is to make.
    """

    def program(state: Any, rest: Any) -> Any:
        def body(_: Any, state: Any) -> Any:
            head, others = state
            results: list[Any] = []
            for _ in others:
                head, current = lax.optimization_barrier((head, rest))
                head, *other = function(head, current)
                results.append(tuple(other))
            return head, results

        return lax.fori_loop(0, trips, body, state)

    return program


class Timing(NamedTuple):
    """Median and quartiles of ``samples`` measurements, usually of the seconds a call takes."""

    median: float
    lower: float
    upper: float
    samples: int

    @property
    def notch(self) -> float:
        """How far the median may be off, at about 95 % confidence: 1.57 interquartile ranges over √samples.

        As the notch of a box plot has it: McGill, Tukey, Larsen, "Variations of box plots", 1978.
        """
        return 1.57 * (self.upper - self.lower) / self.samples**0.5


def race(runners: Sequence[Callable[[], float]], plan: Plan) -> list[Timing]:
    """Samples all in turn, round after round, so that what disturbs one disturbs all."""
    samples: list[list[float]] = [[] for _ in runners]
    began = time.perf_counter()
    for number in range(plan.max_rounds):
        spent = time.perf_counter() - began
        if number >= plan.min_rounds and spent > plan.budget_seconds:
            break
        for runner, values in zip(runners, samples, strict=True):
            values.append(runner())
    return [summarize(values) for values in samples]


def summarize(values: Sequence[float]) -> Timing:
    """Median and quartiles of two measurements or more."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))
