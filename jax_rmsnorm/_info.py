"""What is installed and what was loaded, for bug reports and for the question whether the kernels run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TypeAlias

import jax
import jaxlib.version

from . import _ffi

Info: TypeAlias = "dict[str, str | Info]"


def info() -> Info:
    """Versions, and for each kernel module whether it loaded, for which devices, and the reason where not.

    Does not start JAX's backends.

    Returns:
        A mapping of strings, nested one level: "versions", "cpu kernels", "cuda kernels".
    """
    try:
        own = version("jax-rmsnorm")
    except PackageNotFoundError:
        own = "not installed: imported from its sources"
    return {
        "versions": {
            "jax_rmsnorm": own,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "python": platform.python_version(),
        },
        "cpu kernels": _describe_cpu(),
        "cuda kernels": _describe_cuda(),
    }


def _describe_cpu() -> Info:
    module = _ffi.CPU.module
    if module is None:
        return {"loaded": "no", "reason": _ffi.CPU.reason}
    active = module.active_instruction_set()
    described: Info = {
        "loaded": "yes",
        "instruction set": active,
        "available": ", ".join(module.instruction_sets()),
    }
    wanted = os.environ.get("JAX_RMSNORM_CPU_ISA", active)
    if wanted != active:
        described["ignored"] = f"JAX_RMSNORM_CPU_ISA={wanted}, which is not available here"
    return described


def _describe_cuda() -> Info:
    module = _ffi.CUDA.module
    if module is None:
        return {"loaded": "no", "reason": _ffi.CUDA.reason}
    return {"loaded": "yes", "compiled for": module.architectures}
