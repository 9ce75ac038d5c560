"""``jax-rmsnorm bench``: its options, and the way from them to a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._bench import names, shapes
from ._errors import CommandError, OptionError

_EXTRA_PACKAGES = {"rich", "matplotlib"}
_DESCRIPTION = """\
Times this package's kernels beside other ways to an RMSNorm, in one run on JAX's default device.
Every contender is checked against float64 before it is timed. On a GPU it is also compared with
the roof: a kernel that does nothing but move the same bytes.
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
    parser.set_defaults(run=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    try:
        from ._bench import session

        if args.plot is not None:
            import matplotlib as matplotlib
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise
        raise CommandError(
            f"the package {package} is missing; run: pip install {package}"
        ) from None
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise OptionError(f"{option}: there is no folder {path.parent}")
    if args.plot is not None and args.plot.suffix != ".png":
        raise OptionError(f"--plot: must end in .png, got {args.plot}")
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
