"""The check of the SM margin, and its defaults from the environment."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from ._options import SMMargin

_MOST_MARGIN = 2**16 - 1  # SMs; no GPU has as many


def check_margin(margin: Any) -> SMMargin:
    if margin is None:
        margin = SMMargin(
            forward=_from_environment("FORWARD"),
            backward=_from_environment("BACKWARD"),
            inference=_from_environment("INFERENCE"),
        )
    elif not isinstance(margin, SMMargin):
        margin = SMMargin(margin, margin, margin)
    values = dataclasses.asdict(margin)
    for kind, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"sm_margin must be an int or an SMMargin of ints, got {kind}={value!r}"
            )
        if value < 0:
            raise ValueError(f"sm_margin must be 0 or more, got {kind}={value}")
        if value > _MOST_MARGIN:
            raise ValueError(f"sm_margin must be {_MOST_MARGIN} or less, got {kind}={value}")
    if any(values.values()) and (count := _sm_count()) is not None:
        for kind, value in values.items():
            if value >= count:
                raise ValueError(
                    f"sm_margin must leave at least one of the device's {count} SMs, got {kind}={value}"
                )
    return SMMargin(**{kind: int(value) for kind, value in values.items()})


def _from_environment(kind: str) -> int:
    for name in (f"JAX_RMSNORM_{kind}_SM_MARGIN", "JAX_RMSNORM_SM_MARGIN"):
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.strip().isdecimal():
            raise ValueError(
                f"environment variable {name} must be an int of 0 or more, got {text!r}"
            )
        return int(text)
    return 0


def _sm_count() -> int | None:
    """SMs of the smallest local GPU; None where JAX's default backend is no GPU."""
    if jax.default_backend() != "gpu":
        return None
    return min((device.core_count for device in jax.local_devices()), default=None)
