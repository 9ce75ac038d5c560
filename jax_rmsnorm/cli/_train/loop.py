"""The training loop: it never waits for the step that it has just started."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import numpy as np

from .._errors import CommandError
from .history import History, Throughput
from .progress import Reporter
from .step import Params, State

_IN_FLIGHT = 2  # losses that may be outstanding: enough to hide the host's part of a step


class Stop(Protocol):
    """What tells the loop to end: see `interrupt.StopOnInterrupt`."""

    requested: bool


class Job(NamedTuple):
    """What the loop is to do.

    Attributes:
        step: donates the state; returns the next one and the loss in bits per byte.
        windows: the training windows of a step.
        held_out: bits per byte of the held-out windows.
        evaluate_every: steps from one call of ``held_out`` to the next.
        last: number of steps after which to end.
    """

    step: Callable[[State, np.ndarray], tuple[State, jax.Array]]
    windows: Callable[[int], np.ndarray]
    held_out: Callable[[Params], float]
    evaluate_every: int
    last: int


def train(
    job: Job,
    state: State,
    history: History,
    *,
    stop: Stop,
    reporter: Reporter,
    throughput: Throughput,
) -> State:
    """Goes on from the steps in ``history``, which it extends, to the last or until told to stop.

    Raises:
        CommandError: a loss is not finite.
    """
    losses: collections.deque[jax.Array] = collections.deque()

    def record(in_flight: int) -> None:
        while len(losses) > in_flight:
            loss = float(losses.popleft())
            done = len(history.train)
            if not math.isfinite(loss):
                raise CommandError(f"the loss of step {done} is {loss}; a lower --lr may help")
            history.train.append(loss)
            reporter.update(done + 1, history.recent(), throughput.bytes_per_second(done + 1))

    first = len(history.train)
    for step in range(first, job.last):
        if step % job.evaluate_every == 0:
            record(in_flight=0)
            throughput.stop(step)
            history.held_out.append((step, job.held_out(state.params)))
            if step > first:
                throughput.start(step)
        state, loss = job.step(state, job.windows(step))
        losses.append(loss)
        if step == first:  # the first call also loads code and allocates: not part of the rate
            record(in_flight=0)
            throughput.start(step + 1)
        if stop.requested:
            break
        record(in_flight=_IN_FLIGHT)
    record(in_flight=0)
    throughput.stop(len(history.train))
    return state
