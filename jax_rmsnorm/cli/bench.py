"""``jax-rmsnorm bench``: its options, and the way from them to a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._bench import names, shapes, step_config
from ._errors import CommandError, OptionError

_EXTRA_PACKAGES = {"rich", "matplotlib", "optax"}
_ALONE = ("shapes", "dtypes", "ops", "against", "plot")
_IN_STEP = ("config", "implementations", "joint", "remat", "verbose")
_DESCRIPTION = """\
Times this package's kernels beside other ways to an RMSNorm, in one run on JAX's default device.
Every contender is checked against float64 before it is timed. On a GPU it is also compared with
the roof: a kernel that does nothing but move the same bytes.

With --step it times whole training steps of a decoder instead, with plain jax.numpy, with the
kernels alone, with the kernels fused with what stands next to them, and without norms.
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
        choices=step_config.IMPLEMENTATIONS,
        metavar="NAME",
        help=f"{', '.join(step_config.IMPLEMENTATIONS)} (default: all)",
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
        "--verbose", action="store_true", help="list the kernels that ran on a GPU, by time"
    )
    parser.set_defaults(run=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    _check(args)
    try:
        if args.plot is not None:
            import matplotlib as matplotlib
        (_run_steps if args.step else _run_alone)(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        raise CommandError(
            f"the package {package} is missing; run: pip install {package}"
        ) from None


def _check(args: argparse.Namespace) -> None:
    for name in _ALONE if args.step else _IN_STEP:
        if getattr(args, name):
            raise OptionError(f"--{name}: {'not' if args.step else 'only'} together with --step")
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
            json=args.json,
            profile=args.profile,
            verbose=args.verbose,
        )
    )
