"""Comparison of trees of arrays. Nothing that is all zero counts as equal."""

from __future__ import annotations

import functools

import jax
import numpy as np
import oracle


def assert_same_bits(actual, expected) -> None:
    """The same structure, dtypes, shapes and bits (any NaN equals any other)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = np.asarray(a), np.asarray(b)
        assert np.any(b)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.signbit(a) & (a == a), np.signbit(b) & (b == b))


def assert_near(actual, expected, tolerance: float = 1e-5) -> None:
    """The same structure and shapes; leaf by leaf, errors relative to the largest magnitude."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(b)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.any(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def assert_same_kind(actual, expected) -> None:
    """NaN where expected is, infinite likewise and of the same sign; elsewhere near to it."""
    actual, expected = oracle.to64(actual), oracle.to64(expected)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(
        np.isinf(actual) * np.sign(actual), np.isinf(expected) * np.sign(expected)
    )
    finite = np.isfinite(expected)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=0.02, atol=1e-6)


def in_float64(f, *arguments):
    """``f`` of the arguments in float64, in plain JAX."""
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in arguments]
        plain = jax.jit(functools.partial(f, implementation="xla"))
        return jax.tree.map(np.asarray, plain(*wide))
