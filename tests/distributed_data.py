"""What the processes of test_distributed.py compute, the same in each."""

from __future__ import annotations

import numpy as np

SHAPE = (8, 6, 64)
# (spec of x, spec of gamma) on a mesh of one axis: data parallel, and tensor parallel.
LAYOUTS = {
    "rows": (("devices",), ()),
    "hidden": ((None, None, "devices"), ("devices",)),
}


def operands() -> list[np.ndarray]:
    """x, residual, gamma, dy and dh."""
    rng = np.random.default_rng(0)
    x, residual, dy, dh = rng.standard_normal((4, *SHAPE), np.float32)
    return [x, residual, 1 + rng.standard_normal(SHAPE[-1], np.float32), dy, dh]
