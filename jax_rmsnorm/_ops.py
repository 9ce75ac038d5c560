"""The public functions, and how they differentiate."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from . import _arguments, _reference
from ._compat import align_manual_axes
from ._options import Implementation, Options, Rounding, SMMargin
from ._primitives import backward, forward


def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    normalized_shape: int | Sequence[int] | None = None,
    eps: float = 1e-5,
    zero_centered_gamma: bool = False,
    rounding: Rounding = "once",
    dtype: DTypeLike | None = None,
    sm_margin: int | SMMargin | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    r"""Root mean square layer normalization (https://arxiv.org/abs/1910.07467).

    .. math:: y = x \cdot \mathrm{rsqrt}(\mathrm{mean}(x^2) + \mathrm{eps}) \cdot \gamma

    The mean is over the trailing axes that ``normalized_shape`` names; γ is ``gamma``, or ``1 + gamma`` with
    ``zero_centered_gamma``. The arithmetic is in float32 (float64 if an operand is).

    Differentiable in reverse mode to any order. Forward mode (`jax.jvp`, `jax.jacfwd`) needs ``implementation="xla"``.

    Args:
        x: [..., *normalized_shape], float32, bfloat16 or float16; float64 takes the plain JAX path.
        gamma: [*normalized_shape], of any of these dtypes, whatever x's is; None for γ = 1.
        normalized_shape: the trailing axes' lengths. By default gamma's shape; without gamma, x's last axis.
        eps: added to the mean of squares, in the units of x²; 0 or more.
        zero_centered_gamma: gamma holds γ - 1.
        rounding: "once", at the end; or "before_gamma": the normalized value is rounded to x's dtype and then
            multiplied by γ, as the LLaMA models and ONNX define it.
        dtype: of the result; x's by default.
        sm_margin: streaming multiprocessors that the GPU kernels leave to others, one number or a `SMMargin`. The
            result and x's gradient keep their bits whatever the margin; gamma's gradient is summed in another order.
            None reads the environment variables JAX_RMSNORM_{FORWARD,BACKWARD,INFERENCE}_SM_MARGIN, and where they
            are not set JAX_RMSNORM_SM_MARGIN, when the call is traced.
        implementation: None for the kernel where there is one and plain JAX elsewhere; "kernel" for an error
            elsewhere; "xla" for plain JAX.

    Returns:
        y, of x's shape.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: a shape, a number or a word is not one of the above.
        NotImplementedError: ``implementation="kernel"`` where there is none.
    """
    call = _arguments.check(
        x,
        gamma,
        normalized_shape=normalized_shape,
        eps=eps,
        zero_centered_gamma=zero_centered_gamma,
        rounding=rounding,
        dtype=dtype,
        sm_margin=sm_margin,
        implementation=implementation,
    )
    if call.use_kernel:
        y = _rms_norm(*align_manual_axes(call.x, call.gamma), call.options)
    else:
        y, _ = _reference.forward(call.x, call.gamma, call.options)
    return y.reshape(jnp.shape(x))


# Three functions with a derivative of their own. `_rms_norm` is what users differentiate; the two halves of its
# first derivative, `_forward` and `_backward`, are differentiable in turn by way of the specification: they are
# what `grad` of `grad` sees.


def _inference(x: jax.Array, gamma: jax.Array | None, options: Options) -> jax.Array:
    (y,) = forward(x, gamma, options, save_rrms=False)
    return y


def _rms_norm_fwd(x, gamma, options):
    y, rrms = _forward(x, gamma, options)
    return y, (x, gamma, rrms)


def _rms_norm_bwd(options, residuals, dy):
    x, gamma, rrms = residuals
    return _backward(x, gamma, rrms, dy, options)


def _training(
    x: jax.Array, gamma: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array]:
    y, rrms = forward(x, gamma, options, save_rrms=True)
    return y, rrms


def _forward_fwd(x, gamma, options):
    return _forward(x, gamma, options), (x, gamma)


def _forward_bwd(options, residuals, cotangents):
    _, vjp = jax.vjp(lambda x, gamma: _reference.forward(x, gamma, options), *residuals)
    return vjp(cotangents)


def _backward_fwd(x, gamma, rrms, dy, options):
    return _backward(x, gamma, rrms, dy, options), (x, gamma, rrms, dy)


def _backward_bwd(options, residuals, cotangents):
    _, vjp = jax.vjp(
        lambda x, gamma, rrms, dy: _reference.backward(x, gamma, rrms, dy, options), *residuals
    )
    return vjp(cotangents)


_rms_norm = jax.custom_vjp(_inference, nondiff_argnums=(2,))
_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)
_forward = jax.custom_vjp(_training, nondiff_argnums=(2,))
_forward.defvjp(_forward_fwd, _forward_bwd)
_backward = jax.custom_vjp(backward, nondiff_argnums=(4,))
_backward.defvjp(_backward_fwd, _backward_bwd)
