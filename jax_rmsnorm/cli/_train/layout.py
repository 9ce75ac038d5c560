"""Where a run's arrays are on a mesh of devices.

Batches are split over ``data`` and ``fsdp``. Parameters and what the optimiser keeps of them are split over ``tensor``,
by heads and by the SwiGLU's hidden size as in Megatron-LM (https://arxiv.org/abs/1909.08053), and over ``fsdp``, which
gathers them where they are used. Between the products the residual stream is split over ``tensor`` by its positions
(https://arxiv.org/abs/2205.05198). XLA puts the communication in; the norms keep what sharding they find.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .._errors import OptionError
from .config import Config
from .model import Shardings

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")
_COLUMNS = P("fsdp", "tensor")
_ROWS = P("tensor", "fsdp")
# Of kernels [inputs, outputs], by the module's name. All else, the norms' scales, every device has whole.
_KERNELS = {
    "embedding": P(None, "fsdp"),
    "query": _COLUMNS,
    "key": _COLUMNS,
    "value": _COLUMNS,
    "gate": _COLUMNS,
    "up": _COLUMNS,
    "out": _ROWS,
    "down": _ROWS,
    "head": _COLUMNS,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the axes of `AXES`, and whether there are key and value heads for each part of ``tensor``."""

    mesh: Mesh
    splits_kv_heads: bool

    @property
    def windows(self) -> NamedSharding:
        """Of windows [batch, seq + 1]."""
        return NamedSharding(self.mesh, P(_BATCH))

    @property
    def activations(self) -> Shardings:
        heads = P(_BATCH, None, "tensor")
        kv_heads = heads if self.splits_kv_heads else P(_BATCH)
        specs = P(_BATCH, "tensor"), heads, kv_heads, P(_BATCH, None, "tensor")
        return Shardings(*(NamedSharding(self.mesh, spec) for spec in specs))

    def of(self, tree: Any) -> Any:
        """Shardings of parameters, or of a whole state: what the optimiser keeps has its parameter's path."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(self.mesh, self._spec(path, leaf.ndim)), tree
        )

    def describe(self) -> str:
        sizes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        return f"{sizes or 'one device'} of {jax.device_count()} devices"

    def _spec(self, path: tuple[Any, ...], ndim: int) -> P:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if ndim != 2 or len(names) < 2:
            return P()
        module = names[-2]
        if module in ("key", "value") and not self.splits_kv_heads:
            return P("fsdp")
        return _KERNELS[module]


def parse(text: str) -> dict[str, int]:
    """The sizes of all `AXES` from ``data=2,tensor=2``; axes that are left out have size 1.

    Raises:
        OptionError: that is not what the text is.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise OptionError(
                f"--mesh: expected sizes of {', '.join(AXES)}, each once at most, as in data=2,tensor=2; got {text!r}"
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def request_cpu_devices(sizes: Mapping[str, int]) -> None:
    """Lets a CPU appear as so many devices, if JAX has not been started; without effect on GPUs."""
    try:
        jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    except RuntimeError:  # it has been: `make` will say so if they are too few
        return


def make(sizes: Mapping[str, int], config: Config) -> Layout:
    """The mesh of these sizes, of the first devices.

    Raises:
        OptionError: there are too few devices, or the model does not divide so.
    """
    needed, found = math.prod(sizes.values()), jax.device_count()
    if needed > found:
        raise OptionError(
            f"--mesh: needs {needed} devices, and there are {found} ({jax.default_backend()}). "
            "A CPU appears as several with the environment variable JAX_NUM_CPU_DEVICES."
        )
    tensor = sizes["tensor"]
    for what, size, parts in (
        ("--batch", config.batch, sizes["data"] * sizes["fsdp"]),
        ("--d-model", config.d_model, sizes["fsdp"]),
        ("--heads", config.heads, tensor),
        ("--seq", config.seq, tensor),
        ("the SwiGLU's hidden size", config.mlp_dim, tensor * sizes["fsdp"]),
    ):
        if size % parts:
            raise OptionError(f"--mesh: {what} ({size}) must be a multiple of {parts} for it")
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:needed],
    )
    return Layout(mesh, splits_kv_heads=config.kv_heads % tensor == 0)
