"""Which calls for a GPU are kernels and which are plain JAX where nothing says which, read off lowered programs."""

from __future__ import annotations

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest

from jax_rmsnorm import DISABLED_EXPORT_CHECKS, _ffi, add_rms_norm, rms_norm, rms_norm_rope
from jax_rmsnorm.cli._train import backend
from jax_rmsnorm.cli._train.config import PRESETS

pytestmark = [
    pytest.mark.skipif(
        _ffi.CUDA.module is None, reason="the CUDA module is not part of this build"
    ),
    pytest.mark.usefixtures("as_measured"),
]
GAMMA = jax.ShapeDtypeStruct((128,), jnp.float32)


def shape_of(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def kernels(f, *operands, platform: str = "cuda") -> list[str]:
    lowered = jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,))
    return re.findall(r"custom_call @jax_rmsnorm_(\w+)", lowered.as_text())


def with_gradients(norm):
    """The norm's results, and the gradients of all that it takes."""

    def run(*operands):
        results, vjp = jax.vjp(norm, *operands)
        return results, vjp(results)

    return run


def norm_of(x, gamma):
    return rms_norm(x, gamma)


def add_norm_of(x, gamma):
    return add_rms_norm(x, x, gamma)


def rope_of(x, gamma):
    table = jnp.ones((x.shape[-3], 64))
    return rms_norm_rope(x, gamma, table, table)


OPERATIONS = pytest.mark.parametrize(
    ("norm", "prefix"), [(norm_of, ""), (add_norm_of, "add_"), (rope_of, "rope_")]
)


@OPERATIONS
def test_without_derivatives(norm, prefix):
    """A kernel from four million elements on."""
    assert kernels(norm, shape_of(2, 1024, 15, 128), GAMMA) == []
    assert kernels(norm, shape_of(2, 1024, 16, 128), GAMMA) == [f"{prefix}forward"]


@OPERATIONS
def test_with_derivatives(norm, prefix):
    """Both ways are kernels from 65,536 elements on, and neither is below."""
    run = with_gradients(norm)
    assert kernels(run, shape_of(2, 64, 3, 128), GAMMA) == []
    assert sorted(kernels(run, shape_of(2, 64, 4, 128), GAMMA)) == [
        f"{prefix}backward",
        f"{prefix}forward",
    ]


def test_long_rows_are_kernels_sooner():
    for hidden, expected in ((16_384, []), (16_385, ["forward"])):
        gamma = jax.ShapeDtypeStruct((hidden,), jnp.float32)
        assert kernels(norm_of, shape_of(4, hidden), gamma) == expected


def test_a_kernel_that_is_asked_for_is_one_at_any_size():
    norm = functools.partial(rms_norm, implementation="kernel")
    assert kernels(norm, shape_of(1, 128), GAMMA) == ["forward"]
    assert len(kernels(with_gradients(norm), shape_of(1, 128), GAMMA)) == 2


def test_a_cpu_has_kernels_at_any_size():
    assert kernels(norm_of, shape_of(1, 128), GAMMA, platform="cpu") == ["forward"]


def test_rows_whose_number_is_not_known_count_as_many():
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(
        jax.jit(norm_of), platforms=["cuda"], disabled_checks=DISABLED_EXPORT_CHECKS
    )(jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16), GAMMA)
    assert "jax_rmsnorm_forward" in exported.mlir_module()


def test_the_training_example_names_what_its_steps_run():
    """Though a norm of one of its sequences, without derivatives, would be plain JAX."""
    config = PRESETS["gpu"]
    assert kernels(norm_of, shape_of(config.seq, 128), GAMMA) == []
    lowered = backend.trace_norm(config).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @jax_rmsnorm_(\w+)", lowered) == ["forward", "backward"]
