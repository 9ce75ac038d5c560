"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from . import _arguments, _autodiff, _reference, _types
from ._arguments import Settings
from ._options import Implementation, Rounding, SMMargin, Summand


@overload
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    copies: None = None,
    **options: Unpack[Settings],
) -> jax.Array: ...


@overload
def rms_norm(
    x: ArrayLike, gamma: ArrayLike | None = None, *, copies: int, **options: Unpack[Settings]
) -> tuple[jax.Array, ...]: ...


def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    copies: int | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    eps: float = 1e-5,
    zero_centered_gamma: bool = False,
    rounding: Rounding = "once",
    dtype: DTypeLike | None = None,
    sm_margin: int | SMMargin | None = None,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    r"""Root mean square layer normalization (https://arxiv.org/abs/1910.07467).

    .. math:: y = x \cdot \mathrm{rsqrt}(\mathrm{mean}(x^2) + \mathrm{eps}) \cdot \gamma

    The mean is over the trailing axes that ``normalized_shape`` names; γ is ``gamma``, or ``1 + gamma`` with
    ``zero_centered_gamma``. The arithmetic is in float32 (float64 if an operand is).

    Differentiable in reverse mode to any order. Forward mode (`jax.jvp`, `jax.jacfwd`) needs ``implementation="xla"``.

    Args:
        x: [..., *normalized_shape], float32, bfloat16 or float16; float64 takes the plain JAX path.
        gamma: [*normalized_shape], of any of these dtypes, whatever x's is; None for γ = 1.
        copies: return y that many times in a tuple, one for each place that reads it. They are one array; what differs
            is the backward, which reads the gradient of each and adds them up in float32, where JAX would add them up
            in a pass of its own and round to y's dtype. A kernel reads up to four; of more, or of rows that the CUDA
            kernels do not fuse for, the sum is made in front of it, unrounded too. In a program for several devices
            they are added up as JAX would, so that sums over devices that they may hold are made at once.
        normalized_shape: the trailing axes' lengths. By default gamma's shape; without gamma, x's last axis.
        eps: added to the mean of squares, in the units of x²; 0 or more.
        zero_centered_gamma: gamma holds γ - 1.
        rounding: "once", at the end; or "before_gamma": the normalized value is rounded to x's dtype and then
            multiplied by γ, as the LLaMA models and ONNX define it.
        dtype: of the result; x's by default.
        sm_margin: streaming multiprocessors that the GPU kernels leave to others, one number or a `SMMargin`. The
            result and x's gradient keep their bits whatever the margin; gamma's gradient is summed in another order.
            None reads the environment variables JAX_RMSNORM_{FORWARD,BACKWARD,INFERENCE}_SM_MARGIN, and where they
            are not set JAX_RMSNORM_SM_MARGIN, when the call is traced. Plain JAX leaves none free.
        implementation: None for the kernel where there is one and it pays (a GPU takes plain JAX for few elements,
            see docs/performance.md) and plain JAX elsewhere; "kernel" for the kernel at any size and an error
            elsewhere; "xla" for plain JAX.

    Returns:
        y, of x's shape; with ``copies`` a tuple of as many.

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
    number = _arguments.check_copies(copies)
    rows, weight = _types.align(call.x, call.gamma)
    if call.use_kernel:
        ys = _autodiff.rms_norm(call.options, number or 1, rows, weight)
    else:
        *ys, _ = _reference.forward(rows, weight, call.options, number or 1)
    return _results(ys, jnp.shape(x), number)


def _results(
    ys: Sequence[jax.Array], shape: tuple[int, ...], copies: int | None
) -> jax.Array | tuple[jax.Array, ...]:
    shaped = tuple(y.reshape(shape) for y in ys)
    return shaped[0] if copies is None else shaped


@overload
def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    copies: None = None,
    overwrite: Summand | None = None,
    **options: Unpack[Settings],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    copies: int,
    overwrite: Summand | None = None,
    **options: Unpack[Settings],
) -> tuple[tuple[jax.Array, ...], jax.Array]: ...


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    copies: int | None = None,
    overwrite: Summand | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    eps: float = 1e-5,
    zero_centered_gamma: bool = False,
    rounding: Rounding = "once",
    dtype: DTypeLike | None = None,
    sm_margin: int | SMMargin | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
    r"""A residual connection and the RMSNorm of its sum, in one pass over memory.

    .. math:: h = x + \mathrm{residual} \qquad y = \mathrm{rms\_norm}(h)

    The sum is taken in float32 (float64 if a summand is), rounded once to residual's dtype, and y is the norm of the
    rounded h, so that the two results belong together. The backward reads h, which the model keeps anyway, and the
    gradients of both results, and writes the one gradient that serves x and residual, in residual's dtype: x's is
    rounded to that first where x's own is wider.

    Args:
        x: [..., *normalized_shape], what a block adds to the residual stream; dtypes as in `rms_norm`.
        residual: of x's shape and any of these dtypes: the residual stream. Its dtype is h's.
        gamma, normalized_shape, eps, zero_centered_gamma, sm_margin, implementation: as in `rms_norm`.
        copies: of y, as in `rms_norm`: ((y, ..., y), h) is returned.
        overwrite: "residual" or, where it has residual's dtype, "x": the kernel writes h to its buffer, which
            spares memory, and a copy where h is to be there, as in a donated argument. No value changes: an operand
            that is read elsewhere too, or is an argument that was not donated, is copied first. In a training step
            something often reads it, a gradient; so by default h has a buffer of its own. Without effect in plain JAX,
            also where that stands in for a kernel, and on a GPU for rows that do not begin at multiples of 16 bytes.
        rounding: as in `rms_norm` of h: "before_gamma" rounds to h's dtype.
        dtype: of y; x's by default.

    Returns:
        y and h, of x's shape; with ``copies`` a tuple of as many y, and h.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `rms_norm`; ValueError too where x and residual are of
            different shapes, or x, to be overwritten, of another dtype.
    """
    call, residual = _arguments.check_add(
        x,
        residual,
        gamma,
        overwrite=overwrite,
        normalized_shape=normalized_shape,
        eps=eps,
        zero_centered_gamma=zero_centered_gamma,
        rounding=rounding,
        dtype=dtype,
        sm_margin=sm_margin,
        implementation=implementation,
    )
    number = _arguments.check_copies(copies)
    stream, addend, weight = _types.align_sum(residual, call.x, call.gamma)
    if call.use_kernel:
        ys, h = _autodiff.add_rms_norm(
            call.options, number or 1, addend.dtype, stream, addend, weight
        )
    else:
        *ys, h, _ = _reference.add_forward(stream, addend, weight, call.options, number or 1)
    return _results(ys, jnp.shape(x), number), h.reshape(jnp.shape(x))


def rms_norm_rope(
    x: ArrayLike,
    gamma: ArrayLike | None,
    cos: ArrayLike,
    sin: ArrayLike,
    *,
    interleaved: bool = False,
    normalized_shape: int | Sequence[int] | None = None,
    eps: float = 1e-5,
    zero_centered_gamma: bool = False,
    rounding: Rounding = "once",
    dtype: DTypeLike | None = None,
    sm_margin: int | SMMargin | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    r"""RMSNorm of each head of query or key, and the rotary embedding (https://arxiv.org/abs/2104.09864) of the result.

    .. math:: (a, b) \mapsto (a \cos - b \sin, \; b \cos + a \sin)

    for the pairs (a, b) = (v[i], v[i + R/2]), i < R/2, of each v = rms_norm(x), or with ``interleaved`` (v[2 i],
    v[2 i + 1]). Elements from R on are normalized and not rotated. The arithmetic is in float32 (float64 if an operand
    is), with one rounding at the end. The gradients of cos and sin are exact; plain JAX computes them, where they
    are asked for.

    Args:
        x: [..., T, N, D], N heads at each of T positions; dtypes as in `rms_norm`.
        gamma: [D], or None for γ = 1.
        cos: [..., T, R/2], R ≤ D. The leading axes broadcast against x's, and there may be fewer of them. Heads share
            their position's; the kernels read them so, without a copy for each head.
        sin: of cos's shape and dtype.
        interleaved: which elements make a pair.
        normalized_shape: x's last axis, the only one that there is to name.
        eps, zero_centered_gamma, dtype, sm_margin, implementation: as in `rms_norm`.
        rounding: as in `rms_norm`, whose γ comes before the rotation.

    Returns:
        y, of x's shape.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `rms_norm`; ValueError too where the shapes do not fit.
    """
    call, cos, sin = _arguments.check_rope(
        x,
        gamma,
        cos,
        sin,
        interleaved=interleaved,
        normalized_shape=normalized_shape,
        eps=eps,
        zero_centered_gamma=zero_centered_gamma,
        rounding=rounding,
        dtype=dtype,
        sm_margin=sm_margin,
        implementation=implementation,
    )
    heads, weight, *tables = _types.align(call.x, call.gamma, cos, sin)
    if call.use_kernel:
        return _autodiff.rms_norm_rope(call.options, heads, weight, *tables)
    y, _ = _reference.rope_forward(heads, weight, tables[0], tables[1], call.options)
    return y
