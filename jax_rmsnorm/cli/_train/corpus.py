"""Byte-level text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sysconfig
import zlib
from pathlib import Path

import numpy as np

from .._errors import OptionError
from .config import Config

_SEPARATOR = b"\0"
_HELD_OUT_ONE_IN = 20
# Installed packages lie below the standard library's folder on some systems, and its own tests are
# a package apart on others: without both, one version of Python has one text everywhere.
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two parts, uint8 [bytes] each, that share no file; every file is followed by a zero byte."""

    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def read(cls, config: Config) -> Corpus:
        """Reads every ``*.py`` below ``config.data`` (default: the standard library), sorted.

        A file is held out if a hash of its path says so, and stays so when other files come and go.

        Raises:
            OptionError: no such folder, or less text than one window in a part.
        """
        root = Path(config.data or sysconfig.get_paths()["stdlib"])
        if not root.is_dir():
            raise OptionError(f"--data: {root} is not a folder")
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
            if _EXCLUDED.isdisjoint(name.split("/")):
                held_out = zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0
                parts[held_out].append((root / name).read_bytes() + _SEPARATOR)
        train, held_out = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
        for part, label in ((train, "training"), (held_out, "held-out")):
            if part.size <= config.seq:
                raise OptionError(
                    f"--seq: windows of {config.seq} + 1 bytes do not fit into the {label} text, "
                    f"{part.size} bytes of *.py below {root}; take less, or another --data"
                )
        return cls(train, held_out)

    def batch(self, config: Config, step: int) -> np.ndarray:
        """The windows that ``step`` trains on, uint8 [batch, seq + 1], uniformly random.

        They depend on the seed and the step alone, so a resumed run draws what it would have drawn.
        """
        starts = np.random.default_rng((config.seed, step)).integers(
            self.train.size - config.seq, size=config.batch
        )
        return _windows(self.train, starts, config.seq)

    def held_out_batches(self, config: Config) -> list[np.ndarray]:
        """Full batches of at least ``config.held_out_windows`` windows at even distances."""
        batches = math.ceil(config.held_out_windows / config.batch)
        last = self.held_out.size - config.seq - 1
        starts = np.linspace(0, last, batches * config.batch).astype(np.int64)
        return np.split(_windows(self.held_out, starts, config.seq), batches)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()


def _windows(text: np.ndarray, starts: np.ndarray, seq: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(seq + 1)]
