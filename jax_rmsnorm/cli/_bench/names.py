"""The contenders' names, as options and tables spell them. Imports nothing."""

from __future__ import annotations

KERNEL = "kernel"
ROOF = "roof"
RIVALS = (
    ROOF,
    "jnp",
    "jnp_saved",
    "flax",
    "tokamax",
    "eager",
    "compile",
    "liger",
    "quack",
    "flashinfer",
    "cudnn",
)
