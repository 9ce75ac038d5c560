"""Where ``implementation=None`` takes plain JAX although there is a kernel: on a GPU, for few elements.

A rule of measurement, on one H200, of whole jitted programs (docs/performance.md, "Kernel or plain JAX"):

- Without derivatives XLA fuses a norm with its neighbours, slices included, and a kernel is one launch more. With
  kernels a decoder's forward was 0.85 times as fast at 64 tokens of 1024 and 0.93 at 512; from 2048 to 4096 tokens on
  the difference is within 2 %. Rows of more than 16,384 elements are the exception: alone, the kernels are faster on
  these than XLA, which has a block for each, down to tens of thousands of elements in all.
- With derivatives the kernels are faster wherever the GPU's time counts. Where launches alone do, as with 128 tokens
  of 64, a step was 0.91 times as fast.

On a CPU the kernels are as fast or faster at any size that was tried.
"""

from __future__ import annotations

from typing import Any

from .._compat import is_static_dim

LEAST_ELEMENTS = 2**16
LEAST_ELEMENTS_UNDIFFERENTIATED = 2**22  # in rows of up to so many:
LONG_ROW = 2**14


def kernel_pays_on_gpu(x: Any, *, save_rrms: bool = True, **_: Any) -> bool:
    """Whether a GPU's kernel is worth its launch, for what one device has of x [..., H], and a primitive's parameters.

    A forward that saves no reciprocal RMS is one of which no derivative is taken. Sizes that are not known when the
    program is made count as large.
    """
    if not all(map(is_static_dim, x.shape)):
        return True
    undifferentiated = not save_rrms and x.shape[-1] <= LONG_ROW
    return x.size >= (LEAST_ELEMENTS_UNDIFFERENTIATED if undifferentiated else LEAST_ELEMENTS)
