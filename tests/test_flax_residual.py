"""``residual=`` and ``copies=`` of the Flax modules, with the parameters of the module without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import draw
from flax import linen as flax_linen
from flax import nnx as flax_nnx

import jax_rmsnorm.linen
import jax_rmsnorm.nnx

SHAPE = (3, 5, 64)
PAIRS = [
    (jnp.float32, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.bfloat16),
]

Call = Callable[..., Any]


def nnx_call(scale: jax.Array, **options: Any) -> Call:
    module = jax_rmsnorm.nnx.RMSNorm(SHAPE[-1], rngs=flax_nnx.Rngs(0), **options)
    module.scale[...] = scale
    return module


def linen_call(scale: jax.Array, **options: Any) -> Call:
    module = jax_rmsnorm.linen.RMSNorm(**options)

    def call(*arguments: Any, **keywords: Any) -> Any:
        return module.apply({"params": {"scale": scale}}, *arguments, **keywords)

    return call


FLAVOURS = pytest.mark.parametrize("make", [nnx_call, linen_call])


def operands(x_dtype: Any, residual_dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    scale = draw(2, SHAPE[-1:], jnp.float32, scale=0.5, offset=1.0)
    return draw(0, SHAPE, x_dtype), draw(1, SHAPE, residual_dtype), scale


@jax.numpy_dtype_promotion("standard")  # Flax promotes a bfloat16 stream and a float32 scale
@FLAVOURS
@pytest.mark.parametrize(("x_dtype", "residual_dtype"), PAIRS)
@pytest.mark.parametrize("implementation", ["kernel", "xla"])
def test_values(make, x_dtype, residual_dtype, implementation):
    x, residual, scale = operands(x_dtype, residual_dtype)
    y, h = make(scale, implementation=implementation)(x, residual=residual)
    assert h.dtype == residual_dtype
    assert y.dtype == jnp.promote_types(residual_dtype, jnp.float32)
    oracle.assert_close(h, oracle.to64(x) + oracle.to64(residual), what="h")
    want = oracle.rms_norm(h, scale, h, eps=1e-6)
    oracle.assert_close(y, want.y, what="y")


@FLAVOURS
def test_dtype_of_the_result(make):
    """A float32 stream and layers in bfloat16."""
    x, residual, scale = operands(jnp.bfloat16, jnp.float32)
    y, h = make(scale, dtype=jnp.bfloat16)(x, residual=residual)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    want = oracle.rms_norm(h, scale.astype(jnp.bfloat16), h, eps=1e-6)
    rounded_scale = 2 * oracle.unit_roundoff(jnp.bfloat16) * np.abs(want.y)
    oracle.assert_close(y, want.y, extra=rounded_scale, what="y")


@FLAVOURS
def test_gradients_are_those_of_the_sum(make):
    x, residual, scale = operands(jnp.float32, jnp.float32)
    dy, dh = draw(3, SHAPE, jnp.float32), draw(4, SHAPE, jnp.float32)

    def fused(x, residual):
        return make(scale)(x, residual=residual)

    (_, h), vjp = jax.vjp(fused, x, residual)
    want = oracle.rms_norm(h, scale, dy, eps=1e-6)
    for got in vjp((dy, dh)):
        terms = want.dx_terms + np.abs(oracle.to64(dh))
        oracle.assert_close(got, want.dx + oracle.to64(dh), terms=terms, what="gradient")


@FLAVOURS
def test_a_call_that_only_flax_covers_adds_too(make):
    x, residual, scale = operands(jnp.float32, jnp.float32)
    mask = jnp.arange(SHAPE[-1]) < 40
    y, h = make(scale)(x, mask=mask, residual=residual)
    np.testing.assert_allclose(h, x + residual, rtol=1e-6)
    np.testing.assert_allclose(y, make(scale)(x + residual, mask=mask), rtol=1e-5)


@FLAVOURS
def test_copies(make):
    """As rms_norm's and add_rms_norm's: a tuple in y's place, whose gradients are added up."""
    x, residual, scale = operands(jnp.float32, jnp.float32)
    dys = tuple(draw(seed, SHAPE, jnp.float32) for seed in (3, 4, 5))
    terms = sum(np.abs(oracle.to64(dy)) for dy in dys)
    ys, vjp = jax.vjp(lambda x: make(scale)(x, copies=3), x)
    assert len(ys) == 3
    for y in ys:
        np.testing.assert_array_equal(y, make(scale)(x))
    total = sum(oracle.to64(dy) for dy in dys)
    want = oracle.rms_norm(x, scale, total, eps=1e-6, dy_terms=terms)
    (dx,) = vjp(dys)
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    (first, second), h = make(scale)(x, residual=residual, copies=2)
    np.testing.assert_array_equal(h, x + residual)
    for y in (first, second):
        np.testing.assert_array_equal(y, make(scale)(x, residual=residual)[0])
    with pytest.raises(TypeError, match="copies must be None or an int"):
        make(scale)(x, copies=2.0)


@FLAVOURS
def test_copies_of_a_call_that_only_flax_covers(make):
    x, residual, scale = operands(jnp.float32, jnp.float32)
    mask = jnp.arange(SHAPE[-1]) < 40
    y = make(scale)(x, mask=mask)
    ys = make(scale)(x, mask=mask, copies=2)
    assert isinstance(ys, tuple)
    (only,), h = make(scale)(x, mask=mask, residual=residual, copies=1)
    for got, expected in zip((*ys, only), (y, y, make(scale)(h, mask=mask)), strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="copies must be 1 or more"):
        make(scale)(x, mask=mask, copies=0)


@FLAVOURS
@pytest.mark.parametrize("masked", [False, True])
def test_bad_arguments(make, masked):
    """The same errors, whoever would compute the call."""
    x, residual, scale = operands(jnp.float32, jnp.float32)
    mask = {"mask": jnp.arange(SHAPE[-1]) < 40} if masked else {}
    with pytest.raises(ValueError, match=r"residual must have x's shape"):
        make(scale)(x[:1], residual=residual, **mask)
    with pytest.raises(TypeError, match="residual must be float"):
        make(scale)(x, residual=residual.astype(jnp.int32), **mask)
    for option, message in (
        ({"rounding": "twice"}, "rounding must be one of 'once', 'before_gamma', got 'twice'"),
        ({"implementation": "cuda"}, "implementation must be one of None, 'kernel', 'xla'"),
        ({"sm_margin": -1}, "sm_margin must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            make(scale, **option)(x, **mask)


def test_linen_initializes_the_same_parameters():
    x, residual, _ = operands(jnp.float32, jnp.float32)
    key = jax.random.key(0)
    plain = flax_linen.RMSNorm().init(key, x)
    fused = jax_rmsnorm.linen.RMSNorm().init(key, x, residual=residual)
    assert jax.tree.structure(plain) == jax.tree.structure(fused)
