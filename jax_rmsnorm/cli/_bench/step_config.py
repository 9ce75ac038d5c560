"""The models whose training step is timed, and the names of the implementations. Imports nothing that takes time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .._streams import Stream

IMPLEMENTATIONS = ("jnp", "unfused", "fused", "identity")
KERNELS = "kernels"  # as fused, with kernels where `implementation=None` takes plain JAX too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder and the tokens of a step.

    Attributes:
        joint: whether query, key and value, and the SwiGLU's gate and up, are one product each.
        remat: whether of each layer the input alone is saved and the rest computed again in the backward.
        forward: whether the step is a forward alone, to the last position's logits, from bfloat16 matrices.
        mesh: sizes of the axes of a mesh of devices, as `_layout.parse` takes them; None: one device.
        stream: how the mesh's axis ``tensor`` splits the residual stream, see `_layout.Layout`.
    """

    name: str
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocabulary: int
    batch: int
    seq: int
    joint: bool = False
    remat: bool = False
    forward: bool = False
    mesh: str | None = None
    stream: Stream = "positions"

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def __str__(self) -> str:
        projections = "joint" if self.joint else "separate"
        what = "forward alone" if self.forward else f"remat {'on' if self.remat else 'off'}"
        mesh = "" if self.mesh is None else f", mesh {self.mesh}, stream split: {self.stream}"
        return (
            f"{self.name}: d {self.d_model} x {self.layers} layers, {self.batch}x{self.seq} tokens, "
            f"{projections} projections, {what}{mesh}"
        )


def _qwen(name: str, d_model: int, layers: int, batch: int, *, heads: int = 16) -> Config:
    """As Qwen3 is built, with fewer layers and a smaller vocabulary, so that a step fits in about 40 ms."""
    return Config(
        name=name,
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        d_ff=3 * d_model,
        vocabulary=2**15,
        batch=batch,
        seq=2048,
    )


_TINY = Config(
    name="tiny",
    d_model=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    d_ff=192,
    vocabulary=256,
    batch=2,
    seq=64,
)
CONFIGS: Mapping[str, Config] = {
    config.name: config
    for config in (
        _qwen("d1024", 1024, 8, 8),
        _qwen("d1024-batch1", 1024, 8, 1),
        _qwen("d2048", 2048, 4, 8),
        _qwen("d4096", 4096, 2, 4, heads=32),
        _TINY,
    )
}
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("tiny",),
    "gpu": ("d1024", "d2048", "d4096", "d1024-batch1"),
}
