"""Where a benchmark runs: the device, its kernels and the versions of everything that takes part."""

from __future__ import annotations

import os
import platform
from collections.abc import Container
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

import jax_rmsnorm

from ... import _ffi
from .._errors import CommandError

_DISTRIBUTIONS = (
    *("jax-rmsnorm", "jax", "jaxlib", "numpy", "flax", "optax", "tokamax", "torch", "triton"),
    *("liger-kernel", "quack-kernels", "flashinfer-python"),
    *("nvidia-cudnn-frontend", "nvidia-cudnn-cu13"),
)


def find_device(known: Container[str]) -> str:
    """JAX's default platform.

    Raises:
        CommandError: it is none of ``known``.
    """
    device = jax.default_backend()
    if device not in known:
        raise CommandError(f"there are kernels for cpu and gpu only, and JAX runs on {device}")
    return device


def require_kernels(device: str) -> None:
    """Raises CommandError where the kernels of this platform are not loaded."""
    native = _ffi.CUDA if device == "gpu" else _ffi.CPU
    if native.module is None:
        raise CommandError(f"there is no kernel to measure on {device}: {native.reason}")


def describe() -> dict[str, str]:
    """What times depend on besides the code: device and versions."""
    device = jax.devices()[0]
    kernels: Any = jax_rmsnorm.info()["cuda kernels" if device.platform == "gpu" else "cpu kernels"]
    installed = {name: _version(name) for name in _DISTRIBUTIONS}
    return {
        "device": f"{device.device_kind} ({platform.machine()}, {os.cpu_count()} CPU cores)",
        "platform": " ".join(device.client.platform_version.split()),
        "kernels": ", ".join(f"{key} {value}" for key, value in kernels.items() if key != "loaded"),
        "python": platform.python_version(),
        **{name: found for name, found in installed.items() if found is not None},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
