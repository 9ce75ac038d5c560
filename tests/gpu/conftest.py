"""These tests run where JAX's default backend is a GPU and the CUDA kernels are in the build."""

import jax
import pytest

from jax_rmsnorm import _ffi


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu" and _ffi.CUDA.module is not None:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and the CUDA kernels")
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(skip)
