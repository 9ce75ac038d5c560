"""What the tests of launch configurations share."""

from __future__ import annotations

from typing import Any

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The Hopper GPU with the most bandwidth, which holds persistent blocks back the least.
H200 = {"l2_bytes": 60 << 20, "memory_bandwidth": 4814.3}


def covered(config: dict[str, Any]) -> int:
    """Elements of a row that the threads hold at once."""
    return config["width"] * config["packets"] * config["threads_per_row"] * config["cluster"]
