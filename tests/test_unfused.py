"""The CUDA lowering of the fused operations where their kernels do not take the operands: rms_norm's, and plain JAX."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import draw

from jax_rmsnorm import SMMargin
from jax_rmsnorm._options import Options

BF16, F32 = jnp.bfloat16, jnp.float32
GAMMA = draw(1, (21,), F32, offset=1.0)
DTYPES = pytest.mark.parametrize("dtype", [BF16, F32])
ROUNDINGS = pytest.mark.parametrize("rounding", ["once", "before_gamma"])


def unfused(name: str, rounding, dtype=BF16, gradients=1, **more) -> Any:
    """The private function, jitted. Its module's name is that of a function in the package."""
    module = importlib.import_module(f"jax_rmsnorm._primitives.{name}")
    options = Options(1e-5, False, rounding, jnp.dtype(dtype), SMMargin(), True, **more)
    if name.endswith("forward"):
        flags = {"save_rrms": True}
    else:
        flags = {} if name == "rope_backward" else {"gradients": gradients}
    return jax.jit(functools.partial(module._unfused, options=options, **flags))


def assert_gradients(got, want: oracle.Result, dtype, rounding) -> None:
    dx, dgamma = got
    assert (dx.dtype, dgamma.dtype) == (dtype, F32)
    flip = 2 * oracle.unit_roundoff(dtype) * (rounding == "before_gamma")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    oracle.assert_close(
        dgamma, want.dgamma, terms=want.dgamma_terms, extra=flip * want.dgamma_terms, what="dgamma"
    )


@DTYPES
@ROUNDINGS
def test_add(rounding, dtype):
    """One rounding of dx too, though the norm's own kernel would round before dh is added."""
    residual, x, dy, dh = (draw(seed, (7, 21), dtype) for seed in (0, 2, 3, 4))
    h_want, want = oracle.add_rms_norm(x, residual, GAMMA, dy, dh, rounding=rounding)
    y, h, rrms = unfused("add_forward", rounding, dtype)(residual, x, GAMMA)
    np.testing.assert_array_equal(np.asarray(h), h_want)
    flip = 2 * oracle.unit_roundoff(dtype) * (rounding == "before_gamma")
    oracle.assert_close(y, want.y, extra=flip * np.abs(want.y), what="y")
    oracle.assert_close(rrms, want.rrms, what="rrms")
    gradients = unfused("add_backward", rounding, dtype)(h, rrms, dh, dy, GAMMA)
    assert_gradients(gradients, want, dtype, rounding)


@DTYPES
@ROUNDINGS
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved, rounding, dtype):
    x, dy = (draw(seed, (2, 5, 3, 21), dtype) for seed in (0, 2))
    cos, sin = (draw(seed, (5, 8), F32) for seed in (3, 4))
    options = {"rounding": rounding, "interleaved": interleaved}
    want = oracle.rms_norm_rope(x, GAMMA, cos, sin, dy, **options)
    y, rrms = unfused("rope_forward", dtype=dtype, **options)(x, cos, sin, GAMMA)
    assert y.dtype == dtype
    flip = 2 * oracle.unit_roundoff(dtype) * (rounding == "before_gamma")
    oracle.assert_close(y, want.y, terms=want.y_terms, extra=flip * want.y_terms, what="y")
    gradients = unfused("rope_backward", dtype=dtype, **options)(x, rrms, dy, cos, sin, GAMMA)
    assert_gradients(gradients, want, dtype, rounding)


@DTYPES
@ROUNDINGS
def test_several_gradients(rounding, dtype):
    """Added up in float32, which the kernel is given."""
    x, dh, *dys = (draw(seed, (7, 21), dtype) for seed in range(2, 7))
    total = sum(oracle.to64(dy) for dy in dys)
    terms = sum(np.abs(oracle.to64(dy)) for dy in dys)
    want = oracle.rms_norm(x, GAMMA, total, dy_terms=terms, rounding=rounding)
    rrms = jnp.asarray(want.rrms, F32)
    gradients = unfused("backward", rounding, dtype, gradients=3)(x, rrms, *dys, GAMMA)
    assert_gradients(gradients, want, dtype, rounding)
    dh64 = oracle.to64(dh)
    want = dataclasses.replace(want, dx=want.dx + dh64, dx_terms=want.dx_terms + np.abs(dh64))
    gradients = unfused("add_backward", rounding, dtype, gradients=3)(x, rrms, dh, *dys, GAMMA)
    assert_gradients(gradients, want, dtype, rounding)


@ROUNDINGS
def test_without_gamma(rounding):
    h, dy, dh = (draw(seed, (7, 21), BF16) for seed in (0, 2, 3))
    want = oracle.rms_norm(h, None, dy, rounding=rounding)
    rrms = jnp.asarray(want.rrms, F32)
    (dx,) = unfused("add_backward", rounding)(h, rrms, dh, dy)
    expected = want.dx + oracle.to64(dh)
    terms = want.dx_terms + np.abs(oracle.to64(dh))
    oracle.assert_close(dx, expected, terms=terms, what="dx")
