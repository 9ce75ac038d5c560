"""Where a run's parameters are on a mesh of devices.

Whatever the mesh, a norm's rows stay whole, and each device runs the kernels on its share of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import PartitionSpec as P

from .._layout import BATCH_AXES, Layout, make_mesh
from .config import Config

# A vocabulary of bytes makes it cheaper to gather the outer two kernels than to move activations.
_PARAMETERS = (
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    (r"embedding/kernel$", P(None, ("fsdp", "tensor"))),
    (r"head/kernel$", P(("fsdp", "tensor"), None)),
    (r"", P()),  # the norms' scales, the optimiser's counts
)
_ONE_KV_HEAD = (r"(key|value)/kernel$", P("fsdp"))


def make(sizes: Mapping[str, int], config: Config) -> Layout:
    """A layout for a mesh of these sizes, of the first devices.

    Raises:
        OptionError: there are too few devices, or the model does not divide so.
    """
    splits_kv_heads = config.kv_heads > 1
    lengths = (
        ("--batch", config.batch, BATCH_AXES),
        ("--heads", config.heads, ("tensor",)),
        # A single one is on every device of tensor. Two on four would split that axis, for which there is no spec.
        ("--kv-heads", config.kv_heads, ("tensor",) if splits_kv_heads else ()),
        ("--seq", config.seq, ("tensor",)),
        ("--d-model", config.d_model, ("fsdp", "tensor")),
        ("the SwiGLU's hidden size", config.mlp_dim, ("tensor",)),
    )
    rules = _PARAMETERS if splits_kv_heads else (_ONE_KV_HEAD, *_PARAMETERS)
    return Layout(make_mesh(sizes, lengths), rules, splits_kv_heads)
