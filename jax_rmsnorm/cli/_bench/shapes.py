"""What is measured: the named tables of shapes, the dtypes, and the cases made of them.

Imports neither JAX nor any extra, so that a wrong option costs no start-up.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from .._errors import OptionError

Op = Literal["forward", "backward"]
Shape: TypeAlias = tuple[int, int]
OPS: tuple[Op, ...] = get_args(Op)

_LATENCY_ROWS = 256
_LATENCY = ((_LATENCY_ROWS, 8192), (16, 4096), (1, 4096))
TABLES: Mapping[str, tuple[Shape, ...]] = {
    "cpu": ((4096, 1024), (1024, 4096), (65536, 128), (16, 4096)),
    "gpu": (
        (16384, 4096),
        (8192, 8192),
        (524288, 128),
        (32768, 1024),
        (4096, 16384),
        *_LATENCY,
    ),
    "latency": _LATENCY,
    "few": tuple(itertools.product((1, 16, 64, _LATENCY_ROWS), (1024, 4096, 8192, 16384))),
    "odd": (
        (671088, 100),
        (67108, 1000),
        (16384, 4100),
        (13107, 5120),
        (9362, 7168),
        (5461, 12288),
        (1336, 50257),
    ),
    "hidden": tuple((2**26 // hidden, hidden) for hidden in (2**k for k in range(6, 18))),
}
DTYPES = ("float32", "bfloat16", "float16")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured where the options say nothing."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]


DEFAULTS: Mapping[str, Defaults] = {
    "cpu": Defaults(("cpu",), ("float32", "bfloat16")),
    "gpu": Defaults(("gpu",), ("bfloat16", "bfloat16/float32", "float32")),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation on x [rows, hidden] and gamma [hidden]."""

    op: Op
    rows: int
    hidden: int
    x_dtype: str
    gamma_dtype: str

    @property
    def shape(self) -> Shape:
        return self.rows, self.hidden

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.hidden}"

    @property
    def dtypes(self) -> str:
        """As the option spells them: x's, and gamma's after a slash where it differs."""
        same = self.x_dtype == self.gamma_dtype
        return self.x_dtype if same else f"{self.x_dtype}/{self.gamma_dtype}"

    @property
    def is_latency(self) -> bool:
        """Whether rows are so few that launches and dependences, not bytes, decide the time."""
        return self.rows <= _LATENCY_ROWS

    @property
    def tensor_bytes(self) -> int:
        return self.rows * self.hidden * ITEM_BYTES[self.x_dtype]

    @property
    def moved_bytes(self) -> int:
        """The least that must be moved, vectors left out: x and y, or x, dy and dx."""
        return self.tensor_bytes * (2 if self.op == "forward" else 3)

    def __str__(self) -> str:
        return f"{self.op} {self.dtypes} {self.size}"


def parse_shapes(words: Iterable[str]) -> list[Shape]:
    """Shapes named by tables or written as ROWSxHIDDEN, each once, in the order given."""
    return list(dict.fromkeys(itertools.chain.from_iterable(map(_shapes, words))))


def _shapes(word: str) -> Sequence[Shape]:
    if word in TABLES:
        return TABLES[word]
    match = re.fullmatch(r"(\d+)x(\d+)", word)
    if match is None or "0" in match.groups():
        raise OptionError(
            f"--shapes: must be a table ({', '.join(TABLES)}) or ROWSxHIDDEN, got {word!r}"
        )
    return [(int(match[1]), int(match[2]))]


def parse_dtypes(words: Iterable[str]) -> list[tuple[str, str]]:
    """(x's, gamma's) for each word, which is one dtype for both or two with a slash between."""

    def parse(word: str) -> tuple[str, str]:
        x, slash, gamma = word.partition("/")
        pair = (x, gamma if slash else x)
        if not set(pair) <= set(DTYPES):
            raise OptionError(
                f"--dtypes: must be one of {', '.join(DTYPES)}, or x's and gamma's as in "
                f"bfloat16/float32, got {word!r}"
            )
        return pair

    return list(dict.fromkeys(map(parse, words)))


def cases(
    ops: Iterable[Op], dtypes: Iterable[tuple[str, str]], shapes: Iterable[Shape]
) -> Iterator[Case]:
    """All combinations, shapes varying fastest."""
    for op, (x_dtype, gamma_dtype), (rows, hidden) in itertools.product(ops, dtypes, shapes):
        yield Case(op, rows, hidden, x_dtype, gamma_dtype)
