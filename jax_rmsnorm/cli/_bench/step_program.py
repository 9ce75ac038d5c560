"""The compiled training step, and what can be read off it without running it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .._layout import ONE_DEVICE, Layout
from . import step_model, step_norms
from .step_config import Config

CHECKED_STEPS = 4
_LEARNING_RATE = (
    0.5  # over d_model: with Adam's first steps, all about ±1, logits then move alike at any width
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(r"\bcalls=%?([\w.-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_PRODUCT = re.compile(r" dot\(")


class State(NamedTuple):
    params: step_model.Params
    optimizer: optax.OptState


class Memory(NamedTuple):
    """Bytes that a step holds at once, as the compiler plans them; ``alias`` counts results in donated arguments."""

    argument: int
    output: int
    alias: int
    temp: int

    @property
    def peak(self) -> int:
        return self.argument + self.output - self.alias + self.temp


class Program(NamedTuple):
    """One implementation's step, compiled.

    Attributes:
        step: (state, data) to the next state and the loss; the state is donated.
        compile_seconds: how long tracing and compiling took.
        memory: what the step needs.
        norm_kernels: names of XLA's kernels that compute a norm or a part of one.
    """

    step: Callable[[State, step_model.Data], tuple[State, jax.Array]]
    compile_seconds: float
    memory: Memory
    norm_kernels: frozenset[str]


def _optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW whose learning rate is zero after the steps whose losses are compared.

    It works as before but no longer moves the parameters, so that however many steps are timed and whatever the norms
    are, the numbers stay of the size that they have in training: a GPU's clock depends on them.
    """

    def schedule(count: Any) -> jax.Array:
        return jnp.where(count < CHECKED_STEPS, _LEARNING_RATE / config.d_model, 0.0)

    return optax.adamw(schedule, b2=0.95, weight_decay=0.1)


def initial_state(config: Config, layout: Layout = ONE_DEVICE) -> State:
    """Parameters and optimizer state before the first step: the same for every implementation."""
    params = step_model.init(config)
    if config.forward:
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params
        )
        state = State(params, optax.EmptyState())
    else:
        state = State(params, _optimizer(config).init(params))
    return jax.device_put(state, layout.shardings(state))


def draw(config: Config, layout: Layout = ONE_DEVICE) -> step_model.Data:
    """The data of every step."""
    return jax.device_put(step_model.draw(config), _data_shardings(layout))


def _data_shardings(layout: Layout) -> Any:
    if layout.mesh is None:
        return None
    shardings: Any = {field: NamedSharding(layout.mesh, P()) for field in step_model.Data._fields}
    return step_model.Data(**shardings | {"tokens": layout.windows})


def compile_step(config: Config, norms: step_norms.Norms, layout: Layout = ONE_DEVICE) -> Program:
    """Compiles the step of a model with these norms."""
    optimizer = _optimizer(config)

    def forward(state: State, data: step_model.Data) -> tuple[State, jax.Array]:
        return state, step_model.loss(state.params, data, config, norms, layout)

    def step(state: State, data: step_model.Data) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(step_model.loss)(
            state.params, data, config, norms, layout
        )
        updates, after = optimizer.update(gradients, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, after), loss

    state = jax.eval_shape(lambda: initial_state(config))
    data = jax.eval_shape(lambda: step_model.draw(config))
    jitted = jax.jit(
        forward if config.forward else step,
        donate_argnums=0,
        in_shardings=(layout.shardings(state), _data_shardings(layout)),
        out_shardings=(layout.shardings(state), None),
    )
    began = time.perf_counter()
    compiled = jitted.lower(state, data).compile()
    seconds = time.perf_counter() - began
    hlo = compiled.as_text()
    assert hlo is not None
    return Program(compiled, seconds, _memory(compiled), norm_kernels(hlo, step_norms.SCOPE))


def _memory(compiled: Any) -> Memory:
    analysis = compiled.memory_analysis()
    return Memory(*(getattr(analysis, f"{part}_size_in_bytes") for part in Memory._fields))


class _Instruction(NamedTuple):
    name: str
    computation: str
    calls: str | None
    in_scope: bool


def norm_kernels(hlo: str, scope: str) -> frozenset[str]:
    """Kernels that XLA makes for instructions of the named scope or for fusions that contain any, by their names.

    A fusion with a matrix product in it is left out: its time is the product's.
    """
    instructions: list[_Instruction] = []
    products: set[str] = set()
    computation = ""
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start[1]
        elif instruction := _INSTRUCTION.match(line):
            calls, op_name = _CALLED.search(line), _OP_NAME.search(line)
            in_scope = op_name is not None and scope in op_name[1]
            instructions.append(
                _Instruction(instruction[1], computation, calls and calls[1], in_scope)
            )
            if _PRODUCT.search(line):
                products.add(computation)
    marked = {one.computation for one in instructions if one.in_scope}
    called = {one.calls for one in instructions}
    return frozenset(
        re.sub(r"\W", "_", one.name)
        for one in instructions
        if one.computation not in called
        and (one.in_scope or one.calls in marked)
        and one.calls not in products
    )
