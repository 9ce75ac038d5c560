"""One run of whole training steps: every model with every implementation, compared, timed in turns, and reported."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from .. import _layout
from .._errors import CommandError
from .._streams import Stream
from . import (
    environment,
    profile,
    report,
    step_layout,
    step_model,
    step_program,
    step_report,
    step_results,
)
from .step_config import CONFIGS, DEFAULTS, IMPLEMENTATIONS, Config
from .step_norms import NORMS
from .step_program import CHECKED_STEPS, Program, State
from .step_results import Measured, Result


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is run, by platform.

    Attributes:
        rounds: measurements of each implementation.
        steps: steps in a measurement, at the least.
        seconds: how long a measurement takes, about and at the least.
    """

    rounds: int
    steps: int
    seconds: float


PLANS = {"cpu": Plan(rounds=5, steps=2, seconds=0.1), "gpu": Plan(rounds=30, steps=5, seconds=0.15)}
_PROFILED_STEPS = 4
# A GPU that was idle while the last profile was read runs faster for a while than one at its power limit, as in the
# steps that are timed.
_WARM_UP_SECONDS = 1.5


@dataclasses.dataclass(frozen=True)
class Request:
    """The options as they were given; None is for the device's default."""

    configs: Sequence[str] | None = None
    implementations: Sequence[str] | None = None
    joint: bool = False
    remat: bool = False
    forward: bool = False
    mesh: str | None = None
    stream: Stream | None = None
    json: Path | None = None
    profile: bool = True
    verbose: bool = False


def run(request: Request) -> None:
    """Measures, prints the tables, writes the file.

    Raises:
        CommandError: there is no kernel here, or the implementations do not train alike.
    """
    if request.mesh is not None:
        _layout.request_cpu_devices(_layout.parse(request.mesh))
    device = environment.find_device(PLANS)
    environment.require_kernels(device)
    surroundings = environment.describe()
    console = report.make_console()
    report.print_environment(console, surroundings)

    names = list(dict.fromkeys(request.implementations or IMPLEMENTATIONS))
    results: list[Result] = []
    for config_name in dict.fromkeys(request.configs or DEFAULTS[device]):
        config = dataclasses.replace(
            CONFIGS[config_name],
            joint=request.joint,
            remat=request.remat,
            forward=request.forward,
            mesh=request.mesh,
            stream=request.stream or "positions",
        )
        began = time.perf_counter()
        # The kernels of several devices would count as one's.
        profiled = request.profile and device == "gpu" and request.mesh is None
        results.append(_measure(config, names, PLANS[device], profiled=profiled))
        console.print(step_report.progress(results[-1], time.perf_counter() - began))
        if request.json is not None:
            report.write_json(request.json, step_results.to_json(results, surroundings))

    console.print()
    report.print_table(console, step_report.table(results))
    for note in step_report.notes(results):
        console.print(note)
    if request.verbose:
        for result in results:
            for name, one in result.measured.items():
                if one.device is not None:
                    report.print_table(console, step_report.kernels(result, name))
    problems = [problem for result in results for problem in result.problems()]
    if problems:
        raise CommandError("; ".join(problems))


def _measure(config: Config, names: Sequence[str], plan: Plan, *, profiled: bool) -> Result:
    """Compiles all, runs the first steps of each, then times them in turn."""
    layout = step_layout.make(config)
    programs = {name: step_program.compile_step(config, NORMS[name], layout) for name in names}
    data = step_program.draw(config, layout)
    measured: dict[str, Measured] = {}
    state: State | None = None
    for name, (step, compile_seconds, memory, norm_kernels) in programs.items():
        state = None  # before the next, so that there is one at a time
        state, losses = _first_steps(step, step_program.initial_state(config, layout), data)
        measured[name] = Measured(compile_seconds, memory, norm_kernels, losses)
    assert state is not None, "there is one implementation or more"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    track = _Track(state, data)
    del state
    steps = {name: functools.partial(track.run, program) for name, program in programs.items()}
    for name, samples in _race(steps, plan).items():
        measured[name].samples = samples
    if profiled:
        for name, run_steps in steps.items():
            step_seconds = statistics.median(measured[name].samples)
            jax.block_until_ready(run_steps(math.ceil(_WARM_UP_SECONDS / step_seconds)))
            calls = _PROFILED_STEPS * [functools.partial(run_steps, 1)]
            measured[name].device = profile.measure(calls)
    return Result(config, parameters, measured)


def _first_steps(
    step: Callable[[State, step_model.Data], tuple[State, jax.Array]],
    state: State,
    data: step_model.Data,
) -> tuple[State, list[float]]:
    losses: list[jax.Array] = []
    for _ in range(CHECKED_STEPS):
        state, loss = step(state, data)
        losses.append(loss)
    return state, [float(loss) for loss in losses]


class _Track:
    """The one state that all implementations advance in turn."""

    def __init__(self, state: State, data: step_model.Data) -> None:
        self._state = state
        self._data = data

    def run(self, program: Program, steps: int) -> jax.Array:
        """Starts so many steps, one or more; returns the last one's loss, which waits for them."""
        losses: list[jax.Array] = []
        for _ in range(steps):
            self._state, loss = program.step(self._state, self._data)
            losses.append(loss)
        return losses[-1]


def _race(steps: Mapping[str, Callable[[int], jax.Array]], plan: Plan) -> dict[str, list[float]]:
    """Seconds a step of each, round after round, so that what disturbs one disturbs all.

    Every other round goes backwards: nobody always has the same one before it, and a slow drift evens out.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    counts = {
        name: max(plan.steps, round(plan.seconds / _time(run, 1))) for name, run in steps.items()
    }
    names = list(steps)
    for number in range(plan.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(_time(steps[name], counts[name]))
    return samples


def _time(run_steps: Callable[[int], jax.Array], count: int) -> float:
    """Seconds a step, after one that is not timed: whoever ran before left its own data in the caches."""
    jax.block_until_ready(run_steps(1))
    began = time.perf_counter()
    jax.block_until_ready(run_steps(count))
    return (time.perf_counter() - began) / count
