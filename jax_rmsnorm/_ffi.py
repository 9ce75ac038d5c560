"""The native modules: loads them, and registers their handlers as XLA FFI targets."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
from types import ModuleType

import jax

# Targets: the native modules have a function of the same name without the prefix, which returns the handler.
_PREFIX = "jax_rmsnorm_"
FORWARD = _PREFIX + "forward"
BACKWARD = _PREFIX + "backward"
ADD_FORWARD = _PREFIX + "add_forward"
ADD_BACKWARD = _PREFIX + "add_backward"
ROPE_FORWARD = _PREFIX + "rope_forward"
ROPE_BACKWARD = _PREFIX + "rope_backward"
TARGETS = (FORWARD, BACKWARD, ADD_FORWARD, ADD_BACKWARD, ROPE_FORWARD, ROPE_BACKWARD)


@dataclasses.dataclass(frozen=True)
class NativeModule:
    """One native module as it was found: the module, or the reason why there is none."""

    platform: str
    module: ModuleType | None
    reason: str


def _why_missing() -> str:
    if importlib.util.find_spec("jax_rmsnorm._cpu") is None:
        folder = pathlib.Path(__file__).parent
        return f"{folder} holds no native modules: the sources were imported, not the installed package"
    return "not part of this build"


def _load(name: str, platform: str) -> NativeModule:
    try:
        module = importlib.import_module(f"jax_rmsnorm.{name}")
    except ModuleNotFoundError:
        return NativeModule(platform, None, _why_missing())
    except ImportError as error:
        return NativeModule(platform, None, str(error))
    for target in TARGETS:
        handler = getattr(module, target.removeprefix(_PREFIX))()
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    return NativeModule(platform, module, "")


@functools.cache
def why_not_on_local_gpus() -> str | None:
    """Says so if the CUDA kernels were not compiled for one of the GPUs here.

    Machine code runs on its own generation, from its own revision on; the newest is also there as PTX, which later
    generations compile.
    """
    if CUDA.module is None or jax.default_backend() != "gpu":
        return None
    compiled = [divmod(int(number), 10) for number in CUDA.module.architectures.split()]
    for device in jax.local_devices():
        major, minor = map(int, device.compute_capability.split("."))
        same_generation = any(major == m and minor >= n for m, n in compiled)
        if not same_generation and (major, minor) < max(compiled):
            return (
                f"{device.device_kind} has compute capability {major}.{minor}, and the CUDA kernels were compiled "
                f"for {CUDA.module.architectures} (CMake option JAX_RMSNORM_CUDA_ARCHITECTURES)"
            )
    return None


CPU = _load("_cpu", "cpu")
CUDA = _load("_cuda", "CUDA")
