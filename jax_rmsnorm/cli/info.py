"""``jax-rmsnorm info``: versions, which kernels are loaded, for which devices, and why not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax_rmsnorm


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="versions, and which kernels are loaded",
        description="Prints versions, which kernels are loaded, for which devices, and why not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run, parser=parser)


def _run(args: argparse.Namespace) -> None:
    facts = jax_rmsnorm.info()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """One line a fact, values aligned, nested mappings indented below their name."""
    width = max((len(name) for name, fact in facts.items() if isinstance(fact, str)), default=0)
    for name, fact in facts.items():
        if isinstance(fact, str):
            yield f"{indent}{name + ':':<{width + 1}} {fact}"
        else:
            yield f"{indent}{name}:"
            yield from _lines(fact, indent + "  ")
