"""Every private JAX import and every branch on a version, each with its reason.

Supported: jax 0.10.2 and later. Nothing here is needed for the mathematics, only for types and rules.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax

# What custom_partitioning is called back with, by the name that the program has for it.
from jax._src.custom_partitioning import _sharding_callbacks

# Runs a primitive outside `jax.jit` by compiling it, also under `jax.disable_jit`; nothing public does.
from jax._src.dispatch import apply_primitive as apply_primitive

# The devices and the mesh of the program are known to a lowering only if one of its primitives is in this set.
from jax._src.dispatch import prim_requires_devices_during_lowering

# Says what a lowering is a part of: a program to be partitioned, or one for the shards of some axes of a mesh.
from jax._src.sharding_impls import ShardingContext as ShardingContext
from jax._src.sharding_impls import SPMDAxisContext as SPMDAxisContext

# From XLA's shardings to names of mesh axes.
from jax._src.sharding_impls import parse_flatten_op_sharding

# Makes attributes of a program's operations.
from jax.extend.mlir import ir

# Rules of custom primitives. `jax.interpreters` exports these modules for such use, without type stubs' promises.
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir


def manual_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which ``x`` varies inside `jax.shard_map` (empty outside)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def result_type(like: Any, shape: tuple[Any, ...], dtype: Any, spec: tuple[Any, ...]) -> Any:
    """An abstract value with the mesh and the varying axes of ``like``, and its own shape, dtype and partition spec.

    A plain ShapeDtypeStruct would lose them, and gradients downstream in `jax.shard_map` would silently be wrong.
    """
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return like.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)


def is_static_dim(dim: Any) -> bool:
    """Whether an axis length is a number, and not a symbol of shape-polymorphic export."""
    return isinstance(dim, int)


def requires_devices(primitive: Any) -> None:
    """Makes JAX tell the primitive's lowering what devices and what mesh the program is for."""
    prim_requires_devices_during_lowering.add(primitive)


def no_mesh() -> Any:
    """A context in which arrays have no mesh in their types, whatever the program's mesh is.

    The program for one shard is traced while that of the whole is compiled. From 0.11 on, an operation of `jax.numpy`
    in it would be lowered with the sharding that its type has in an explicit mesh, for which a shard has no place.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def axis_names(axes: Any) -> tuple[str, ...]:
    """The mesh axes that a dimension is sharded over, from an entry of a `jax.sharding.PartitionSpec`."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def mesh_axes(x: Any, mesh: jax.sharding.Mesh) -> list[tuple[str, ...]]:
    """The mesh axes that each dimension of an operand of custom_partitioning is sharded over, first to last sharded.

    Undecoded, as custom_partitioning hands it over: its own decoding fails, and ends the compilation, where a part of a
    mesh axis has come to a dimension, as by a reshape. None are named then.
    """
    try:
        (spec,) = parse_flatten_op_sharding(x.sharding._to_xla_hlo_sharding(len(x.shape)), mesh)
    except (ValueError, NotImplementedError):
        return []
    return [axis_names(axes) for axes in spec]


class _Unpickled:
    """Holds an object, and none once it is unpickled."""

    def __init__(self, kept: Any = None) -> None:
        self.kept = kept

    def __reduce__(self) -> Any:
        return _Unpickled, ()


def lower_partitioned(ctx: Any, run: Any, operands: Any, contents: str) -> Any:
    """Lowers ``run``, a call of custom_partitioning, to a program that caches know again and that can be serialized.

    Args:
        ctx: of the lowering.
        run: with the operands as its arguments.
        operands: in the program.
        contents: all that decides how the operation is partitioned, beside the shardings that XLA finds.
    """
    kept = ctx.module_context.keepalives
    before = len(kept)
    results = mlir.lower_fun(run, multiple_results=True)(ctx, *operands)
    called_back = (_name_by_contents(results[0].owner, info, contents) for info in kept[before:])
    # What the partitioner calls back is kept with the executable, for no use after the compilation, and cannot be
    # pickled.
    kept[before:] = map(_Unpickled, called_back)
    return results


def _name_by_contents(call: Any, info: Any, contents: str) -> Any:
    """Renames what a call of custom_partitioning is called back with; returns what is to be kept alive.

    JAX names it by its address in memory: a name of its own for each process, with which the persistent compilation
    cache never finds a program again. Without the name in its keys (jax_remove_custom_partitioning_ptr_from_cache_key)
    it takes programs for the same that differ in what is called back alone, hence the attribute beside it.
    """
    address = str(id(info))
    if _sharding_callbacks.get(address.encode()) is not info or _to_name(call) != address:
        return info
    name = f"jax_rmsnorm {hashlib.sha256(contents.encode()).hexdigest()}"
    call.attributes["backend_config"] = ir.StringAttr.get(name)
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(
        {"partitioned": ir.StringAttr.get(name)}
    )
    # One for all programs that call it so. Each keeps it alive, whichever is dropped first.
    return _sharding_callbacks.setdefault(name.encode(), info)


def _to_name(call: Any) -> str | None:
    attributes = call.attributes
    return attributes["backend_config"].value if "backend_config" in attributes else None


def is_shardy_used() -> bool:
    """Whether Shardy propagates shardings, as it does by default, and not GSPMD."""
    return bool(getattr(jax.config, "jax_use_shardy_partitioner", True))
