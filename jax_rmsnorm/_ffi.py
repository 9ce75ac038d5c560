"""The native modules: loads them, and registers their handlers as XLA FFI targets."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import jax

FORWARD = "jax_rmsnorm_forward"
BACKWARD = "jax_rmsnorm_backward"


@dataclasses.dataclass(frozen=True)
class NativeModule:
    """One native module as it was found: the module, or the reason why there is none."""

    platform: str
    module: ModuleType | None
    reason: str


def _load(name: str, platform: str) -> NativeModule:
    try:
        module = importlib.import_module(f"jax_rmsnorm.{name}")
    except ModuleNotFoundError:
        return NativeModule(platform, None, "not part of this build")
    except ImportError as error:
        return NativeModule(platform, None, str(error))
    jax.ffi.register_ffi_target(FORWARD, module.forward(), platform=platform)
    jax.ffi.register_ffi_target(BACKWARD, module.backward(), platform=platform)
    return NativeModule(platform, module, "")


CPU = _load("_cpu", "cpu")
CUDA = _load("_cuda", "CUDA")
