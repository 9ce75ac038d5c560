"""A decoder-only language model over bytes, every norm of which is `jax_rmsnorm.nnx.RMSNorm`."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jax_rmsnorm import rms_norm_rope
from jax_rmsnorm.nnx import RMSNorm

from .._layout import Layout
from .config import VOCABULARY, Config

AttentionImplementation = Literal["cudnn", "xla"]
_ROTARY_BASE = 10_000.0
_EPSILON = 1e-6


def rotary_angles(length: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position · base^(-2i/head_dim), float32 [length, head_dim / 2] each."""
    frequency = _ROTARY_BASE ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def normalize_and_rotate(norm: RMSNorm, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The norm of queries or keys x [batch, length, heads, head_dim] and their rotary embedding, in one pass."""
    assert norm.scale is not None
    gamma = norm.scale[...]
    return rms_norm_rope(
        x, gamma, cos, sin, eps=_EPSILON, dtype=norm.dtype, implementation=norm.implementation
    )


class Attention(nnx.Module):
    """Causal grouped-query attention with normalised queries and keys and rotary embedding."""

    def __init__(
        self,
        config: Config,
        implementation: AttentionImplementation,
        layout: Layout,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.head_dim = config.head_dim
        self.implementation: AttentionImplementation = implementation
        self.layout = layout
        kv_width = config.kv_heads * config.head_dim
        self.query = _linear(config, config.d_model, config.heads * config.head_dim, rngs=rngs)
        self.key = _linear(config, config.d_model, kv_width, rngs=rngs)
        self.value = _linear(config, config.d_model, kv_width, rngs=rngs)
        self.query_norm = _norm(config, config.head_dim, rngs=rngs)
        self.key_norm = _norm(config, config.head_dim, rngs=rngs)
        self.out = _residual_linear(config, config.d_model, rngs=rngs)

    def __call__(self, copies: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array) -> jax.Array:
        """``copies`` are three of one input, so that the norm behind them gets three gradients: see `rms_norm`."""
        batch, length, d_model = copies[0].shape
        products = (self.query, self.key, self.value)
        query, key, value = (
            product(self.layout.whole_sequences(x)).reshape(batch, length, -1, self.head_dim)
            for product, x in zip(products, copies, strict=True)
        )
        query = self.layout.by_feature(query)
        key, value = map(self.layout.by_kv_head, (key, value))
        query = normalize_and_rotate(self.query_norm, query, cos, sin)
        key = normalize_and_rotate(self.key_norm, key, cos, sin)
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=self.implementation
        )
        mixed = self.layout.by_feature(mixed).reshape(batch, length, d_model)
        return self.layout.of_stream(self.out(mixed))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)), of two copies of one x."""

    def __init__(self, config: Config, layout: Layout, *, rngs: nnx.Rngs) -> None:
        self.layout = layout
        self.gate = _linear(config, config.d_model, config.mlp_dim, rngs=rngs)
        self.up = _linear(config, config.d_model, config.mlp_dim, rngs=rngs)
        self.down = _residual_linear(config, config.mlp_dim, rngs=rngs)

    def __call__(self, copies: tuple[jax.Array, ...]) -> jax.Array:
        for_gate, for_up = map(self.layout.whole_sequences, copies)
        hidden = nnx.silu(self.gate(for_gate)) * self.up(for_up)
        return self.layout.of_stream(self.down(self.layout.by_feature(hidden)))


class Block(nnx.Module):
    """Pre-norm attention and SwiGLU.

    Each is added to the residual stream by the norm that follows it, in one pass: what goes from block to block is the
    stream and what is yet to be added to it.
    """

    def __init__(
        self,
        config: Config,
        implementation: AttentionImplementation,
        layout: Layout,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention_norm = _norm(config, config.d_model, rngs=rngs)
        self.attention = Attention(config, implementation, layout, rngs=rngs)
        self.mlp_norm = _norm(config, config.d_model, rngs=rngs)
        self.mlp = SwiGLU(config, layout, rngs=rngs)

    def __call__(
        self, stream: jax.Array | None, addend: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if stream is None:
            copies, stream = self.attention_norm(addend, copies=3), addend
        else:
            copies, stream = self.attention_norm(addend, residual=stream, copies=3)
        addend = self.attention(copies, cos, sin)
        copies, stream = self.mlp_norm(addend, residual=stream, copies=2)
        return stream, self.mlp(copies)


class Decoder(nnx.Module):
    """Bytes [batch, length] to next-byte logits, float32 [batch, length, 256]."""

    def __init__(
        self,
        config: Config,
        implementation: AttentionImplementation,
        layout: Layout,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.head_dim = config.head_dim
        self.layout = layout
        self.dtype = jnp.dtype(config.dtype)
        self.embedding = _linear(config, VOCABULARY, config.d_model, std=1.0, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, implementation, layout, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm = _norm(config, config.d_model, rngs=rngs)
        self.head = _linear(config, config.d_model, VOCABULARY, std=0.02, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # A product with one-hot rows: its gradient is a product too, where a lookup's is a scatter
        # with many duplicates, slow and on a GPU without a fixed order.
        rows = jax.nn.one_hot(tokens, VOCABULARY, dtype=self.dtype)
        addend, stream = self.layout.of_stream(self.embedding(rows)), None
        cos, sin = rotary_angles(tokens.shape[1], self.head_dim)
        for block in self.blocks:
            stream, addend = block(stream, addend, cos, sin)
        assert stream is not None, "a decoder has one block or more"
        x, _ = self.norm(addend, residual=stream)
        return self.layout.by_position(self.head(x)).astype(jnp.float32)


def _norm(config: Config, size: int, *, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(
        size,
        epsilon=_EPSILON,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        implementation=config.norm_implementation,
        rngs=rngs,
    )


def _linear(
    config: Config, inputs: int, outputs: int, *, std: float | None = None, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(inputs**-0.5 if std is None else std),
        rngs=rngs,
    )


def _residual_linear(config: Config, inputs: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Writes to the residual stream: scaled so that all layers together add about one unit."""
    std = (2 * config.layers * inputs) ** -0.5
    return _linear(config, inputs, config.d_model, std=std, rngs=rngs)
