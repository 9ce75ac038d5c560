"""How the operations differentiate where they are kernels.

Each operation has a derivative of its own, made of its forward and its backward kernel. These are differentiable in
turn, by way of the specification: they are what `grad` of `grad` sees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from . import _primitives, _reference
from ._options import Options


def _differentiable(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Any:
    """``kernel`` with the derivative of ``reference``; both take the options last, and the result takes them first."""

    def run(options: Options, *arrays: jax.Array | None) -> Any:
        return tuple(kernel(*arrays, options))

    def fwd(options, *arrays):
        return differentiable(options, *arrays), arrays

    def bwd(options, arrays, cotangents):
        _, vjp = jax.vjp(lambda *arrays: reference(*arrays, options), *arrays)
        return vjp(cotangents)

    differentiable = jax.custom_vjp(run, nondiff_argnums=(0,))
    differentiable.defvjp(fwd, bwd)
    return differentiable


_forward = _differentiable(
    functools.partial(_primitives.forward, save_rrms=True), _reference.forward
)
_backward = _differentiable(_primitives.backward, _reference.backward)
_add_forward = _differentiable(
    functools.partial(_primitives.add_forward, save_rrms=True), _reference.add_forward
)
_add_backward = _differentiable(_primitives.add_backward, _reference.add_backward)
_rope_forward = _differentiable(
    functools.partial(_primitives.rope_forward, save_rrms=True), _reference.rope_forward
)
_rope_backward = _differentiable(_primitives.rope_backward, _reference.rope_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A value among residuals that is known when a derivative is traced."""

    value: bool


def _name(results, *names):
    """For policies of `jax.checkpoint`, which save or offload by name what is a residual here or of y's readers."""
    return [
        checkpoint_name(result, f"rms_norm_{name}")
        for result, name in zip(results, names, strict=True)
    ]


def _asked_for(gradients):
    # A gradient that nobody asked of a result is known to be zero, and not read from memory.
    return tuple(dy for dy in gradients if not isinstance(dy, SymbolicZero))


def _rms_norm(
    options: Options, copies: int, x: jax.Array, gamma: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Returns y ``copies`` times: one array, whose gradients come one for each."""
    (y,) = _primitives.forward(x, gamma, options, save_rrms=False)
    return (y,) * copies


def _rms_norm_fwd(options, copies, *primals):
    x, gamma = custom_vjp_primal_tree_values(primals)
    y, rrms = _name(_forward(options, x, gamma), "y", "rrms")
    return (y,) * copies, (x, gamma, rrms)


def _rms_norm_bwd(options, copies, residuals, dys):
    x, gamma, rrms = residuals
    return _backward(options, x, gamma, rrms, _asked_for(dys))


def _add_rms_norm(
    options: Options,
    copies: int,
    addend_dtype: np.dtype,
    x: jax.Array,
    addend: jax.Array,
    gamma: jax.Array | None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns y ``copies`` times, and h = x + addend, which has x's dtype."""
    y, h = _primitives.add_forward(x, addend, gamma, options, save_rrms=False)
    return (y,) * copies, h


def _add_rms_norm_fwd(options, copies, addend_dtype, *primals):
    x, addend, gamma = custom_vjp_primal_tree_values(primals)
    y, h, rrms = _name(_add_forward(options, x, addend, gamma), "y", "h", "rrms")
    return ((y,) * copies, h), (h, gamma, rrms)


def _add_rms_norm_bwd(options, copies, addend_dtype, residuals, cotangents):
    h, gamma, rrms = residuals
    dys, dh = cotangents
    dys = _asked_for(dys)
    if not dys:
        dx, dgamma = dh, None
    elif isinstance(dh, SymbolicZero):
        dx, dgamma = _backward(options, h, gamma, rrms, dys)
    else:
        dx, dgamma = _add_backward(options, h, gamma, rrms, dys, dh)
    return dx, dx.astype(addend_dtype), dgamma


def _rms_norm_rope(
    options: Options, x: jax.Array, gamma: jax.Array | None, cos: jax.Array, sin: jax.Array
) -> jax.Array:
    (y,) = _primitives.rope_forward(x, gamma, cos, sin, options, save_rrms=False)
    return y


def _rms_norm_rope_fwd(options, *primals):
    x, gamma, cos, sin = custom_vjp_primal_tree_values(primals)
    y, rrms = _name(_rope_forward(options, x, gamma, cos, sin), "y", "rrms")
    *_, cos_primal, sin_primal = primals
    ask_for_tables = _Static(cos_primal.perturbed or sin_primal.perturbed)
    return y, (x, gamma, rrms, cos, sin, ask_for_tables)


def _rms_norm_rope_bwd(options, residuals, dy):
    x, gamma, rrms, cos, sin, ask_for_tables = residuals
    dx, dgamma = _rope_backward(options, x, gamma, rrms, dy, cos, sin)
    if not ask_for_tables.value:
        return dx, dgamma, None, None
    return dx, dgamma, *_table_gradients(options, x, gamma, cos, sin, dy)


@functools.partial(jax.jit, static_argnums=0)
def _table_gradients(options, x, gamma, cos, sin, dy):
    """dcos and dsin, which have no kernel: seldom does anybody ask for them."""

    def rope(cos, sin):
        y, _ = _reference.rope_forward(x, gamma, cos, sin, options)
        return y

    _, vjp = jax.vjp(rope, cos, sin)
    return vjp(dy)


def _with_vjp(f: Callable[..., Any], fwd: Any, bwd: Any, *, static: tuple[int, ...]) -> Any:
    """``f`` with its derivative, which learns what gradients nobody asked for."""
    differentiable = jax.custom_vjp(f, nondiff_argnums=static)
    differentiable.defvjp(fwd, bwd, symbolic_zeros=True)
    jitted = jax.jit(differentiable, static_argnums=static, inline=True)

    def call(*arguments: Any) -> Any:
        # A `jax.shard_map` that is not itself within `jax.jit` does not take a custom_vjp with symbolic zeros.
        in_shard_map = jax.sharding.get_abstract_mesh().manual_axes
        return jitted(*arguments) if in_shard_map else differentiable(*arguments)

    return call


rms_norm = _with_vjp(_rms_norm, _rms_norm_fwd, _rms_norm_bwd, static=(0, 1))
add_rms_norm = _with_vjp(_add_rms_norm, _add_rms_norm_fwd, _add_rms_norm_bwd, static=(0, 1, 2))
rms_norm_rope = _with_vjp(_rms_norm_rope, _rms_norm_rope_fwd, _rms_norm_rope_bwd, static=(0,))
