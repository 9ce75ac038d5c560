"""A sweep over random shapes: which ones, and which of them deserve a look."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence

from .names import KERNEL
from .results import Row
from .shapes import Shape

PLAIN = "jnp"
TENSOR_BYTES: Mapping[str, int] = {"cpu": 2**24, "gpu": 2**27}
"""The most that x holds, by platform."""
LARGE_BYTES = 2**25
"""What a tensor holds at the least where bytes alone decide the time, so that the roof is a fair measure."""
SLOWER = 0.05
SLOWER_SECONDS = 0.3e-6
"""By how much of `jnp`'s time, and by how many seconds, a kernel is slower than noise explains."""

_MOST_ROWS = 2**20
_LEAST_HIDDEN, _MOST_HIDDEN = 2**5, 2**17
_VECTOR = 8  # elements, 16 bytes of the 2-byte types
_ALIGNED_SHARE = 0.7


def draw_shapes(count: int, seed: int, elements: int) -> list[Shape]:
    """Shapes log-uniform in rows and hidden, with fewer rows where there would be more than ``elements``.

    Seven hidden sizes in ten are multiples of 8. A seed stands for one sequence, of which ``count`` is the length.
    """
    source = random.Random(seed)
    return [_draw_shape(source, elements) for _ in range(count)]


def _draw_shape(source: random.Random, elements: int) -> Shape:
    rows = _log_uniform(source, 1, _MOST_ROWS)
    hidden = _log_uniform(source, _LEAST_HIDDEN, _MOST_HIDDEN)
    if source.random() < _ALIGNED_SHARE:
        hidden = round(hidden / _VECTOR) * _VECTOR
    return max(1, min(rows, elements // hidden)), hidden


def _log_uniform(source: random.Random, least: int, most: int) -> int:
    return round(math.exp(source.uniform(math.log(least), math.log(most))))


def by_op(rows: Iterable[Row]) -> Mapping[str, Sequence[Row]]:
    """The rows of each operation."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.op, []).append(row)
    return groups


def farthest_from_roof(rows: Iterable[Row]) -> list[Row]:
    """The large tensors by the fraction of the roof that the kernel reaches, least first."""
    large = (row for row in rows if row.case.tensor_bytes >= LARGE_BYTES)
    return _ascending((row, row.of_roof(KERNEL)) for row in large)


def slower_than_plain(rows: Iterable[Row]) -> list[Row]:
    """Those in which the kernel takes notably longer than `jnp`, worst first."""
    return _ascending((row, row.speedup(over=PLAIN)) for row in rows if _is_slower(row))


def _is_slower(row: Row) -> bool:
    own, plain = row.seconds(KERNEL), row.seconds(PLAIN)
    if own is None or plain is None:
        return False
    return own > plain * (1 + SLOWER) and own > plain + SLOWER_SECONDS


def _ascending(pairs: Iterable[tuple[Row, float | None]]) -> list[Row]:
    known = ((ratio, row) for row, ratio in pairs if ratio is not None)
    return [row for _, row in sorted(known, key=lambda pair: pair[0])]
