"""What rms_norm traces, lowers and exports to, for platforms that this host need not have."""

from __future__ import annotations

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest
from checks import draw
from compare import assert_same_bits
from jax.experimental import serialize_executable

from jax_rmsnorm import DISABLED_EXPORT_CHECKS, SMMargin, _ffi, rms_norm

X, GAMMA, DY = (
    draw(0, (6, 16), jnp.bfloat16),
    draw(1, 16, jnp.float32),
    draw(2, (6, 16), jnp.bfloat16),
)
FORWARD, BACKWARD = "@jax_rmsnorm_forward", "@jax_rmsnorm_backward"
PLATFORM_HAS_KERNEL = {
    "cpu": True,
    "cuda": _ffi.CUDA.module is not None,
    "tpu": False,
    "rocm": False,
}


def gradients(x, gamma, dy, **options):
    """y, dx and dgamma."""
    y, vjp = jax.vjp(lambda x, g: rms_norm(x, g, **options), x, gamma)
    return y, *vjp(dy)


def lowered(f, *arguments, platforms=("cpu",)) -> str:
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def primitives(f, *arguments) -> list[str]:
    """The names of this package's primitives in the jaxpr of f, jaxprs inside included."""
    return re.findall(r"= (rms_norm_\w+)\[", str(jax.make_jaxpr(f)(*arguments)))


@pytest.mark.parametrize("gamma", [None, GAMMA], ids=["no gamma", "gamma"])
def test_one_primitive_each_way(gamma):
    assert primitives(rms_norm, X, gamma) == ["rms_norm_forward"]
    assert primitives(gradients, X, gamma, DY) == ["rms_norm_forward", "rms_norm_backward"]
    assert primitives(functools.partial(gradients, implementation="xla"), X, gamma, DY) == []


def test_inference_writes_no_reciprocal_rms():
    (inference,) = (e for e in jax.make_jaxpr(rms_norm)(X, GAMMA).eqns[0].params["call_jaxpr"].eqns)
    assert [v.aval.shape for v in inference.outvars] == [(6, 16)]
    assert "tensor<6xf32>" not in lowered(rms_norm, X, GAMMA)
    assert "tensor<6xf32>" in lowered(gradients, X, GAMMA, DY)


@pytest.mark.parametrize("platform", PLATFORM_HAS_KERNEL)
def test_custom_calls_by_platform(platform):
    text = lowered(gradients, X, GAMMA, DY, platforms=(platform,))
    expected = int(PLATFORM_HAS_KERNEL[platform])
    assert (text.count(FORWARD), text.count(BACKWARD)) == (expected, expected)
    assert text.count("stablehlo.custom_call") == 2 * expected
    assert ("stablehlo.rsqrt" in text) == (not expected)


@pytest.mark.parametrize(("hidden", "partial_rows"), [(336, 3), (332, 8), (333, 8)])
def test_rows_that_begin_anywhere_have_a_partial_row_for_each_shift(hidden, partial_rows):
    """Blocks take rows of one shift only, of the eight that rows of 16-bit elements may have."""
    if not PLATFORM_HAS_KERNEL["cuda"]:
        pytest.skip("the CUDA module is not part of this build: cuda lowers to plain JAX")
    groups = 300
    x = jax.ShapeDtypeStruct((groups, 20, hidden), jnp.bfloat16)
    gamma = jax.ShapeDtypeStruct((groups, hidden), jnp.float32)
    text = lowered(jax.vmap(gradients), x, gamma, x, platforms=("cuda",))
    assert f"tensor<{groups}x{partial_rows}x{hidden}xf32>" in text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_attributes(platform):
    if not PLATFORM_HAS_KERNEL[platform]:
        pytest.skip("the CUDA module is not part of this build: cuda lowers to plain JAX")
    norm = functools.partial(
        gradients,
        eps=0.25,
        zero_centered_gamma=True,
        rounding="before_gamma",
        sm_margin=SMMargin(3, 5, 7),
    )
    lines = lowered(norm, X, GAMMA, DY, platforms=(platform,)).splitlines()
    (forward,), (backward,) = (
        [line for line in lines if target in line] for target in (FORWARD, BACKWARD)
    )
    for line, margin in [(forward, 3), (backward, 5)]:
        assert (
            f"round_before_gamma = true, sm_margin = {margin} : i64, zero_centered_gamma = true"
            in line
        )
    assert "eps = 2.500000e-01 : f32" in forward
    assert "eps" not in backward
    assert forward.endswith("-> (tensor<6x16xbf16>, tensor<6xf32>)")
    assert backward.endswith("-> (tensor<6x16xbf16>, tensor<16xf32>, tensor<6x16xf32>)")


