"""What the text of a compiled program says about communication and about the kernels in it."""

from __future__ import annotations

import collections
import re
from typing import Any

_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_KERNEL = re.compile(
    r'= \(?(?P<type>\w+\[[\d,]*\]).*custom_call_target="jax_rmsnorm_(?P<name>\w+)"'
)
_LAYOUT = re.compile(r"\{[\d,]*\}")


def collectives(compiled: Any) -> collections.Counter[str]:
    """Collective operations, as ``all-reduce f32[64]``, with the shape of a device's part."""
    found = _COLLECTIVE.finditer(compiled.as_text())
    return collections.Counter(f"{m['kind']} {_LAYOUT.sub('', m['type'])}" for m in found)


def kernels(compiled: Any) -> collections.Counter[str]:
    """This package's custom calls, as ``forward bf16[2,16,64]``, with the type of their first result."""
    found = _KERNEL.finditer(compiled.as_text())
    return collections.Counter(f"{m['name']} {m['type']}" for m in found)
