"""The command line ``jax-rmsnorm``: one module a subcommand, each with a `register`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import bench, info, train
from ._errors import CommandError, OptionError

_COMMANDS = (train, bench, info)
_INTERRUPTED = 128 + 2  # what a shell reports of a program that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand of ``argv`` (default: ``sys.argv[1:]``) and returns the exit code.

    A wrong option exits with code 2 and a message that names it, any other error with code 1, an
    abort by Ctrl-C with code 130.
    """
    parser = argparse.ArgumentParser(
        prog="jax-rmsnorm", description="RMSNorm for JAX from hand-written CUDA and CPU kernels."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.register(subparsers)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except OptionError as error:
        args.parser.error(str(error))
    except CommandError as error:
        print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{args.parser.prog}: aborted", file=sys.stderr)
        return _INTERRUPTED
    return 0
