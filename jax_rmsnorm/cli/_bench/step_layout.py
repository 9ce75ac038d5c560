"""Where the arrays of a step's model are on a mesh of devices."""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

from .._errors import OptionError
from .._layout import BATCH_AXES, ONE_DEVICE, Layout, make_mesh, parse
from .step_config import Config

# The head is gathered, and logits split by positions: a vocabulary's activations are larger than its parameters.
_PARAMETERS = (
    (r"(qkv|gate_up)/\d+$", P("fsdp", "tensor")),
    (r"(out|down)$", P("tensor", "fsdp")),
    (r"embedding$", P(None, ("fsdp", "tensor"))),
    (r"head$", P(("fsdp", "tensor"), None)),
    (r"", P()),  # every γ, the optimiser's counts
)


def make(config: Config) -> Layout:
    """The layout that ``config.mesh`` and ``config.stream`` ask for, on the first devices.

    Raises:
        OptionError: there are too few devices, or the model does not divide so.
    """
    if config.mesh is None:
        return ONE_DEVICE
    sizes = parse(config.mesh)
    if config.joint and sizes["tensor"] > 1:
        raise OptionError(
            "--joint: not together with --mesh tensor=…, which would cut queries from keys elsewhere"
        )
    lengths = (
        ("the batch", config.batch, BATCH_AXES),
        ("the number of heads of keys", config.kv_heads, ("tensor",)),
        ("the sequence", config.seq, ("tensor",)),
        ("d_model", config.d_model, ("fsdp", "tensor")),
        ("the SwiGLU's hidden size", config.d_ff, ("tensor",)),
    )
    return Layout(make_mesh(sizes, lengths), _PARAMETERS, stream=config.stream)
