"""``jax-rmsnorm train``: its options, and the way from them to a run."""

from __future__ import annotations

import argparse
from typing import Any

from ._errors import CommandError
from ._train.config import PRESETS, option

_EXTRA_PACKAGES = {"flax", "optax", "orbax", "matplotlib", "rich"}
_DESCRIPTION = """\
Trains a small decoder-only language model with this package's RMSNorm, byte by byte on the sources
of Python's standard library, and writes a checkpoint, metrics, a loss curve and a sample of text.
Ctrl-C ends the training after the step at hand, with all of these; a second one aborts.
"""
# What is not given comes from the preset or, when resuming, from the checkpoint.
_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("d_model", {"type": int, "help": "size of the residual stream"}),
    ("layers", {"type": int, "help": "number of decoder layers"}),
    ("heads", {"type": int, "help": "query heads of a layer"}),
    ("kv_heads", {"type": int, "help": "key and value heads of a layer"}),
    ("seq", {"type": int, "help": "bytes in a window"}),
    ("batch", {"type": int, "help": "windows in a step"}),
    ("steps", {"type": int, "help": "steps in all: the length of the learning-rate schedule"}),
    ("lr", {"type": float, "help": "highest learning rate"}),
    ("dtype", {"choices": ("float32", "bfloat16"), "help": "of the computation"}),
    ("held_out_windows", {"type": int, "metavar": "N", "help": "windows of the held-out loss"}),
    (
        "implementation",
        {
            "choices": ("auto", "kernel", "xla"),
            "help": "the norms: kernel where there is one and it pays (auto), or always one of the two",
        },
    ),
    (
        "deterministic",
        {
            "action": "store_true",
            "help": "the same losses bit for bit also on a GPU, where that makes steps slower",
        },
    ),
    ("seed", {"type": int, "help": "of parameters, windows and sample"}),
    ("data", {"metavar": "DIR", "help": "train on the *.py below DIR instead"}),
    ("prompt", {"metavar": "TEXT", "help": "what the sample continues"}),
    ("sample_bytes", {"type": int, "metavar": "N", "help": "length of the sample"}),
    ("temperature", {"type": float, "metavar": "T", "help": "of the sample; 0 is greedy"}),
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "train", help="train a small language model with these norms", description=_DESCRIPTION
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="settings to start from (default: gpu where JAX has a GPU, else cpu; "
        "each is about two minutes)",
    )
    start.add_argument(
        "--resume", metavar="DIR", help="continue the run that wrote DIR, with its settings"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write (default: runs/<date>-<time>, or the folder resumed from)",
    )
    parser.add_argument(
        "--stop-at",
        type=int,
        metavar="STEP",
        help="end after this step, as Ctrl-C would; --resume continues the schedule",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="shard over several devices: data (batches), fsdp (batches, and parameters in parts) "
        "and tensor (heads, hidden sizes and positions), as in data=2,tensor=2; a run may be "
        "resumed on another mesh",
    )
    settings = parser.add_argument_group("settings, in place of the preset's")
    for name, keywords in _OPTIONS:
        settings.add_argument(option(name), dest=name, default=argparse.SUPPRESS, **keywords)
    parser.set_defaults(run=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name, _ in _OPTIONS if hasattr(args, name)}
    try:
        from ._train import plan, session
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        raise CommandError(
            f'the package {package} is missing; run: pip install "jax-rmsnorm[train]"'
        ) from None
    session.run(
        plan.make(
            given,
            preset=args.preset,
            resume=args.resume,
            out=args.out,
            stop_at=args.stop_at,
            mesh=args.mesh,
        )
    )
