"""A decoder as Qwen3 is built, in plain JAX: float32 parameters, bfloat16 arithmetic, and norms to choose."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._layout import ONE_DEVICE, Layout
from .step_config import Config
from .step_norms import Copies, Norms

_DTYPE = jnp.bfloat16
_ROTARY_BASE = 1e6


class Layer(NamedTuple):
    """The parameters of a layer. ``qkv`` and ``gate_up`` hold a matrix for each result, or one for all side by side."""

    attention_gamma: jax.Array
    qkv: list[jax.Array]
    query_gamma: jax.Array
    key_gamma: jax.Array
    out: jax.Array
    mlp_gamma: jax.Array
    gate_up: list[jax.Array]
    down: jax.Array


class Params(NamedTuple):
    embedding: jax.Array
    layers: list[Layer]
    gamma: jax.Array
    head: jax.Array


class Data(NamedTuple):
    """The tokens [batch, seq + 1] of a step, and its positions' cosines and sines [seq, head_dim / 2]."""

    tokens: jax.Array
    cos: jax.Array
    sin: jax.Array


def loss(
    params: Params, data: Data, config: Config, norms: Norms, layout: Layout = ONE_DEVICE
) -> jax.Array:
    """Mean cross-entropy, in nats, of each next token; of a forward alone, of the last one."""
    logits = _logits(params, data, config, norms, layout)
    labels = data.tokens[:, -logits.shape[1] :]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _logits(params: Params, data: Data, config: Config, norms: Norms, layout: Layout) -> jax.Array:
    layer = functools.partial(_layer, data=data, config=config, norms=norms, layout=layout)
    stream = layout.of_stream(params.embedding[data.tokens[:, :-1]].astype(_DTYPE))
    addend = None
    for parameters in params.layers:
        if config.remat:
            stream = jax.checkpoint(_whole(layer))(parameters, stream)
        else:
            stream, addend = layer(parameters, stream, addend)
    (y,), _ = _enter(norms, stream, addend, params.gamma, 1)
    if config.forward:
        return _matmul(layout.whole_sequences(y[:, -1:]), params.head).astype(jnp.float32)
    return layout.by_position(_matmul(layout.by_position(y), params.head)).astype(jnp.float32)


def _layer(
    parameters: Layer,
    stream: jax.Array,
    addend: jax.Array | None,
    *,
    data: Data,
    config: Config,
    norms: Norms,
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """Attention and SwiGLU. What each adds to the residual stream waits for the norm after it, which adds it.

    Takes and returns the stream and what is yet to be added to it, both [batch, seq, d_model].
    """
    ys, stream = _enter(norms, stream, addend, parameters.attention_gamma, len(parameters.qkv))
    addend = _attention(parameters, ys, data, config, norms, layout)
    ys, stream = norms.add_norm(addend, stream, parameters.mlp_gamma, len(parameters.gate_up))
    gate, up = _project(ys, parameters.gate_up, 2 * [config.d_ff], layout)
    hidden = layout.by_feature(jax.nn.silu(gate) * up)
    return stream, layout.of_stream(_matmul(hidden, parameters.down))


def _enter(
    norms: Norms, stream: jax.Array, addend: jax.Array | None, gamma: jax.Array, copies: int
) -> tuple[Copies, jax.Array]:
    if addend is None:
        return norms.norm(stream, gamma, copies), stream
    return norms.add_norm(addend, stream, gamma, copies)


def _whole(
    layer: Callable[[Layer, jax.Array, None], tuple[jax.Array, jax.Array]],
) -> Callable[[Layer, jax.Array], jax.Array]:
    """A layer from stream to stream: one tensor between layers, which is all that remat keeps of them."""

    def whole(parameters: Layer, stream: jax.Array) -> jax.Array:
        stream, addend = layer(parameters, stream, None)
        return stream + addend

    return whole


def _attention(
    parameters: Layer, ys: Copies, data: Data, config: Config, norms: Norms, layout: Layout
) -> jax.Array:
    counts = [config.heads, config.kv_heads, config.kv_heads]
    widths = [count * config.head_dim for count in counts]
    projected = _project(ys, parameters.qkv, widths, layout)
    query, key, value = (
        layout.by_feature(part.reshape(*part.shape[:2], count, config.head_dim))
        for part, count in zip(projected, counts, strict=True)
    )
    query = norms.norm_rope(query, parameters.query_gamma, data.cos, data.sin)
    key = norms.norm_rope(key, parameters.key_gamma, data.cos, data.sin)
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
    )
    mixed = layout.by_feature(mixed).reshape(*mixed.shape[:2], -1)
    return layout.of_stream(_matmul(mixed, parameters.out))


def _project(
    ys: Copies, matrices: list[jax.Array], sizes: Sequence[int], layout: Layout
) -> list[jax.Array]:
    """A y times each matrix; or the one times the one, the result cut into ``sizes``."""
    whole = map(layout.whole_sequences, ys)
    parts = [_matmul(y, matrix) for y, matrix in zip(whole, matrices, strict=True)]
    return parts if len(parts) > 1 else jnp.split(parts[0], np.cumsum(sizes[:-1]), axis=-1)


def _matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return x @ matrix.astype(x.dtype)


def init(config: Config) -> Params:
    """Parameters, float32: matrices normally distributed, those that write to the stream smaller, and every γ = 1."""
    keys = map(functools.partial(jax.random.fold_in, jax.random.key(0)), itertools.count())
    d_model, width = config.d_model, config.heads * config.head_dim

    def matrix(rows: int, columns: int, std: float | None = None) -> jax.Array:
        scale = rows**-0.5 if std is None else std
        return scale * jax.random.normal(next(keys), (rows, columns), jnp.float32)

    def side_by_side(*columns: int) -> list[jax.Array]:
        return [matrix(d_model, n) for n in ([sum(columns)] if config.joint else columns)]

    def layer() -> Layer:
        kv_width = config.kv_heads * config.head_dim
        return Layer(
            attention_gamma=jnp.ones(d_model),
            qkv=side_by_side(width, kv_width, kv_width),
            query_gamma=jnp.ones(config.head_dim),
            key_gamma=jnp.ones(config.head_dim),
            out=matrix(width, d_model, (2 * config.layers * width) ** -0.5),
            mlp_gamma=jnp.ones(d_model),
            gate_up=side_by_side(config.d_ff, config.d_ff),
            down=matrix(config.d_ff, d_model, (2 * config.layers * config.d_ff) ** -0.5),
        )

    return Params(
        embedding=matrix(config.vocabulary, d_model, 1.0),
        layers=[layer() for _ in range(config.layers)],
        gamma=jnp.ones(d_model),
        head=matrix(d_model, config.vocabulary, 0.02),
    )


def draw(config: Config) -> Data:
    """Random tokens, and the angles position · base^(-2i / head_dim)."""
    shape = (config.batch, config.seq + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocabulary)
    frequency = _ROTARY_BASE ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angle = np.arange(config.seq)[:, None] * frequency
    return Data(
        tokens, jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    )
