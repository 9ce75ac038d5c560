"""What jax.vmap promises, written as plain loops in NumPy."""

from __future__ import annotations

import itertools

import jax
import numpy as np

BATCH = 3


def combinations(odd: tuple[int, ...], even: tuple[int, ...]) -> list[tuple[int | None, ...]]:
    """Every set of operands that can be batched: an odd number along some axes, an even one along others."""
    return [
        tuple(
            axis if chosen else None
            for axis, chosen in zip(odd if sum(subset) % 2 else even, subset, strict=True)
        )
        for subset in itertools.product((False, True), repeat=len(odd))
        if any(subset)
    ]


def batched(arrays, axes) -> list[np.ndarray]:
    """Three examples of each array that has an axis, along it."""
    arrays = [np.asarray(a) for a in arrays]
    return [
        a if axis is None else np.stack([a, -2 * a, a * a], axis)
        for a, axis in zip(arrays, axes, strict=True)
    ]


def loop(f, arrays, axes):
    """What ``jax.vmap(f, axes)`` promises, without it."""
    arrays = [np.asarray(a) for a in arrays]
    examples = [
        [a if axis is None else a.take(i, axis) for a, axis in zip(arrays, axes, strict=True)]
        for i in range(BATCH)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(f(*example) for example in examples))
