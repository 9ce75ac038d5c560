"""The jitted training step and the held-out loss, as plain functions of a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from .._layout import Layout
from .config import Config
from .model import AttentionImplementation, Decoder

Params = Any
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.1
_FINAL_LEARNING_RATE = 0.05  # as a fraction of the highest


class State(NamedTuple):
    """What a step turns into its successor."""

    params: Params
    optimizer: optax.OptState


class Trainer(NamedTuple):
    """The model's definition, its optimiser and its layout: what does not change from step to step."""

    graph: nnx.GraphDef[Decoder]
    optimizer: optax.GradientTransformation
    layout: Layout

    def logits(self, params: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(self.graph, params)(tokens)

    def loss(self, params: Params, windows: jax.Array) -> jax.Array:
        """Mean cross-entropy in nats of every byte of windows [batch, seq + 1] but the first."""
        tokens = windows.astype(jnp.int32)
        logits = self.logits(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(self, state: State, windows: jax.Array) -> tuple[State, jax.Array]:
        """One optimiser step; returns the loss before it, in bits per byte."""
        loss, gradients = jax.value_and_grad(self.loss)(state.params, windows)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, optimizer), loss / math.log(2)

    def compile_step(
        self, state: State, config: Config
    ) -> Callable[[State, np.ndarray], tuple[State, jax.Array]]:
        """Compiles `step` ahead of its first call. The state that it is called with is donated."""
        windows = jax.ShapeDtypeStruct((config.batch, config.seq + 1), jnp.uint8)
        options: dict[str, str | bool] | None = (
            {"xla_gpu_deterministic_ops": True} if config.deterministic else None
        )
        step = jax.jit(
            self.step,
            donate_argnums=0,
            in_shardings=(None, self.layout.windows),
            out_shardings=(self.layout.shardings(state), None),
        )
        return step.lower(state, windows).compile(options)


def held_out_loss(trainer: Trainer, batches: Sequence[np.ndarray]) -> Callable[[Params], float]:
    """A function of the parameters: their loss on batches of windows, in bits per byte."""
    loss = jax.jit(trainer.loss, in_shardings=(None, trainer.layout.windows))

    def bits(params: Params) -> float:
        losses = jax.device_get([loss(params, windows) for windows in batches])
        return float(np.mean(losses, dtype=np.float64)) / math.log(2)

    return bits


def build(
    config: Config, attention: AttentionImplementation, layout: Layout
) -> tuple[Trainer, State]:
    """Initialises model and optimiser from ``config.seed``, with the same values on any mesh."""
    graph, params = nnx.split(Decoder(config, attention, layout, rngs=nnx.Rngs(config.seed)))
    params = nnx.to_pure_dict(params)
    optimizer = _optimizer(config)
    state = State(params, optimizer.init(params))
    return Trainer(graph, optimizer, layout), jax.device_put(state, layout.shardings(state))


def _optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.lr / config.warmup_steps,
        peak_value=config.lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=_FINAL_LEARNING_RATE * config.lr,
    )
    return optax.chain(
        optax.clip_by_global_norm(_CLIP_NORM),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=_WEIGHT_DECAY, mask=_matrices),
    )


def _matrices(params: Params) -> Params:
    """Weight decay is for matrices: it would pull the norms' scales to zero."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
