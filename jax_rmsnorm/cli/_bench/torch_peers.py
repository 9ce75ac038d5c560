"""Rivals that run under PyTorch on a GPU, each taking part only where its package is installed.

All are timed as replays of a CUDA graph of calls on the same input sets as the JAX contenders, which they share with
JAX's memory. The backward is what autograd runs, from what the forward saved.
"""

# None of these packages is a dependency, not even of the tests.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .contenders import Contender
from .inputs import EPS, Inputs
from .shapes import Case
from .timing import Plan, Prepared

Norm = Callable[[Any, Any], Any]
_WARM_UPS = 3


class TorchContender(Contender):
    """``load(case)`` imports the package and returns the norm: y from x [rows, hidden] and gamma [hidden]."""

    def __init__(
        self,
        name: str,
        package: str,
        load: Callable[[Case], Norm],
        *,
        differentiable: bool = True,
    ) -> None:
        self.name = name
        self.package = package
        self._load = load
        self._differentiable = differentiable

    def why_not(self, platform: str) -> str | None:
        if platform != "gpu":
            return "it is timed on a GPU only"
        if importlib.util.find_spec("torch") is None:
            return "the package torch is not installed"
        return super().why_not(platform)

    def prepare(
        self, case: Case, sets: Sequence[Inputs], plan: Plan, *, chain: bool = False
    ) -> Prepared:
        if case.op == "backward" and not self._differentiable:
            raise NotImplementedError("it has no backward")
        return _PreparedGraph(self._load(case), case, sets, plan, chain=chain)


class _PreparedGraph(Prepared):
    """A CUDA graph of one call on each input set, or of a chain of calls on the first."""

    def __init__(
        self, norm: Norm, case: Case, sets: Sequence[Inputs], plan: Plan, *, chain: bool
    ) -> None:
        import torch

        self._torch = torch
        self._calls = plan.chain_calls if chain else len(sets)
        self._replays = plan.trips(case, self._calls)
        make = _forward if case.op == "forward" else _backward
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # The graph reads them at each replay, what the forward saved for a backward included.
            self._held = [make(torch, norm, *map(torch.from_dlpack, inputs)) for inputs in sets]

            def run() -> list[Any]:
                if not chain:
                    return [call(head) for call, head in self._held]
                call, head = self._held[0]
                results = call(head)
                for _ in range(self._calls - 1):
                    results = call(results[0])
                return [results]

            for _ in range(_WARM_UPS):
                run()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._results = run()
        with torch.no_grad():
            for result in self._results[0]:
                result.fill_(torch.nan)
        self._graph.replay()
        torch.cuda.synchronize()

    def results(self) -> Sequence[jax.Array]:
        return [jax.numpy.from_dlpack(result.detach()) for result in self._results[0]]

    def sample(self) -> float:
        cuda = self._torch.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self._calls * self._replays)


def _forward(torch: Any, norm: Norm, x: Any, gamma: Any, dy: Any) -> tuple[Callable[..., Any], Any]:
    def call(x: Any) -> tuple[Any]:
        with torch.no_grad():
            return (norm(x, gamma),)

    return call, x


def _backward(
    torch: Any, norm: Norm, x: Any, gamma: Any, dy: Any
) -> tuple[Callable[..., Any], Any]:
    x, gamma = (tensor.detach().requires_grad_() for tensor in (x, gamma))
    y = norm(x, gamma)

    def call(dy: Any) -> Any:
        return torch.autograd.grad(y, (x, gamma), dy, retain_graph=True)

    return call, dy.to(y.dtype)


def _load_eager(case: Case) -> Norm:
    import torch

    return lambda x, gamma: torch.nn.functional.rms_norm(x, (case.hidden,), gamma, EPS)


def _load_compiled(case: Case) -> Norm:
    import torch

    torch.compiler.reset()  # else the shapes of earlier cases would make this one's kernel a dynamic one
    return torch.compile(_load_eager(case), dynamic=False)


def _load_liger(case: Case) -> Norm:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, gamma: LigerRMSNormFunction.apply(x, gamma, EPS, 0.0, "llama", False)


def _load_quack(case: Case) -> Norm:
    from quack.rmsnorm import rmsnorm

    return lambda x, gamma: rmsnorm(x, gamma, eps=EPS)


def _load_flashinfer(case: Case) -> Norm:
    from flashinfer.norm import rmsnorm

    return lambda x, gamma: rmsnorm(x, gamma, EPS)


def _load_cudnn(case: Case) -> Norm:
    from .cudnn_peer import make_norm

    return make_norm(case)


TORCH_PEERS = (
    TorchContender("eager", "torch", _load_eager),
    TorchContender("compile", "torch", _load_compiled),
    TorchContender("liger", "liger_kernel", _load_liger),
    TorchContender("quack", "quack", _load_quack),
    TorchContender("flashinfer", "flashinfer", _load_flashinfer, differentiable=False),
    TorchContender("cudnn", "cudnn", _load_cudnn),
)
