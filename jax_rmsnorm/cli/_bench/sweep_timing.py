"""How the cases of a sweep are timed: many programs in one profile, or each in a short loop of its own.

Compiling takes longest: so inputs need no program, and for a profile each contender needs one without a loop around it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import jax

from . import profile, timing
from .check import Check
from .contenders import JaxContender, Roof
from .inputs import Inputs, Pool
from .names import KERNEL, ROOF
from .results import Cell, Row, failure
from .shapes import ITEM_BYTES, Case, Shape
from .timing import Call, Plan

Contenders: TypeAlias = Mapping[str, JaxContender | Roof]

PLANS: Mapping[str, Plan] = {
    "cpu": dataclasses.replace(
        timing.PLANS["cpu"],
        seconds=5e-3,
        sample_seconds=0.02,
        min_rounds=3,
        max_rounds=5,
        budget_seconds=0.3,
    ),
    "gpu": dataclasses.replace(
        timing.PLANS["gpu"], max_sets=profile.CALLS, seconds=2e-3, min_rounds=5, max_rounds=5
    ),
}
_ROOF_WORD_BYTES = 16
_COMPILING_THREADS = min(8, os.cpu_count() or 1)


class Timer:
    """Times every contender, among them the kernel, on the same inputs."""

    def __init__(self, contenders: Contenders, plan: Plan, pool: Pool) -> None:
        self._contenders = contenders
        self._plan = plan
        self._pool = pool

    def profile(self, cases: Sequence[Case], mark: profile.Mark) -> list[Row]:
        """The cases' kernel durations, all from one profile.

        Raises:
            profile.ProfileError: it does not tell the programs apart.
        """
        sets = self._draw(cases)
        cells: list[dict[str, Cell]] = [{} for _ in cases]
        programs = [
            _Program(found, name, call, sets[measured.shape])
            for case, found in zip(cases, cells, strict=True)
            for name, measured in self._measured(case)
            for call in self._contenders[name].calls(measured)
        ]
        with ThreadPoolExecutor(_COMPILING_THREADS) as executor:
            prepared = list(executor.map(_Program.prepare, programs))
        ready = [
            (program, calls) for program, calls in zip(programs, prepared, strict=True) if calls
        ]
        devices = profile.measure_groups([calls for _, calls in ready], mark)
        for (program, _), device in zip(ready, devices, strict=True):
            program.keep_fastest(device)
        return self._rows(cases, sets, cells)

    def loop(self, cases: Sequence[Case]) -> list[Row]:
        """The times of a call in a compiled loop, case by case."""
        sets = self._draw(cases)
        return self._rows(cases, sets, [self._race(case, sets) for case in cases])

    def problem(self, case: Case) -> str | None:
        """What is wrong with the kernel's results, written over NaN, against float64; None if nothing is."""
        sets = self._pool.draw(case, 1)
        once = dataclasses.replace(self._plan, seconds=0.0)
        kernel = self._contenders[KERNEL]
        try:
            return kernel.problem(kernel.prepare(case, sets, once).results(), Check(case, sets[0]))
        except Exception as error:  # as where it is timed: the sweep goes on
            return failure(error).message

    def _draw(self, cases: Sequence[Case]) -> Mapping[Shape, Sequence[Inputs]]:
        """Input sets by shape, which the operations share."""
        measured = [one for case in cases for _, one in self._measured(case)]
        # Of one shape's operations the last stays, which is the one that wants the most sets.
        wanted = {case.shape: case for case in sorted(measured, key=self._plan.sets)}
        return {
            shape: self._pool.draw(case, self._plan.sets(case)) for shape, case in wanted.items()
        }

    def _measured(self, case: Case) -> Iterator[tuple[str, Case]]:
        """What each contender runs: the roof, which moves whole words only, the bytes rounded up to them."""
        for name in self._contenders:
            if name == ROOF and case.tensor_bytes % _ROOF_WORD_BYTES:
                words = -(-case.tensor_bytes // _ROOF_WORD_BYTES)
                word = _ROOF_WORD_BYTES // ITEM_BYTES[case.x_dtype]
                yield name, dataclasses.replace(case, rows=words, hidden=word)
            else:
                yield name, case

    def _race(self, case: Case, sets: Mapping[Shape, Sequence[Inputs]]) -> dict[str, Cell]:
        cells: dict[str, Cell] = {}
        ready: dict[str, timing.Prepared] = {}
        for name, measured in self._measured(case):
            try:
                inputs = sets[measured.shape]
                ready[name] = self._contenders[name].prepare(measured, inputs, self._plan)
            except Exception as error:  # a compiler may raise anything, and the sweep goes on
                cells[name] = failure(error)
        times = timing.race([one.sample for one in ready.values()], self._plan)
        found = zip(ready, times, strict=True)
        return cells | {name: Cell("timed", timing=seconds) for name, seconds in found}

    def _rows(
        self,
        cases: Sequence[Case],
        sets: Mapping[Shape, Sequence[Inputs]],
        cells: Sequence[Mapping[str, Cell]],
    ) -> list[Row]:
        return [
            Row(case, len(sets[case.shape]), found)
            for case, found in zip(cases, cells, strict=True)
        ]


class _Program(NamedTuple):
    """A call on rotating input sets, and the cells of its case, to which its time goes."""

    cells: dict[str, Cell]
    name: str
    call: Call
    sets: Sequence[Inputs]

    def prepare(self) -> Sequence[Callable[[], Any]]:
        """Compiles it, runs it once, and returns the calls to profile: none if that failed."""
        try:
            operands = [self.call.operands(inputs) for inputs in self.sets]
            compiled = jax.jit(self.call.function).lower(*operands[0]).compile()
            jax.block_until_ready((operands, compiled(*operands[0])))
        except Exception as error:  # a compiler may raise anything, and the sweep goes on
            self.cells[self.name] = failure(error)
            return ()
        turns = itertools.islice(itertools.cycle(operands), profile.CALLS)
        return [functools.partial(compiled, *current) for current in turns]

    def keep_fastest(self, device: profile.DeviceTime) -> None:
        """Of several programs of a contender, the fastest is its time."""
        known = self.cells.get(self.name)
        if known is None or known.seconds is None or device.seconds < known.seconds:
            self.cells[self.name] = Cell("timed", device=device)
