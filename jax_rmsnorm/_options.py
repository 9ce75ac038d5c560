"""The static options of one RMSNorm call, as they travel from the public functions to the kernels."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

Rounding = Literal["once", "before_gamma"]
Implementation = Literal["kernel", "xla"]
Summand = Literal["x", "residual"]


@dataclasses.dataclass(frozen=True)
class SMMargin:
    """Streaming multiprocessors that the GPU kernels leave free for other work, by kind of call.

    Attributes:
        forward: of a forward call that is being differentiated.
        backward: of the backward call.
        inference: of a forward call that is not differentiated.
    """

    forward: int = 0
    backward: int = 0
    inference: int = 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Hashable, every value checked: what the primitives take as parameters."""

    eps: float
    zero_centered_gamma: bool
    rounding: Rounding
    out_dtype: np.dtype
    sm_margin: SMMargin
    require_kernel: bool
    interleaved: bool = False  # how the rotary embedding, where there is one, pairs elements
    overwrite: Summand | None = None  # whose buffer the sum takes, where there is one
