"""GPUs that are not here: JAX compiles for them all the same, where its CUDA plugin is installed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rmsnorm import _ffi

# What XLA's compiler asks of a GPU: an NVIDIA H200's properties.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150121545728
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


@functools.cache
def _devices(count: int) -> list[Any]:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_H200, topology=f"1x1x{count}"
    )
    return list(topology.devices)


def _compiles_for_gpus() -> bool:
    if _ffi.CUDA.module is None:
        return False
    try:
        _devices(1)
    except NotImplementedError:
        return False
    return True


needs_gpu_compiler = pytest.mark.skipif(
    not _compiles_for_gpus(), reason="needs the CUDA kernels and JAX's CUDA plugin, and no GPU"
)


def make_mesh(axis_type: AxisType, **sizes: int) -> Mesh:
    """A mesh of GPUs, one host's."""
    shape = tuple(sizes.values())
    devices = np.array(_devices(int(np.prod(shape)))).reshape(shape)
    return Mesh(devices, tuple(sizes), axis_types=(axis_type,) * len(shape))


def shape_of(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compile_for(mesh: Mesh, f: Any, *arguments: jax.ShapeDtypeStruct, **options: Any) -> Any:
    """The program of ``jax.jit(f, **options)``."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(f, **options).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).compile()
