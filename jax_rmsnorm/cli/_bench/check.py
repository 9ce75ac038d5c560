"""Whether a contender computes RMSNorm: its results against NumPy's float64."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .inputs import EPS, Inputs
from .shapes import Case

_SAMPLED_ROWS = 16
_BLOCK_ELEMENTS = 2**22
# Between the rounding of each dtype's best and worst correct implementations and the first wrong digit.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


class Check:
    """The right results of one case and one set of inputs: y or dx on sampled rows, all of dgamma."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._tolerance = _TOLERANCE[case.x_dtype]
        self._rows = _sample(case.rows)
        x, dy = (_take64(array, self._rows) for array in (inputs.x, inputs.dy))
        gamma = _to64(inputs.gamma)
        normalized, rrms = _normalize(x)
        if case.op == "forward":
            self._names = ("y",)
            self._rowwise, self._dgamma = normalized * gamma, None
        else:
            self._names = ("dx", "dgamma")
            dn = dy * gamma
            c = np.mean(dn * normalized, axis=-1, keepdims=True)
            self._rowwise = rrms * (dn - normalized * c)
            self._dgamma = _dgamma(inputs)

    def problem(self, results: Sequence[jax.Array]) -> str | None:
        """What is wrong with (y, ...) or (dx, dgamma, ...); None if nothing is."""
        for name, result in zip(self._names, results, strict=False):
            if not bool(jnp.isfinite(result).all()):
                return f"{name} is not finite everywhere"
        error = _relative(_take64(results[0], self._rows), self._rowwise)
        worst = int(np.argmax(error))
        if not error[worst] <= self._tolerance:
            return self._message(self._names[0], error[worst], f" in row {self._rows[worst]}")
        if self._dgamma is None:
            return None
        (error,) = _relative(_to64(results[1]).reshape(1, -1), self._dgamma.reshape(1, -1))
        return self._message("dgamma", error, "") if not error <= self._tolerance else None

    def _message(self, name: str, error: float, where: str) -> str:
        return f"{name} has a relative error of {error:.2g}{where}, over {self._tolerance:.2g}"


def _sample(rows: int) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(0, rows, _SAMPLED_ROWS)
    return np.unique([0, rows - 1, *drawn])


def _to64(array: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _take64(array: jax.Array, rows: np.ndarray) -> np.ndarray:
    return _to64(array[rows])


def _normalize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rrms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)
    return x * rrms, rrms


def _dgamma(inputs: Inputs) -> np.ndarray:
    rows, hidden = inputs.x.shape
    arrays = np.asarray(inputs.x), np.asarray(inputs.dy)
    total = np.zeros(hidden)
    block = max(1, _BLOCK_ELEMENTS // hidden)
    for start in range(0, rows, block):
        x, dy = (_to64(array[start : start + block]) for array in arrays)
        total += np.einsum("rh,rh->h", dy, _normalize(x)[0])
    return total


def _relative(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """‖actual - expected‖ / ‖expected‖ of each row."""
    return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
