"""From options to what is to be done: the settings, the steps, the folders."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import _layout
from .._errors import OptionError
from .._layout import Layout
from . import backend, checkpoint, config, layout
from .config import Config


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that can start.

    Attributes:
        config: the settings.
        last: number of steps after which to stop, from the beginning of the first run.
        folder: where to write.
        resumed: the checkpoint to go on from, if any.
        layout: of the arrays on the devices.
    """

    config: Config
    last: int
    folder: Path
    resumed: checkpoint.Saved | None
    layout: Layout


def make(
    given: Mapping[str, Any],
    *,
    preset: str | None,
    resume: str | None,
    out: str | None,
    stop_at: int | None,
    mesh: str | None = None,
) -> Plan:
    """Checks the options against each other and against what ``resume`` and ``out`` hold.

    Args:
        given: the fields of `Config` that are not to come from the preset or the checkpoint.
        preset: a name of `config.PRESETS`; by default the device's.
        resume: a folder that a former run wrote.
        out: the folder to write; by default that of ``resume`` or a new one.
        stop_at: number of steps after which to stop; by default those of the settings.
        mesh: as `_layout.parse` takes it; by default one device.

    Raises:
        OptionError: an option is wrong.
    """
    sizes = None if mesh is None else _layout.parse(mesh)
    if sizes is not None:
        _layout.request_cpu_devices(sizes)
    if resume is None:
        resumed = None
        settings = config.from_preset(preset or backend.default_preset(), given)
    else:
        resumed = checkpoint.read(Path(resume))
        settings = config.from_checkpoint(resumed.config, given)
    last = _last_step(0 if resumed is None else resumed.step, settings.steps, stop_at)
    placed = _layout.ONE_DEVICE if sizes is None else layout.make(sizes, settings)
    return Plan(settings, last, _folder(out, resume), resumed, placed)


def _last_step(done: int, steps: int, stop_at: int | None) -> int:
    if done >= steps:
        raise OptionError(
            f"--steps: must be more than the {done} that the checkpoint has done, got {steps}"
        )
    if stop_at is None:
        return steps
    if not done < stop_at <= steps:
        raise OptionError(
            f"--stop-at: must be more than the {done} steps done and at most --steps ({steps}), "
            f"got {stop_at}"
        )
    return stop_at


def _folder(out: str | None, resume: str | None) -> Path:
    if out is None:
        return Path(resume or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}")
    folder = Path(out)
    continues = resume is not None and folder.resolve() == Path(resume).resolve()
    if checkpoint.exists(folder) and not continues:
        raise OptionError(f"--out: {out} holds a run already; --resume it or name another folder")
    return folder
