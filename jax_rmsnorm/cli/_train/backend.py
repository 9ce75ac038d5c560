"""Which code runs the norms and the attention on this machine: asked of JAX, not assumed."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from typing import Any

import jax
import jax.numpy as jnp

import jax_rmsnorm

from .._errors import OptionError
from .config import Config
from .model import AttentionImplementation


def default_preset() -> str:
    """The name of the preset for JAX's default device."""
    return "gpu" if jax.default_backend() == "gpu" else "cpu"


def environment(config: Config) -> dict[str, str]:
    """What the speed of a run depends on besides its settings: device, norms, versions.

    Raises:
        OptionError: the kernel is asked for and there is none.
    """
    device = jax.devices()[0]
    return {
        "norms": _describe_norms(config),
        "device": f"{device.device_kind} ({device})",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")},
    }


def choose_attention(config: Config) -> AttentionImplementation:
    """cuDNN's attention where it compiles for this model, forward and backward, else XLA's."""
    if jax.default_backend() != "gpu":
        return "xla"

    def attend(query: jax.Array, key: jax.Array) -> jax.Array:
        mixed = jax.nn.dot_product_attention(
            query, key, key, is_causal=True, implementation="cudnn"
        )
        return mixed.astype(jnp.float32).sum()

    query, key = (
        jax.ShapeDtypeStruct((config.batch, config.seq, heads, config.head_dim), config.dtype)
        for heads in (config.heads, config.kv_heads)
    )
    try:
        jax.jit(jax.grad(attend, argnums=(0, 1))).lower(query, key).compile()
    except Exception:  # cuDNN is missing, too old, or not for this shape: errors of several types
        return "xla"
    return "cudnn"


def trace_norm(config: Config) -> Any:
    """A norm of this model's training step with its gradients, to be lowered."""

    def gradients(x: jax.Array, gamma: jax.Array) -> Any:
        norm = functools.partial(jax_rmsnorm.rms_norm, implementation=config.norm_implementation)
        y, vjp = jax.vjp(norm, x, gamma)
        return vjp(y)

    x = jax.ShapeDtypeStruct((config.batch, config.seq, config.d_model), config.dtype)
    return jax.jit(gradients).trace(x, jax.ShapeDtypeStruct((config.d_model,), jnp.float32))


def _describe_norms(config: Config) -> str:
    """Names what a norm of this model is lowered to."""
    try:
        lowered = trace_norm(config).lower()
    except NotImplementedError as error:
        raise OptionError(f"--implementation: {error}") from error
    return "hand-written kernel" if "custom_call" in lowered.as_text() else "plain JAX"
