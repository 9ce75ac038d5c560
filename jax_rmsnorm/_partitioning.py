"""How the operations are split over the devices of a mesh under `jax.jit`: each device runs kernels on its own shards.

Rows are independent, so that a forward needs no communication, and a backward one sum of dgamma over the mesh axes
that rows are sharded over. Where the normalized axis is sharded, each device has a part of every row, and the parts'
means of squares are averaged: one all-reduce of a number a row, in the forward and in the backward.

Inside `jax.shard_map` over all axes of the mesh that have several devices, and on one device, there is nothing to
split. Where there is, but not the means to do it, XLA splits plain JAX: `why_not_partitioned` says when.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._compat import ShardingContext, SPMDAxisContext, is_shardy_used, mesh_axes, no_mesh

HIDDEN = "h"
"""The dimension that is normalized. Dimensions of rows have names of their own: `row_dims`."""

GAMMA = "g"
"""The same of gamma and dgamma. Another name, since a sharded gamma (as of weights that are kept in parts) is no reason
to shard x: on its way into the kernel it takes x's sharding, not the other way round."""

Dims = Sequence[str]


class Rule(NamedTuple):
    """The names of the dimensions of an operation's operands and results, x first of all.

    Those of the same name are sharded alike, as x's is, `GAMMA` as `HIDDEN`; those that x does not have, and those of
    ``whole``, not at all.
    """

    operands: Sequence[Dims]
    results: Sequence[Dims]
    whole: frozenset[str] = frozenset()

    def to_text(self) -> str:
        """As Shardy has it: dimensions apart by spaces, arrays by commas."""
        sides = (", ".join(map(" ".join, side)) for side in (self.operands, self.results))
        return " -> ".join(sides)


class Axes(NamedTuple):
    """The mesh axes that the dimensions of a device's shards are sharded over, of each dimension by its name."""

    by_name: Mapping[str, tuple[str, ...]]

    @property
    def hidden(self) -> tuple[str, ...]:
        return self.by_name.get(HIDDEN, ())

    def spec(self, dims: Dims) -> PartitionSpec:
        return PartitionSpec(*(self.by_name.get(HIDDEN if d == GAMMA else d) for d in dims))

    def of_rows_without(self, dims: Dims) -> tuple[str, ...]:
        """Those that x's rows are sharded over and an array of these dimensions is not."""
        absent = (axes for name, axes in self.by_name.items() if name not in (HIDDEN, *dims))
        return tuple(itertools.chain.from_iterable(absent))


def row_dims(ndim: int) -> Dims:
    """Names for x's dimensions but the last, of ``ndim`` in all."""
    return tuple(f"r{i}" for i in range(ndim - 1))


def has_nothing_to_split(ctx: Any) -> bool:
    """Whether a lowering is for a program that is one device's, as it stands."""
    context = ctx.module_context.axis_context
    if isinstance(context, ShardingContext):
        return context.num_devices == 1
    if isinstance(context, SPMDAxisContext):
        left = set(context.mesh.axis_names) - set(context.manual_axes)
        return all(context.mesh.shape[axis] == 1 for axis in left)
    return True


def why_no_kernel_for_parts(axes: Sequence[str]) -> str:
    """What to say where a kernel is asked for, and each device has parts of rows."""
    return (
        f"implementation='kernel' with the normalized axis sharded over {', '.join(axes)}: "
        "there are no kernels for parts of rows. Use implementation=None for plain JAX there."
    )


def runs_on_one_device(ctx: Any) -> bool:
    """Whether a lowering is for a program that one device alone runs."""
    context = ctx.module_context.axis_context
    if isinstance(context, SPMDAxisContext):
        return context.mesh.size == 1
    return has_nothing_to_split(ctx)


def why_not_partitioned(ctx: Any) -> str | None:
    """Why XLA cannot ask back how to split the operation, or None where it can."""
    context = ctx.module_context.axis_context
    if not isinstance(context, ShardingContext):
        return "a jax.shard_map over some axes of the mesh leaves the others to XLA, which splits plain JAX alone"
    if ctx.module_context.lowering_parameters.for_export:
        return "an exported program cannot be split by a process that does not run it"
    if context.abstract_mesh is None:
        return "no operand, result or constraint of the program names a mesh"
    if not is_shardy_used():
        return "Shardy is turned off (jax_use_shardy_partitioner)"
    return None


def partitioned(
    rule: Rule, local: Callable[..., Sequence[jax.Array]], shard: Callable[..., Sequence[jax.Array]]
) -> Callable[..., Sequence[jax.Array]]:
    """The operation on whole arrays that Shardy and XLA's partitioner know how to split.

    Args:
        rule: which dimensions go together.
        local: the operation where there is nothing to split.
        shard: from the `Axes` and shards of the operands to shards of the results, as a program for one device, which
            may communicate over these axes.
    """

    def partition(mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]) -> Any:
        axes = _axes(rule, operands[0], mesh)

        def run(*shards: jax.Array) -> list[jax.Array]:
            with no_mesh():  # types of shards have none
                return list(shard(axes, *shards))

        arg_shardings, out_shardings = (
            [NamedSharding(mesh, axes.spec(dims)) for dims in side]
            for side in (rule.operands, rule.results)
        )
        return mesh, run, out_shardings, tuple(arg_shardings)

    def whole(*operands: jax.Array) -> list[jax.Array]:
        return list(local(*operands))

    call = custom_partitioning(whole)
    present = {name for dims in (*rule.operands, *rule.results) for name in dims}
    call.def_partition(
        partition,
        decode_shardings=False,
        sharding_rule=rule.to_text(),
        need_replication_factors=tuple(sorted(rule.whole & present)),
    )
    return call


def _axes(rule: Rule, x: Any, mesh: Mesh) -> Axes:
    """What x is sharded over, as far as its dimensions may be and are so in equal parts."""
    by_name: dict[str, tuple[str, ...]] = {}
    for name, size, axes in zip(rule.operands[0], x.shape, mesh_axes(x, mesh), strict=False):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if axes and name not in rule.whole and size % parts == 0:
            by_name[name] = axes
    return Axes(by_name)
