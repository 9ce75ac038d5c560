"""Compiled programs of sharded arrays, kept: serialized, and in JAX's persistent compilation cache."""

from __future__ import annotations

import functools
import gc
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from checks import draw, needs_8_devices
from compare import assert_same_bits
from compiled import collectives
from jax.experimental import serialize_executable
from jax.sharding import AxisType
from sharded import compile_on, norm_gradients, put

pytestmark = needs_8_devices
BF16 = jnp.bfloat16
SHAPE = (8, 16, 64)
X, DY, GAMMA = draw(0, SHAPE, BF16), draw(1, SHAPE, BF16), draw(4, (64,), BF16, offset=1.0)


def make_mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)


@pytest.mark.parametrize(
    ("axis_type", "eps"), [(AxisType.Auto, 1e-4), (AxisType.Explicit, 1e-6)], ids=str
)
def test_compiled_program_is_serialized(axis_type, eps):
    # An eps of its own each: JAX cannot run what it serialized of a CPU's program out of its compilation cache.
    mesh = make_mesh(axis_type)
    operands = put(mesh, X, "data"), put(mesh, GAMMA), put(mesh, DY, "data")
    compiled = compile_on(mesh, functools.partial(norm_gradients, eps=eps), *operands)
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    assert_same_bits(loaded(*operands), compiled(*operands))


def lower_sharded(eps: float) -> Any:
    mesh = make_mesh()
    operands = put(mesh, X, "data"), put(mesh, GAMMA), put(mesh, DY, "data")
    return jax.jit(functools.partial(norm_gradients, eps=eps)).lower(*operands)


def test_the_same_program_has_the_same_text():
    """By which the persistent compilation cache finds it again, in this process and in others."""
    first, again, other = (lower_sharded(eps).as_text() for eps in (1e-5, 1e-5, 3.0))
    assert first.count("@CustomSPMDPartitioning") == 2
    assert first == again
    addresses = r'backend_config = "[^"]*"'  # which jax_remove_custom_partitioning_ptr_from_cache_key leaves out
    assert re.sub(addresses, "", first) != re.sub(addresses, "", other)


def test_programs_that_share_what_partitions_them():
    """Whichever is dropped first."""
    first, second = lower_sharded(1e-5), lower_sharded(1e-5)
    operands = put(make_mesh(), X, "data"), put(make_mesh(), GAMMA), put(make_mesh(), DY, "data")
    expected = first.compile()(*operands)
    del first
    gc.collect()
    assert_same_bits(second.compile()(*operands), expected)
    first, second = lower_sharded(1e-3), lower_sharded(1e-3)
    del second
    gc.collect()
    assert collectives(first.compile()) == {"all-reduce f32[64]": 1}


def test_compilation_cache_with_addresses_left_out(tmp_path):
    """Each eps has a program of its own in the persistent cache, and a process that is new finds it there."""
    found = [
        subprocess.run(
            [sys.executable, "-c", FROM_CACHE, str(tmp_path), eps],
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout.split()
        for eps in ("1e-5", "1e-5", "3.0")
    ]  # fmt: skip
    assert [misses for misses, _ in found] == ["1", "0", "1"]
    assert [float(y) for _, y in found] == pytest.approx([1.0, 1.0, 0.5], rel=1e-4)


FROM_CACHE = """
import sys
import jax, jax.monitoring, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax_rmsnorm import rms_norm

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
x = jax.device_put(jnp.ones((8, 32)), jax.NamedSharding(jax.make_mesh((8,), ("data",)), P("data")))
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
y = jax.jit(lambda x: rms_norm(x, eps=float(sys.argv[2])))(x)
print(sum(event.endswith("cache_misses") for event in events), y.addressable_shards[0].data[0, 0])
"""
