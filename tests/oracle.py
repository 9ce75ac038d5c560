"""RMSNorm and what is fused with it in NumPy's float64, and bounds that scale with what is compared."""

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


def rms_norm(
    x, gamma, dy, *, eps=1e-5, zero_centered_gamma=False, rounding="once", dy_terms=None
) -> Result:
    """With ``dy_terms``, of dy's shape, where dy is a sum: the sum of the magnitudes of its terms."""
    dtype = np.asarray(x).dtype
    x64, dy64 = to64(x), to64(dy)
    g64 = np.ones(x64.shape[-1]) if gamma is None else to64(gamma) + zero_centered_gamma
    rrms = 1 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps)
    normalized = x64 * rrms
    rounded = _round_to(normalized, dtype) if rounding == "before_gamma" else normalized
    dn = dy64 * g64
    c = np.mean(dn * normalized, axis=-1, keepdims=True)
    rows = tuple(range(x64.ndim - 1))
    dy_terms = np.abs(dy64) if dy_terms is None else dy_terms
    dn_terms = dy_terms * np.abs(g64)
    c_terms = np.mean(dn_terms * np.abs(normalized), axis=-1, keepdims=True)
    return Result(
        y=rounded * g64,
        rrms=rrms[..., 0],
        dx=rrms * (dn - normalized * c),
        dgamma=np.sum(dy64 * rounded, axis=rows),
        dx_terms=rrms * (dn_terms + np.abs(normalized) * c_terms),
        dgamma_terms=np.sum(dy_terms * np.abs(rounded), axis=rows),
    )


def add_rms_norm(x, residual, gamma, dy, dh, **options) -> tuple[np.ndarray, Result]:
    """h to the bit, and float64 results for it; dx, plus dh, is the gradient of both summands."""
    total = np.asarray(x).astype(np.float32) + np.asarray(residual).astype(np.float32)
    h = total.astype(np.asarray(residual).dtype)
    norm = rms_norm(h, gamma, dy, **options)
    dh64 = to64(dh)
    return h, dataclasses.replace(norm, dx=norm.dx + dh64, dx_terms=norm.dx_terms + np.abs(dh64))


@dataclasses.dataclass(frozen=True)
class RopeResult(Result):
    """With the gradients of cos and sin, in their shape, and magnitudes for them and for y."""

    dcos: np.ndarray
    dsin: np.ndarray
    y_terms: np.ndarray
    dcos_terms: np.ndarray
    dsin_terms: np.ndarray


class Pairs:
    """The pairs that are rotated, of heads [..., D], as complex numbers [..., R/2]."""

    def __init__(self, half: int, interleaved: bool):
        if interleaved:
            self.first, self.second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            self.first, self.second = slice(0, half), slice(half, 2 * half)

    def of(self, heads: np.ndarray) -> np.ndarray:
        return heads[..., self.first] + 1j * heads[..., self.second]

    def replaced(self, heads: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        heads = heads.copy()
        heads[..., self.first], heads[..., self.second] = pairs.real, pairs.imag
        return heads

    def turned(self, heads: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """A rotation is a product of complex numbers; ``turns`` [..., R/2] serve all heads."""
        return self.replaced(heads, self.of(heads) * turns[..., None, :])

    def turned_terms(self, heads: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """No less than the sum of the magnitudes of the terms of what `turned` returns."""
        pairs = self.of(np.abs(heads))
        size = np.abs(turns.real) + np.abs(turns.imag)
        either = (pairs.real + pairs.imag) * size[..., None, :]
        return self.replaced(np.abs(heads), either * (1 + 1j))


def _sum_to(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Summed over the axes that broadcasting ``shape`` to that of ``values`` adds or stretches."""
    values = values.sum(axis=tuple(range(values.ndim - len(shape))))
    stretched = tuple(i for i, size in enumerate(shape) if size == 1)
    return values.sum(axis=stretched, keepdims=True)


def rms_norm_rope(x, gamma, cos, sin, dy, *, interleaved=False, **options) -> RopeResult:
    turns, dy64 = to64(cos) + 1j * to64(sin), to64(dy)
    pairs = Pairs(turns.shape[-1], interleaved)
    norm = rms_norm(x, gamma, pairs.turned(dy64, turns.conj()), **options)
    terms = rms_norm(x, gamma, pairs.turned_terms(dy64, turns), **options)
    n, d = pairs.of(norm.y), pairs.of(dy64)

    def sum_to_table(products: np.ndarray) -> np.ndarray:
        return _sum_to(products.sum(axis=-2), turns.shape)

    return RopeResult(
        y=pairs.turned(norm.y, turns),
        rrms=norm.rrms,
        dx=norm.dx,
        dgamma=norm.dgamma,
        dx_terms=terms.dx_terms,
        dgamma_terms=terms.dgamma_terms,
        dcos=sum_to_table(n.real * d.real + n.imag * d.imag),
        dsin=sum_to_table(n.real * d.imag - n.imag * d.real),
        y_terms=pairs.turned_terms(norm.y, turns),
        dcos_terms=sum_to_table(np.abs(n.real * d.real) + np.abs(n.imag * d.imag)),
        dsin_terms=sum_to_table(np.abs(n.real * d.imag) + np.abs(n.imag * d.real)),
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
