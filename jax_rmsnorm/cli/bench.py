"""``jax-rmsnorm bench``: its options, and the way from them to a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from . import _streams
from ._bench import names, shapes, step_config
from ._errors import CommandError, OptionError

_EXTRA_PACKAGES = {"rich", "matplotlib", "optax"}
_ALONE = "alone"
_TAKEN: Mapping[str, Collection[str]] = {
    _ALONE: ("shapes", "dtypes", "ops", "against", "plot"),
    "step": ("config", "implementations", "joint", "remat", "forward", "mesh", "stream", "verbose"),
    "sweep": ("seed", "dtypes", "ops"),
    "margins": ("ops",),
}
_DESCRIPTION = """\
Times this package's kernels beside other ways to an RMSNorm, in one run on JAX's default device.
Every contender is checked against float64 before it is timed. On a GPU it is also compared with
the roof: a kernel that does nothing but move the same bytes.

With --step it times whole training steps of a decoder instead, with plain jax.numpy, with the
kernels alone, with the kernels fused with what stands next to them, and without norms.

With --sweep it times random shapes beside the roof and jitted jax.numpy, a second or so each, and
shows where the kernels do worst. With --margins it shows what leaving SMs of a GPU free costs.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "bench", help="time the kernels beside other implementations", description=_DESCRIPTION
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"tables ({', '.join(shapes.TABLES)}) or ROWSxHIDDEN (default: the device's table)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        help=f"{', '.join(shapes.DTYPES)}, or x's and gamma's as in bfloat16/float32",
    )
    parser.add_argument(
        "--ops", nargs="+", choices=shapes.OPS, metavar="OP", help="forward, backward"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(names.RIVALS)} (default: jnp on a CPU, all that are installed on a GPU); "
        "jnp_saved is jnp as in a training step, eager and compile are PyTorch",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw bandwidth over hidden size"
    )
    parser.add_argument(
        "--no-profile",
        dest="profile",
        action="store_false",
        help="leave out the kernel durations that the profiler reports on a GPU",
    )
    step = parser.add_argument_group("training steps")
    step.add_argument("--step", action="store_true", help="time training steps of a decoder")
    step.add_argument(
        "--config",
        nargs="+",
        choices=tuple(step_config.CONFIGS),
        metavar="NAME",
        help=f"{', '.join(step_config.CONFIGS)} (default: tiny on a CPU, all others on a GPU)",
    )
    step.add_argument(
        "--implementations",
        nargs="+",
        choices=(*step_config.IMPLEMENTATIONS, step_config.KERNELS),
        metavar="NAME",
        help=f"{', '.join(step_config.IMPLEMENTATIONS)} (default: these), or {step_config.KERNELS}: fused, with "
        "kernels at any size",
    )
    step.add_argument(
        "--joint",
        action="store_true",
        help="query, key and value in one product, the gate and up of the SwiGLU in another",
    )
    step.add_argument(
        "--remat", action="store_true", help="save each layer's input alone, compute the rest again"
    )
    step.add_argument(
        "--forward",
        action="store_true",
        help="a forward without derivatives instead of a step, with bfloat16 matrices, to the last position's logits",
    )
    step.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="over several devices: sizes of data, fsdp and tensor, as train has them",
    )
    step.add_argument(
        "--stream",
        choices=_streams.STREAMS,
        metavar="HOW",
        help="how the mesh's axis tensor splits the residual stream: by positions (default), by features, or not at "
        "all (whole)",
    )
    step.add_argument(
        "--verbose", action="store_true", help="list the kernels that ran on a GPU, by time"
    )
    sweep = parser.add_argument_group("sweeps and margins")
    sweep.add_argument(
        "--sweep",
        type=int,
        metavar="N",
        help="time N random shapes of up to 1,048,576 rows, hidden sizes of 32 to 131,072 and 128 MiB "
        "(16 MiB on a CPU) a tensor, and list the ten that are farthest from the roof among those of "
        "32 MiB or more, and the ten that are slowest beside jnp; --dtypes (one; default: bfloat16), "
        "--ops and --json apply. On a GPU the times are kernel durations from the profiler, or with "
        "--no-profile those of short loops, which takes longer",
    )
    sweep.add_argument("--seed", type=int, metavar="S", help="of the random shapes (default: 0)")
    sweep.add_argument(
        "--margins",
        action="store_true",
        help="time 16384x4096 in bfloat16 with SM margins of 0 to 64 beside the SMs that are left; "
        "needs a GPU; --ops and --json apply",
    )
    parser.set_defaults(run=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    mode = _mode(args)
    _check(args, mode)
    try:
        if args.plot is not None:
            import matplotlib as matplotlib
        _RUNS[mode](args)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        raise CommandError(
            f"the package {package} is missing; run: pip install {package}"
        ) from None


def _mode(args: argparse.Namespace) -> str:
    wanted = [mode for mode in _TAKEN if mode != _ALONE and _is_given(args, mode)]
    if len(wanted) > 1:
        raise OptionError(f"--{wanted[1]}: not together with --{wanted[0]}")
    return wanted[0] if wanted else _ALONE


def _is_given(args: argparse.Namespace, name: str) -> bool:
    value = getattr(args, name)
    return value is not None and value is not False


def _check(args: argparse.Namespace, mode: str) -> None:
    for owner, options in _TAKEN.items():
        for option in options:
            if option not in _TAKEN[mode] and _is_given(args, option):
                relation = f"not together with --{mode}"
                if owner != _ALONE:
                    relation = f"only together with --{owner}"
                raise OptionError(f"--{option}: {relation}")
    if args.remat and args.forward:
        raise OptionError("--remat: not together with --forward, which saves nothing")
    if args.stream is not None and args.mesh is None:
        raise OptionError("--stream: only together with --mesh")
    if args.sweep is not None and args.sweep < 1:
        raise OptionError(f"--sweep: must be 1 or more, got {args.sweep}")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise OptionError(f"{option}: there is no folder {path.parent}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise OptionError(f"--plot: must end in .png, got {args.plot}")


def _run_alone(args: argparse.Namespace) -> None:
    from ._bench import session

    session.run(
        session.Request(
            shapes=args.shapes,
            dtypes=args.dtypes,
            ops=args.ops,
            against=args.against,
            json=args.json,
            plot=args.plot,
            profile=args.profile,
        )
    )


def _run_steps(args: argparse.Namespace) -> None:
    from ._bench import step_session

    step_session.run(
        step_session.Request(
            configs=args.config,
            implementations=args.implementations,
            joint=args.joint,
            remat=args.remat,
            forward=args.forward,
            mesh=args.mesh,
            stream=args.stream,
            json=args.json,
            profile=args.profile,
            verbose=args.verbose,
        )
    )


def _run_sweep(args: argparse.Namespace) -> None:
    from ._bench import sweep_session

    sweep_session.run(
        sweep_session.Request(
            count=args.sweep,
            seed=args.seed,
            dtypes=args.dtypes,
            ops=args.ops,
            json=args.json,
            profile=args.profile,
        )
    )


def _run_margins(args: argparse.Namespace) -> None:
    from ._bench import margins

    margins.run(args.ops, args.json)


_RUNS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    _ALONE: _run_alone,
    "step": _run_steps,
    "sweep": _run_sweep,
    "margins": _run_margins,
}
