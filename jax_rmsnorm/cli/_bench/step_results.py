"""What the implementations of one model's step took, and what follows from comparing them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .profile import DeviceTime
from .step_config import Config
from .step_program import Memory
from .timing import Timing, summarize

_OURS = "jax_rmsnorm"
_NUMBERED = re.compile(r"^(.*fusion.*|wrapped_.*)_\d+$")
# Of the fall of the loss over the compared steps. Sums in another order change a loss by 0.0004 of that in the tiny
# model, a γ without gradient by 0.01, a y that is 3 % too small by 0.04.
_LOSS_TOLERANCE = 0.005
# Of the loss of a forward alone, in nats: rounding makes 0.002, another norm 0.05.
_FORWARD_TOLERANCE = 0.01


@dataclasses.dataclass
class Measured:
    """One implementation's step.

    Attributes:
        losses: of the first steps.
        samples: seconds a step, one measurement a round; the same round for all implementations has the same index.
        device: what the profiler saw of a step.
        norm_kernels: names of XLA's kernels that belong to norms.
    """

    compile_seconds: float
    memory: Memory
    norm_kernels: frozenset[str]
    losses: Sequence[float] = ()
    samples: Sequence[float] = ()
    device: DeviceTime | None = None

    def of_norms(self) -> Mapping[str, float]:
        """Seconds a step of each kernel that belongs to norms, this package's included."""
        kernels = {} if self.device is None else self.device.kernels
        return {
            name: seconds
            for name, seconds in kernels.items()
            if _OURS in name or name in self.norm_kernels
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """One model with its implementations, by name."""

    config: Config
    parameters: int
    measured: Mapping[str, Measured]

    def step(self, name: str) -> Timing:
        return summarize(self.measured[name].samples)

    def tax(self, name: str) -> Timing | None:
        """Seconds that the norms cost: over the identity's step, of each round, for what the rounds share."""
        identity = self.measured.get("identity")
        if identity is None or name == "identity":
            return None
        pairs = zip(self.measured[name].samples, identity.samples, strict=True)
        return summarize([own - without for own, without in pairs])

    def kernel_tax(self, name: str) -> float | None:
        """The same in the time of kernels, from the profiler."""
        own, identity = self._kernel_seconds(name), self._kernel_seconds("identity")
        return None if own is None or identity is None or name == "identity" else own - identity

    def of_plain_tax(self, name: str) -> float | None:
        """A tax as a part of plain `jax.numpy`'s."""
        own, plain = self.tax(name), self.tax("jnp") if "jnp" in self.measured else None
        return own.median / plain.median if own and plain and plain.median > 0 else None

    def of_plain_kernel_tax(self, name: str) -> float | None:
        own, plain = self.kernel_tax(name), self.kernel_tax("jnp")
        return own / plain if own is not None and plain is not None and plain > 0 else None

    def speedup(self, name: str) -> Timing | None:
        """Plain `jax.numpy`'s time over this one's, of each round."""
        plain = self.measured.get("jnp")
        if plain is None:
            return None
        pairs = zip(plain.samples, self.measured[name].samples, strict=True)
        return summarize([without / own for without, own in pairs])

    def problems(self) -> Iterator[str]:
        """Losses that are not finite, or not those of the first implementation; the identity has its own."""
        reference = next((name for name in self.measured if name != "identity"), None)
        for name, one in self.measured.items():
            if not all(map(math.isfinite, one.losses)):
                yield f"{self.config.name}: losses of {name} are not all finite"
            elif reference is not None and name != "identity":
                expected = self.measured[reference].losses
                allowed = _LOSS_TOLERANCE * (max(expected) - min(expected))
                if self.config.forward:
                    allowed = _FORWARD_TOLERANCE
                apart = max(abs(a - b) for a, b in zip(one.losses, expected, strict=True))
                if not apart <= allowed:
                    yield (
                        f"{self.config.name}: losses of {name} and {reference} are up to "
                        f"{apart:.3g} apart, over {allowed:.3g}"
                    )

    def _kernel_seconds(self, name: str) -> float | None:
        one = self.measured.get(name)
        return None if one is None or one.device is None else one.device.seconds


@dataclasses.dataclass(frozen=True)
class Family:
    """Kernels of one name but for the number that XLA puts at its end, as for the same fusion in another layer."""

    name: str
    kernels: int
    seconds: float
    of_norms: bool


def families(one: Measured) -> list[Family]:
    """All kernels of a step by family, slowest first."""
    of_norms = one.of_norms()
    members: dict[tuple[str, bool], list[float]] = {}
    for name, seconds in one.device.kernels.items() if one.device else ():
        key = (_NUMBERED.sub(r"\1", name), name in of_norms)
        members.setdefault(key, []).append(seconds)
    found = [
        Family(name, len(seconds), sum(seconds), marked)
        for (name, marked), seconds in members.items()
    ]
    return sorted(found, key=lambda family: -family.seconds)


def to_json(results: Sequence[Result], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was found, in milliseconds (kernels: microseconds) a step and bytes."""
    return {"environment": dict(environment), "steps": [_result(result) for result in results]}


def _result(result: Result) -> dict[str, Any]:
    return {
        **dataclasses.asdict(result.config),
        "parameters": result.parameters,
        "problems": list(result.problems()),
        "implementations": {name: _measured(result, name) for name in result.measured},
    }


def _measured(result: Result, name: str) -> dict[str, Any]:
    one = result.measured[name]
    found: dict[str, Any] = {
        "step_ms": _timing(result.step(name), 1e3),
        "norm_tax_ms": _timing(result.tax(name), 1e3),
        "norm_tax_of_jnp": result.of_plain_tax(name),
        "speedup": _timing(result.speedup(name), 1),
        "losses": [loss if math.isfinite(loss) else None for loss in one.losses],
        "peak_bytes": one.memory.peak,
        "memory": one.memory._asdict(),
        "compile_seconds": one.compile_seconds,
    }
    if one.device is not None:
        tax, of_norms = result.kernel_tax(name), one.of_norms()
        found["kernels"] = {
            "ms": one.device.seconds * 1e3,
            "per_step": one.device.events_per_call,
            "norm_tax_ms": None if tax is None else tax * 1e3,
            "norm_tax_of_jnp": result.of_plain_kernel_tax(name),
            "of_norms_ms": sum(of_norms.values()) * 1e3,
            "of_norms_us": _microseconds(of_norms),
            "all_us": _microseconds(one.device.kernels),
        }
    return found


def _timing(timing: Timing | None, unit: float) -> dict[str, Any] | None:
    if timing is None:
        return None
    return {
        "median": timing.median * unit,
        "notch": timing.notch * unit,
        "quartiles": [timing.lower * unit, timing.upper * unit],
        "samples": timing.samples,
    }


def _microseconds(kernels: Mapping[str, float]) -> dict[str, float]:
    slowest_first = sorted(kernels, key=kernels.__getitem__, reverse=True)
    return {name: kernels[name] * 1e6 for name in slowest_first}
