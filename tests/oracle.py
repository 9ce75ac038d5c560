"""RMSNorm in NumPy's float64, and bounds that scale with what is compared."""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np


def to64(array: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _round_to(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values.astype(dtype).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Result:
    """Float64 results for x [..., H], gamma [H], dy [..., H]."""

    y: np.ndarray
    rrms: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    # Magnitudes before cancellation: sums of the absolute values of the terms of dx and dgamma.
    dx_terms: np.ndarray
    dgamma_terms: np.ndarray


def rms_norm(x, gamma, dy, *, eps=1e-5, zero_centered_gamma=False, rounding="once") -> Result:
    dtype = np.asarray(x).dtype
    x64, dy64 = to64(x), to64(dy)
    g64 = np.ones(x64.shape[-1]) if gamma is None else to64(gamma) + zero_centered_gamma
    rrms = 1 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps)
    normalized = x64 * rrms
    rounded = _round_to(normalized, dtype) if rounding == "before_gamma" else normalized
    dn = dy64 * g64
    c = np.mean(dn * normalized, axis=-1, keepdims=True)
    rows = tuple(range(x64.ndim - 1))
    c_terms = np.mean(np.abs(dn * normalized), axis=-1, keepdims=True)
    return Result(
        y=rounded * g64,
        rrms=rrms[..., 0],
        dx=rrms * (dn - normalized * c),
        dgamma=np.sum(dy64 * rounded, axis=rows),
        dx_terms=rrms * (np.abs(dn) + np.abs(normalized) * c_terms),
        dgamma_terms=np.sum(np.abs(dy64 * rounded), axis=rows),
    )


def unit_roundoff(dtype) -> float:
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def assert_close(actual, expected: np.ndarray, *, terms=None, extra=0.0, what: str = ""):
    """Asserts |actual - expected| <= u · |expected| + 64 · u32 · terms + extra, element by element.

    u is the unit roundoff of actual's dtype and u32 that of float32, in which the kernels compute; ``terms`` is the
    magnitude of the terms that were summed (default: |expected|), ``extra`` an allowance of the test's own.
    All-zero results fail wherever what is expected is not zero.
    """
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, (
        f"{what}: shape {actual.shape}, expected {expected.shape}"
    )
    terms = np.abs(expected) if terms is None else terms
    smallest = float(ml_dtypes.finfo(actual.dtype).smallest_subnormal)
    bound = (
        unit_roundoff(actual.dtype) * np.abs(expected)
        + 64 * unit_roundoff(np.float32) * terms
        + smallest
        + extra
    )
    error = np.abs(to64(actual) - expected)
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else ()
    assert error.size == 0 or np.all(error <= bound), (
        f"{what}: at {worst} got {actual[worst]}, expected {expected[worst]}: "
        f"error {error[worst]:.3g} over the bound {bound[worst]:.3g}"
    )
