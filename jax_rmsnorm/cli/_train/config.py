"""The settings of a training run: fields, presets, checks. Imports neither JAX nor any extra."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from .._errors import OptionError

VOCABULARY = 256  # the model reads and writes bytes
_SHAPE = ("d_model", "layers", "heads", "kv_heads")  # what a checkpoint of the model fixes
_COUNTS = (*_SHAPE, "seq", "batch", "steps", "held_out_windows")


def option(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def _check(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise OptionError(f"{option(name)}: {message}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All that determines a run; each field is the command-line option of the same name."""

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    seq: int
    batch: int
    steps: int
    lr: float
    dtype: Literal["float32", "bfloat16"]
    held_out_windows: int
    implementation: Literal["auto", "kernel", "xla"] = "auto"
    deterministic: bool = False
    seed: int = 0
    data: str | None = None
    prompt: str = "def "
    sample_bytes: int = 600
    temperature: float = 0.7

    def __post_init__(self) -> None:
        for name in _COUNTS:
            count = getattr(self, name)
            _check(count >= 1, name, f"must be at least 1, got {count}")
        for name in ("seed", "sample_bytes"):
            number = getattr(self, name)
            _check(number >= 0, name, f"must not be negative, got {number}")
        _check(
            self.d_model % (2 * self.heads) == 0,
            "heads",
            f"must divide --d-model ({self.d_model}) into heads of an even size "
            f"(rotary embedding turns pairs), got {self.heads}",
        )
        _check(
            self.heads % self.kv_heads == 0,
            "kv_heads",
            f"must divide --heads ({self.heads}), got {self.kv_heads}",
        )
        _check(0 < self.lr < math.inf, "lr", f"must be positive and finite, got {self.lr}")
        _check(
            0 <= self.temperature < math.inf,
            "temperature",
            f"must be finite and not negative, got {self.temperature}",
        )
        _check(self.prompt != "", "prompt", "must not be empty")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def mlp_dim(self) -> int:
        """Hidden size of the SwiGLU: 8/3 of d_model, as a multiple of 32."""
        return 32 * math.ceil(self.d_model / 12)

    @property
    def norm_implementation(self) -> Literal["kernel", "xla"] | None:
        """The argument ``implementation`` of the norms."""
        return None if self.implementation == "auto" else self.implementation

    @property
    def warmup_steps(self) -> int:
        return max(1, self.steps // 20)

    @property
    def evaluate_every(self) -> int:
        return math.ceil(self.steps / 8)


PRESETS: Mapping[str, Config] = {
    "cpu": Config(
        d_model=128,
        layers=4,
        heads=2,
        kv_heads=1,
        seq=128,
        batch=8,
        steps=900,
        lr=4e-3,
        dtype="float32",
        held_out_windows=256,
    ),
    "gpu": Config(
        d_model=1024,
        layers=8,
        heads=8,
        kv_heads=4,
        seq=2048,
        batch=8,
        steps=2500,
        lr=6e-4,
        dtype="bfloat16",
        held_out_windows=64,
    ),
}


def from_preset(name: str, given: Mapping[str, Any]) -> Config:
    """The preset ``name`` with the options that were given in place of its own."""
    return dataclasses.replace(PRESETS[name], **given)


def from_checkpoint(saved: Config, given: Mapping[str, Any]) -> Config:
    """The settings of a checkpoint with the given options, which may not change the model."""
    for name in _SHAPE:
        before = getattr(saved, name)
        _check(
            given.get(name, before) == before,
            name,
            f"the checkpoint's model has {before}, got {given.get(name)}; leave the option out",
        )
    return dataclasses.replace(saved, **given)
