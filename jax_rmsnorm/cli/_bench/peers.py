"""The list of all contenders, and the rivals in JAX that are packages of their own."""

# None of these packages is a dependency, not even of the tests.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping

import jax

from .contenders import (
    Contender,
    Flax,
    JaxContender,
    Kernel,
    Plain,
    PlainSaved,
    Roof,
    make_forward,
    make_saved_backward,
)
from .inputs import EPS
from .shapes import Case
from .timing import Call
from .torch_peers import TORCH_PEERS


class Tokamax(JaxContender):
    """`tokamax.layer_norm` without the mean, in Triton."""

    name = "tokamax"
    package = "tokamax"

    def why_not(self, platform: str) -> str | None:
        return super().why_not(platform) if platform == "gpu" else "it is timed on a GPU only"

    def call(self, case: Case) -> Call:
        import tokamax

        def norm(x: jax.Array, gamma: jax.Array) -> jax.Array:
            return tokamax.layer_norm(
                x, gamma, None, epsilon=EPS, subtract_mean=False, implementation="triton"
            )

        return make_forward(norm) if case.op == "forward" else make_saved_backward(norm)


CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Kernel(),
        Roof(),
        Plain(),
        PlainSaved(),
        Flax(),
        Tokamax(),
        *TORCH_PEERS,
    )
}
