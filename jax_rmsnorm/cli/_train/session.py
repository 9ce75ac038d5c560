"""One run, from a plan to its files."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax

from . import backend, checkpoint, results
from .checkpoint import Saved
from .corpus import Corpus
from .generate import sample
from .history import History, Throughput
from .interrupt import StopOnInterrupt
from .loop import Job, train
from .plan import Plan
from .progress import make_console, rate, reporter
from .step import State, build, held_out_loss


def run(plan: Plan) -> None:
    """Trains, evaluates, generates and writes. The first Ctrl-C ends the training, not the rest.

    Raises:
        CommandError: the text is too short, the kernel is asked for and missing, or a loss is not
            finite.
    """
    session = _Session(plan)
    state, history = session.start()
    with StopOnInterrupt() as stop:
        state = session.train(state, history, stop)
        session.finish(state, history)


class _Session:
    """The phases of a run, in order, with what they share. Only `finish` writes files."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._config = plan.config
        self._console = make_console()
        self._corpus = Corpus.read(self._config)
        self._metrics: dict[str, Any] = {**backend.environment(self._config)}
        self._console.print("norms: {norms} on {device}".format_map(self._metrics))
        if plan.layout.mesh is not None:
            self._metrics["mesh"] = plan.layout.describe()
            self._console.print("mesh: {mesh}".format_map(self._metrics))

    def start(self) -> tuple[State, History]:
        """Initialises the model, or restores it with its history."""
        attention = backend.choose_attention(self._config)
        self._trainer, state = build(self._config, attention, self._plan.layout)
        self._held_out = held_out_loss(self._trainer, self._corpus.held_out_batches(self._config))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self._metrics["parameters"] = parameters
        self._console.print(
            f"model: {parameters:,} parameters, {self._config.dtype}; text: "
            f"{self._corpus.train.size:,} bytes to train on, {self._corpus.held_out.size:,} held out"
        )
        saved = self._plan.resumed
        if saved is None:
            return state, History()
        self._console.print(f"resuming from {saved.folder} after {saved.step} steps")
        if saved.fingerprint != self._corpus.fingerprint():
            self._console.print("note: this is not the text that the checkpoint was trained on")
        return checkpoint.restore(saved, like=state), saved.history

    def train(self, state: State, history: History, stop: StopOnInterrupt) -> State:
        """Trains until the plan or the user ends it; extends ``history``."""
        began = time.perf_counter()
        step = self._trainer.compile_step(state, self._config)
        self._metrics["compile_seconds"] = time.perf_counter() - began
        self._console.print(
            f"compiled in {self._metrics['compile_seconds']:.1f} s; Ctrl-C ends the training early"
        )
        job = Job(
            step=step,
            windows=functools.partial(self._corpus.batch, self._config),
            held_out=self._held_out,
            evaluate_every=self._config.evaluate_every,
            last=self._plan.last,
        )
        throughput = Throughput(self._config.batch * self._config.seq)
        with reporter(self._console, first=len(history.train), last=job.last) as progress:
            state = train(job, state, history, stop=stop, reporter=progress, throughput=throughput)
        done = len(history.train)
        self._metrics["interrupted"] = stop.requested
        self._metrics["bytes_per_second"] = throughput.bytes_per_second(done)
        if done < self._config.steps:
            self._console.print(f"stopped after {done} of {self._config.steps} steps")
        return state

    def finish(self, state: State, history: History) -> None:
        """Writes the checkpoint first, then evaluates, generates, and writes the rest."""
        done = len(history.train)
        folder = self._plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = self._corpus.fingerprint()
        checkpoint.save(Saved(folder, done, self._config, history, fingerprint), state)

        held_out = self._held_out(state.params)
        history.held_out.append((done, held_out))
        text = sample(self._trainer, state.params, self._config)
        metrics = {
            "steps": done,
            "held_out_bits_per_byte": held_out,
            **self._metrics,
            "config": dataclasses.asdict(self._config),
            "history": dataclasses.asdict(history),
        }
        results.write(folder, metrics, history, text)

        speed = rate(metrics["bytes_per_second"])
        self._console.print(f"\n{text}\n")
        self._console.print(
            f"held out: {held_out:.3f} bits/byte after {done} steps, trained at {speed}\n"
            f"written to {folder}: {', '.join(results.FILES)}, checkpoint"
        )
        if done < self._config.steps:
            self._console.print(f"to go on: jax-rmsnorm train --resume {folder}")
