"""Checkpoints: the state, the settings and the history of a run, in one atomic folder per save."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from .._errors import OptionError
from .config import Config
from .history import History
from .step import State

_STATE, _RUN = "state", "run"


class Saved(NamedTuple):
    """The part of a checkpoint that can be read before there is a model.

    Attributes:
        folder: of the run that wrote it.
        step: number of steps done.
        config: the settings of the run.
        history: its losses.
        fingerprint: of the text.
    """

    folder: Path
    step: int
    config: Config
    history: History
    fingerprint: str


def exists(folder: Path) -> bool:
    return _path(folder).is_dir()


def save(saved: Saved, state: State) -> None:
    """Writes a checkpoint and then removes the one before it."""
    run = {
        "config": dataclasses.asdict(saved.config),
        "history": dataclasses.asdict(saved.history),
        "fingerprint": saved.fingerprint,
    }
    with _manager(saved.folder) as manager:
        manager.save(
            saved.step,
            args=ocp.args.Composite(
                **{_STATE: ocp.args.StandardSave(state), _RUN: ocp.args.JsonSave(run)}
            ),
            force=True,
        )
        manager.wait_until_finished()


def read(folder: Path) -> Saved:
    """Reads all of the last checkpoint but the state.

    Raises:
        OptionError: there is none.
    """
    if not exists(folder):
        raise OptionError(f"--resume: there is no checkpoint in {folder}")
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise OptionError(f"--resume: the checkpoint in {folder} was never completed")
        run = manager.restore(step, args=ocp.args.Composite(**{_RUN: ocp.args.JsonRestore()}))[_RUN]
    history = History(
        run["history"]["train"], [(step, loss) for step, loss in run["history"]["held_out"]]
    )
    return Saved(folder, step, Config(**run["config"]), history, run["fingerprint"])


def restore(saved: Saved, like: State) -> State:
    """Reads the state into the structure, the shapes and the devices of ``like``."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _manager(saved.folder) as manager:
        restored = manager.restore(
            saved.step, args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(target)})
        )
    return restored[_STATE]


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(_path(folder), options=options)


def _path(folder: Path) -> Path:
    return folder.absolute() / "checkpoint"
