"""Text from the model, one byte after the other in a single compiled loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .config import Config
from .step import Params, Trainer


def sample(trainer: Trainer, params: Params, config: Config) -> str:
    """The prompt and ``config.sample_bytes`` bytes that the model continues it with.

    Every byte is drawn after a whole evaluation of a window that slides over the text: no cache to
    keep, and the model never sees more than the ``config.seq`` bytes that it was trained on.
    """
    prompt = np.frombuffer(config.prompt.encode(), np.uint8)[-config.seq :]
    window = np.zeros(config.seq, np.int32)
    window[: prompt.size] = prompt
    drawn = _draw(
        trainer,
        params,
        window,
        prompt.size,
        jax.random.key(config.seed),
        count=config.sample_bytes,
        temperature=config.temperature,
    )
    text = config.prompt + bytes(np.asarray(drawn)).decode(errors="replace")
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


@functools.partial(jax.jit, static_argnames=("trainer", "count", "temperature"))
def _draw(
    trainer: Trainer,
    params: Params,
    window: jax.Array,
    filled: int,
    key: jax.Array,
    *,
    count: int,
    temperature: float,
) -> jax.Array:
    """Continues window [length], filled with text up to ``filled``, by uint8 [count]."""

    def draw_next(
        carry: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        window, filled = carry
        logits = trainer.logits(params, window[None])[0, filled - 1]
        token = (
            jax.random.categorical(key, logits / temperature)
            if temperature > 0
            else jnp.argmax(logits)
        ).astype(window.dtype)
        full = filled == window.size
        window = jnp.where(full, jnp.roll(window, -1), window)
        filled = jnp.where(full, filled, filled + 1)
        return (window.at[filled - 1].set(token), filled), token.astype(jnp.uint8)

    carry = (window, jnp.asarray(filled))
    return jax.lax.scan(draw_next, carry, jax.random.split(key, count))[1]