def test_several_platforms():
    text = lowered(rms_norm, X, GAMMA, platforms=("cpu", "cuda", "tpu"))
    assert text.count(FORWARD) == sum(PLATFORM_HAS_KERNEL.values())
    assert "stablehlo.case" in text
    assert "stablehlo.rsqrt" in text


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_kernel_where_there_is_none(platform):
    traced = jax.jit(functools.partial(rms_norm, implementation="kernel")).trace(X, GAMMA)
    with pytest.raises(
        NotImplementedError, match=f"implementation='kernel' on platform {platform}"
    ):
        traced.lower(lowering_platforms=(platform,))


def round_trip(f, *arguments, platforms=None):
    exported = jax.export.export(
        jax.jit(f), platforms=platforms, disabled_checks=DISABLED_EXPORT_CHECKS
    )(*arguments)
    return jax.export.deserialize(exported.serialize())


@pytest.mark.parametrize("gamma", [None, GAMMA], ids=["no gamma", "gamma"])
def test_export(gamma):
    exported = round_trip(gradients, X, gamma, DY)
    assert_same_bits(exported.call(X, gamma, DY), jax.jit(gradients)(X, gamma, DY))


def test_export_without_the_constant_is_refused():
    with pytest.raises(ValueError, match="jax_rmsnorm_forward"):
        jax.export.export(jax.jit(rms_norm))(X, GAMMA)


def test_export_for_other_platforms():
    exported = round_trip(gradients, X, GAMMA, DY, platforms=["cpu", "cuda", "tpu"])
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert_same_bits(exported.call(X, GAMMA, DY), jax.jit(gradients)(X, GAMMA, DY))


def test_export_of_the_derivative():
    exported = jax.export.export(jax.jit(rms_norm), disabled_checks=DISABLED_EXPORT_CHECKS)(
        X, GAMMA
    )
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    y, vjp = jax.vjp(again.call, X, GAMMA)
    assert_same_bits((y, *vjp(DY)), jax.jit(gradients)(X, GAMMA, DY))


@pytest.mark.parametrize("shape", [(6, 16), (1, 16), (1000, 16)])
def test_export_with_symbolic_rows(shape):
    rows = jax.export.symbolic_shape("rows, 16")
    x = jax.ShapeDtypeStruct(rows, jnp.bfloat16)
    exported = round_trip(gradients, x, GAMMA, x)
    x, dy = draw(3, shape, jnp.bfloat16), draw(4, shape, jnp.bfloat16)
    assert_same_bits(exported.call(x, GAMMA, dy), jax.jit(gradients)(x, GAMMA, dy))


@pytest.mark.parametrize("normalized_shape", [None, "symbolic"])
def test_export_with_symbolic_hidden(normalized_shape):
    shape = jax.export.symbolic_shape("batch, rows, hidden")
    x, gamma = (
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
    )
    normalized = None if normalized_shape is None else shape[-1:]
    exported = round_trip(functools.partial(gradients, normalized_shape=normalized), x, gamma, x)
    x, gamma, dy = (draw(i, s, jnp.float32) for i, s in enumerate([(2, 3, 50), (50,), (2, 3, 50)]))
    assert_same_bits(exported.call(x, gamma, dy), jax.jit(gradients)(x, gamma, dy))


def test_compile_ahead_of_time_and_serialize():
    compiled = jax.jit(gradients).lower(X, GAMMA, DY).compile()
    expected = compiled(X, GAMMA, DY)
    loaded = serialize_executable.deserialize_and_load(
        *serialize_executable.serialize(compiled), execution_devices=jax.devices()[:1]
    )
    assert_same_bits(loaded(X, GAMMA, DY), expected)


def test_scratch_of_many_groups_is_small():
    """Per-example gradients: dgamma's scratch does not grow with the examples beyond one row each."""
    gradients = jax.vmap(jax.grad(lambda x, g: jnp.sum(rms_norm(x, g)), 1), (0, None))
    x, gamma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(4096, 32, 1024), (1024,)])
    text = jax.jit(gradients).lower(x, gamma).as_text()
    (call,) = [line for line in text.splitlines() if "@jax_rmsnorm_backward(" in line]
    results = call.rpartition("->")[2]
    assert re.findall(r"tensor<([0-9x]*)xf32>", results) == [
        "4096x32x1024",  # dx
        "4096x1024",  # dgamma
        "4096x1x1024",  # scratch
    ]
