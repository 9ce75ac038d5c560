"""Where a decoder's arrays are on a mesh of devices: batches, parameters, and activations between the products.

``data`` splits batches. So does ``fsdp``, which also keeps parameters and the optimiser's state in parts: a parameter
is gathered where it is used. ``tensor`` splits heads and the SwiGLU's hidden size, as Megatron-LM does
(https://arxiv.org/abs/1909.08053), and in front of and behind them the residual stream: by positions, unless asked
otherwise (https://arxiv.org/abs/2205.05198). XLA puts the communication in.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ._errors import OptionError
from ._streams import Stream

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Of the leaves whose path ends so: the first that fits. In the optimiser's state, a parameter's path ends the paths of
# what is kept of it.
Rules: TypeAlias = Sequence[tuple[str, P]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are split over the devices of a mesh.

    Attributes:
        mesh: has all `AXES`; None: everything is on JAX's default device.
        parameters: where they are, by the ends of their paths; there is a rule for every one.
        splits_kv_heads: over ``tensor``; a single one is on each of its devices.
        stream: how ``tensor`` splits the residual stream. By positions, a norm's rows stay whole; by features, each
            device has a part of every row.
    """

    mesh: Mesh | None = None
    parameters: Rules = ((r"", P()),)
    splits_kv_heads: bool = True
    stream: Stream = "positions"

    @property
    def windows(self) -> NamedSharding | None:
        """Of windows [batch, seq + 1]."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(BATCH_AXES))

    def shardings(self, tree: Any) -> Any:
        """Of parameters, or of a whole state."""
        if self.mesh is None:
            return None
        mesh = self.mesh
        return jax.tree_util.tree_map_with_path(
            lambda path, _: NamedSharding(mesh, self._parameter_spec(path)), tree
        )

    def of_stream(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, d_model] as the residual stream is split."""
        if self.stream == "features":
            return self.by_feature(x)
        return self.by_position(x) if self.stream == "positions" else self.whole_sequences(x)

    def by_position(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, …] with its positions split over ``tensor``."""
        return self._constrain(x, "tensor")

    def whole_sequences(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, …] as the products with a kernel's columns read it: on all devices of ``tensor``."""
        return self._constrain(x)

    def by_feature(self, x: jax.Array) -> jax.Array:
        """x [batch, seq, features or heads, …] as these products write it."""
        return self._constrain(x, None, "tensor")

    def by_kv_head(self, x: jax.Array) -> jax.Array:
        """The same of keys and values [batch, seq, kv heads, head_dim]."""
        return self.by_feature(x) if self.splits_kv_heads else self.whole_sequences(x)

    def _constrain(self, x: jax.Array, *behind_batch: str | None) -> jax.Array:
        if self.mesh is None:
            return x
        parts = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        batch = (
            None if x.shape[0] % parts else BATCH_AXES
        )  # text is sampled from one window at a time
        sharding = NamedSharding(self.mesh, P(batch, *behind_batch))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _parameter_spec(self, path: tuple[Any, ...]) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next(spec for pattern, spec in self.parameters if re.search(pattern, name))

    def describe(self) -> str:
        assert self.mesh is not None
        sizes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        return f"{sizes or 'one device'} of {jax.device_count()} devices"


ONE_DEVICE = Layout()


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
    except RuntimeError:  # it has been: `make_mesh` will say so if they are too few
        return


def make_mesh(sizes: Mapping[str, int], lengths: Sequence[tuple[str, int, Sequence[str]]]) -> Mesh:
    """The mesh of these sizes, of the first devices.

    Args:
        sizes: of all `AXES`.
        lengths: what the axes split: its name, its length, and the axes.

    Raises:
        OptionError: there are too few devices, or the lengths do not divide so.
    """
    for what, length, axes in lengths:
        parts = {axis: sizes[axis] for axis in axes}
        if length % math.prod(parts.values()):
            raise OptionError(f"--mesh: {_format(parts)} must divide {what}, which is {length}")
    needed, found = math.prod(sizes.values()), jax.device_count()
    if needed > found:
        raise OptionError(
            f"--mesh: {_format(sizes)} needs {needed} devices, and there are {found} ({jax.default_backend()}); a CPU "
            f"appears as {needed} with JAX_NUM_CPU_DEVICES={needed} in the environment (jax_num_cpu_devices)"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:needed],
    )


def _format(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
