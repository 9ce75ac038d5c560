"""The norm as two graphs of cuDNN's Python frontend, behind PyTorch's autograd."""

# None of these packages is a dependency, not even of the tests.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cudnn
import torch

from .inputs import EPS
from .shapes import Case

_DTYPES = {
    torch.float32: cudnn.data_type.FLOAT,
    torch.bfloat16: cudnn.data_type.BFLOAT16,
    torch.float16: cudnn.data_type.HALF,
}


class _Graph:
    """A cuDNN graph under construction, later built, whose tensors are PyTorch's by name."""

    def __init__(self) -> None:
        self._handle = cudnn.create_handle()
        self.graph = cudnn.pygraph(
            handle=self._handle,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        self._nodes: dict[str, Any] = {}

    def operand(self, name: str, like: torch.Tensor, **options: Any) -> Any:
        node = self.graph.tensor(
            name=name,
            dim=list(like.shape),
            stride=list(like.stride()),
            data_type=_DTYPES[like.dtype],
            **options,
        )
        self._nodes[name] = node
        return node

    def result(self, name: str, node: Any, dtype: torch.dtype) -> None:
        node.set_output(True).set_data_type(_DTYPES[dtype])
        self._nodes[name] = node

    def build(self) -> None:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()

    def run(self, tensors: Mapping[str, torch.Tensor]) -> None:
        size = max(self.graph.get_workspace_size(), 1)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = {self._nodes[name]: tensor for name, tensor in tensors.items()}
        self.graph.execute(pack, workspace, handle=self._handle)


def _four_axes(vector: torch.Tensor) -> torch.Tensor:
    """[rows, hidden] or [hidden] as [rows or 1, hidden, 1, 1]."""
    return vector.reshape(-1, vector.shape[-1], 1, 1)


def make_norm(case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The norm of x [rows, hidden] and gamma [hidden]; both graphs are built at its first calls."""
    eps = torch.full((1, 1, 1, 1), EPS, dtype=torch.float32)
    graphs: dict[str, _Graph] = {}

    def forward_graph(x: torch.Tensor, gamma: torch.Tensor) -> _Graph:
        if "forward" not in graphs:
            built = graphs["forward"] = _Graph()
            y, rrms = built.graph.rmsnorm(
                norm_forward_phase=cudnn.norm_forward_phase.TRAINING,
                input=built.operand("x", x),
                scale=built.operand("gamma", gamma),
                epsilon=built.operand("eps", eps, is_pass_by_value=True),
            )
            built.result("y", y, x.dtype)
            built.result("rrms", rrms, torch.float32)
            built.build()
        return graphs["forward"]

    def backward_graph(
        dy: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, rrms: torch.Tensor
    ) -> _Graph:
        if "backward" not in graphs:
            built = graphs["backward"] = _Graph()
            dx, dgamma, _ = built.graph.rmsnorm_backward(
                grad=built.operand("dy", dy),
                input=built.operand("x", x),
                scale=built.operand("gamma", gamma),
                inv_variance=built.operand("rrms", rrms),
                has_dbias=False,
            )
            built.result("dx", dx, x.dtype)
            built.result("dgamma", dgamma, gamma.dtype)
            built.build()
        return graphs["backward"]

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
            x4, gamma4 = _four_axes(x), _four_axes(gamma)
            y = torch.empty_like(x4)
            rrms = torch.empty((case.rows, 1, 1, 1), dtype=torch.float32, device=x.device)
            tensors = {"x": x4, "gamma": gamma4, "eps": eps, "y": y, "rrms": rrms}
            forward_graph(x4, gamma4).run(tensors)
            ctx.save_for_backward(x4, gamma4, rrms)
            return y.reshape(x.shape)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, gamma, rrms = ctx.saved_tensors
            dy = _four_axes(dy)
            dx, dgamma = torch.empty_like(x), torch.empty_like(gamma)
            operands = {"dy": dy, "x": x, "gamma": gamma, "rrms": rrms}
            graph = backward_graph(dy, x, gamma, rrms)
            graph.run({**operands, "dx": dx, "dgamma": dgamma})
            return dx.reshape(case.shape), dgamma.reshape(case.hidden)

    return Norm.apply
