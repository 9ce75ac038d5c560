"""How a mesh's axis ``tensor`` may split the residual stream. Imports nothing that takes time."""

from __future__ import annotations

from typing import Literal, TypeAlias

Stream: TypeAlias = Literal["positions", "features", "whole"]
STREAMS: tuple[Stream, ...] = ("positions", "features", "whole")
