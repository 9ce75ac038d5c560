"""Who takes part: this package's kernel, the roof, and other ways to an RMSNorm that are plain JAX."""

from __future__ import annotations

import abc
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jax_rmsnorm

from ... import _ffi
from .check import Check
from .inputs import EPS, Inputs
from .names import KERNEL, ROOF
from .shapes import Case, Shape
from .timing import Call, Plan, Prepared, PreparedCall, share_of_poison

_ROOF_TARGET = "jax_rmsnorm_roof"
_ROOF_SAMPLES = 3
_MOST_POISON = 1e-3  # by chance, a few of its results have the bits that mark what was not written


class Contender(abc.ABC):
    """One implementation, under the name that tables and options use."""

    name: str
    package: str | None = None
    """The package to import, if it needs one besides JAX."""

    def why_not(self, platform: str) -> str | None:
        """Why it cannot take part on JAX's ``platform``; None if it can, as far as is known without importing."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return None

    @abc.abstractmethod
    def prepare(
        self, case: Case, sets: Sequence[Inputs], plan: Plan, *, chain: bool = False
    ) -> Prepared:
        """Compiles what is to be timed and runs it once. Whatever it raises becomes the cell of the table."""

    def problem(self, results: Sequence[jax.Array], check: Check) -> str | None:
        """What is wrong with the results of the first of ``sets``; None if nothing is."""
        return check.problem(results)


class JaxContender(Contender):
    """A contender that JAX compiles."""

    @abc.abstractmethod
    def call(self, case: Case) -> Call:
        """The call to time."""

    def calls(self, case: Case) -> Sequence[Call]:
        """All ways to make the call, of which the fastest counts."""
        return [self.call(case)]

    def prepare(
        self, case: Case, sets: Sequence[Inputs], plan: Plan, *, chain: bool = False
    ) -> Prepared:
        return PreparedCall(self.call(case), case, sets, plan, chain=chain)


Norm = Callable[[jax.Array, jax.Array], jax.Array]


def make_forward(norm: Norm) -> Call:
    return Call(lambda x, gamma: (norm(x, gamma),), lambda inputs: (inputs.x, inputs.gamma))


def make_saved_backward(norm: Norm) -> Call:
    """As a training step runs it: from what the forward saved, which the vjp function carries as a pytree."""
    vjp = jax.jit(lambda x, gamma: jax.vjp(norm, x, gamma)[1])
    return Call(lambda dy, vjp: vjp(dy), lambda inputs: (inputs.dy, vjp(inputs.x, inputs.gamma)))


def make_whole_backward(norm: Norm) -> Call:
    """From the inputs alone: what it needs of the forward, it computes again."""
    return Call(
        lambda dy, inputs: jax.vjp(norm, *inputs)[1](dy),
        lambda inputs: (inputs.dy, (inputs.x, inputs.gamma)),
    )


class Kernel(JaxContender):
    """This package's kernels; ``sm_margin`` as `jax_rmsnorm.rms_norm` takes it."""

    name = KERNEL

    def __init__(self, sm_margin: int | None = None) -> None:
        self._sm_margin = sm_margin

    def call(self, case: Case) -> Call:
        norm = functools.partial(
            jax_rmsnorm.rms_norm, eps=EPS, implementation="kernel", sm_margin=self._sm_margin
        )
        return make_forward(norm) if case.op == "forward" else make_saved_backward(norm)


def plain_norm(x: jax.Array, gamma: jax.Array, eps: float = EPS) -> tuple[jax.Array, jax.Array]:
    """The ten lines of `jax.numpy` that people write: y, and the mean square, which the backward can start from."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    mean_square = checkpoint_name(mean_square, "mean_square")
    y = wide * lax.rsqrt(mean_square + eps) * gamma.astype(jnp.float32)
    return y.astype(x.dtype), mean_square


def _plain_y(x: jax.Array, gamma: jax.Array) -> jax.Array:
    return plain_norm(x, gamma)[0]


class Plain(JaxContender):
    """`jax.numpy` under jit, alone."""

    name = "jnp"

    def call(self, case: Case) -> Call:
        return make_forward(_plain_y) if case.op == "forward" else make_whole_backward(_plain_y)


class PlainSaved(JaxContender):
    """The same as a part of a training step: a number a row is written by the forward and read by the backward."""

    name = "jnp_saved"

    def call(self, case: Case) -> Call:
        if case.op == "forward":
            return Call(plain_norm, lambda inputs: (inputs.x, inputs.gamma))
        policy = jax.checkpoint_policies.save_only_these_names("mean_square")
        return make_saved_backward(jax.checkpoint(_plain_y, policy=policy, prevent_cse=False))


class Flax(JaxContender):
    """`flax.nnx.RMSNorm`."""

    name = "flax"
    package = "flax"

    def call(self, case: Case) -> Call:
        from flax import nnx

        module = nnx.RMSNorm(case.hidden, epsilon=EPS, dtype=case.x_dtype, rngs=nnx.Rngs(0))
        graph, parameters = nnx.split(module)

        def norm(x: jax.Array, gamma: jax.Array) -> jax.Array:
            return nnx.merge(graph, jax.tree.map(lambda _: gamma, parameters))(x)

        return make_forward(norm) if case.op == "forward" else make_whole_backward(norm)


class Roof(Contender):
    """A copy, or for the backward a copy of two tensors into one: the bytes of the norm and nothing else."""

    name = ROOF

    def __init__(self) -> None:
        self._fastest: dict[tuple[str, str, Shape], int] = {}

    def why_not(self, platform: str) -> str | None:
        if platform != "gpu":
            return "it is a CUDA kernel"
        if not hasattr(_ffi.CUDA.module, "roof"):
            return f"this build has no such kernel: {_ffi.CUDA.reason or 'it is older'}"
        return None

    def calls(self, case: Case) -> Sequence[Call]:
        """All launch configurations, of which the fastest counts."""
        return [_roof_call(case, variant) for variant in range(_roof_variants())]

    def prepare(
        self, case: Case, sets: Sequence[Inputs], plan: Plan, *, chain: bool = False
    ) -> Prepared:
        def prepare(variant: int) -> Prepared:
            return PreparedCall(_roof_call(case, variant), case, sets, plan, chain=chain)

        def seconds(variant: int) -> float:
            prepared = prepare(variant)
            return min(prepared.sample() for _ in range(_ROOF_SAMPLES))

        key = (case.op, case.x_dtype, case.shape)
        if key not in self._fastest:
            self._fastest[key] = min(range(_roof_variants()), key=seconds)
        return prepare(self._fastest[key])

    def problem(self, results: Sequence[jax.Array], check: Check) -> str | None:
        left = float(share_of_poison(results[0]))
        return f"it left {left:.1%} of its result unwritten" if left > _MOST_POISON else None


@functools.cache
def _roof_variants() -> int:
    """Registers the roof's target, once, and returns how many launch configurations it has."""
    module: Any = _ffi.CUDA.module
    jax.ffi.register_ffi_target(_ROOF_TARGET, module.roof(), platform="CUDA")
    return module.roof_variants


def _roof_call(case: Case, variant: int) -> Call:
    def move(head: jax.Array, rest: tuple[jax.Array, ...]) -> tuple[jax.Array]:
        result = jax.ShapeDtypeStruct(head.shape, head.dtype)
        return (jax.ffi.ffi_call(_ROOF_TARGET, result)(head, *rest, variant=np.int64(variant)),)

    if case.op == "forward":
        return Call(move, lambda inputs: (inputs.x, ()))
    return Call(move, lambda inputs: (inputs.dy, (inputs.x,)))
