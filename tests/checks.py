"""Checks that several test files share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jax_rmsnorm

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def draw(seed: int, shape, dtype, *, scale: float = 1.0, offset: float = 0.0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape) * scale + offset
    return jnp.asarray(values.astype(dtype))


def check_call(
    shape, x_dtype, gamma_dtype, y_dtype, *, implementation="kernel", scale=1.0, **options
):
    """One call of `rms_norm`, forward and backward, against the oracle."""
    hidden = shape[-1]
    x = draw(0, shape, x_dtype, scale=scale)
    center = 0.0 if options.get("zero_centered_gamma") else 1.0
    gamma = None if gamma_dtype is None else draw(1, hidden, gamma_dtype, scale=0.5, offset=center)
    dy = draw(2, shape, y_dtype)
    norm = functools.partial(
        jax_rmsnorm.rms_norm, dtype=y_dtype, implementation=implementation, **options
    )
    y, vjp = jax.vjp(norm, x, gamma)
    dx, dgamma = vjp(dy)
    arithmetic = {name: value for name, value in options.items() if name != "sm_margin"}
    want = oracle.rms_norm(x, gamma, dy, **arithmetic)
    assert (y.dtype, dx.dtype) == (y_dtype, x_dtype)
    # Rounding before gamma may fall on the other side of a near-tie: one more unit in the last place.
    flip = 2 * oracle.unit_roundoff(x_dtype) if options.get("rounding") == "before_gamma" else 0
    oracle.assert_close(y, want.y, extra=flip * np.abs(want.y), what="y")
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    # The same function without differentiation writes the same bits.
    np.testing.assert_array_equal(np.asarray(norm(x, gamma)), np.asarray(y))
    if gamma is None:
        assert dgamma is None
    else:
        assert dgamma.dtype == gamma_dtype
        oracle.assert_close(
            dgamma,
            want.dgamma,
            terms=want.dgamma_terms,
            extra=flip * want.dgamma_terms,
            what="dgamma",
        )
