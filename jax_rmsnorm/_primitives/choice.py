"""Where ``implementation=None`` takes plain JAX although there is a kernel: on a GPU, for few elements.

A rule of measurement, on one H200, of whole jitted programs (docs/performance.md, "Kernel or plain JAX"):

- Without derivatives XLA makes one kernel of a norm and its neighbours, slices included, and a call of one of the
  kernels here is one launch more. A decoder's forward was 0.84 times as fast with them at 64 tokens of 1024, 0.93 at
  512 and as fast from 2048 on. Alone they are slower on up to a million elements too, but for long rows, of which
  XLA's blocks have one each.
- With derivatives the kernels are faster wherever the GPU's time counts. Where launches alone do, as with 128 tokens
  of 64, a step was 0.92 times as fast.

On a CPU the kernels are faster at any size that was tried.
"""

from __future__ import annotations

from typing import Any

from .._compat import is_static_dim

LEAST_ELEMENTS = 2**22
LEAST_ELEMENTS_DIFFERENTIATED = 2**16
LONG_ROW = 2**14


def kernel_pays_on_gpu(x: Any, *, save_rrms: bool = True, **_: Any) -> bool:
    """Whether a GPU's kernel is worth its launch, for an x [..., H] and a primitive's parameters.

    A forward that saves no reciprocal RMS is one of which no derivative is taken. Sizes that are not known when the
    program is made count as large.
    """
    if not all(map(is_static_dim, x.shape)):
        return True
    if not save_rrms and x.shape[-1] <= LONG_ROW:
        return x.size >= LEAST_ELEMENTS
    return x.size >= LEAST_ELEMENTS_DIFFERENTIATED
