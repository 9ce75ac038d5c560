"""What the two Flax modules share: which calls `rms_norm` covers, and what becomes of the others.

A call that is not covered is computed by Flax's own code, with Flax's own result. If the module
carries an option that Flax's code does not know, such a call is an error instead.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.typing import Axes, Dtype, Initializer
from jax.nn import initializers
from jax.typing import DTypeLike

from . import _reference
from ._arguments import check_copies, check_summands, check_words
from ._margin import check_margin
from ._ops import add_rms_norm, rms_norm
from ._primitives.common import KERNEL_DTYPES

_OPTIONS_FLAX_LACKS = {
    "zero_centered_gamma": (False,),
    "rounding": ("once",),
    "implementation": (None, "xla"),
}


class RMSNormModule(Protocol):
    """The attributes that nnx and linen modules have in common."""

    epsilon: Any
    dtype: Any
    use_scale: Any
    reduction_axes: Any
    feature_axes: Any
    axis_name: Any
    zero_centered_gamma: Any
    rounding: Any
    sm_margin: Any
    implementation: Any


def default_scale_init(
    key: jax.Array, shape: Iterable[int], dtype: Dtype = jnp.float32
) -> jax.Array:
    """Flax's default as an object of its own, which tells it from ``ones`` given explicitly."""
    return initializers.ones(key, tuple(shape), dtype)


def resolve_scale_init(scale_init: Initializer, zero_centered_gamma: bool) -> Initializer:
    """The initialiser to use: the default makes γ = 1 either way, any other is taken as it is."""
    if zero_centered_gamma and scale_init is default_scale_init:
        return initializers.zeros
    return scale_init


def _positive_axes(rank: int, axes: Axes) -> set[int]:
    axes = axes if isinstance(axes, Iterable) else (axes,)
    return {axis + rank if axis < 0 else axis for axis in axes}


def normalized_shape(module: RMSNormModule, x: jax.Array) -> tuple[int, ...]:
    """The lengths of the reduction axes, for a covered call also the shape of the scale."""
    return x.shape[-len(_positive_axes(x.ndim, module.reduction_axes)) :]


def why_not_covered(
    module: RMSNormModule, x: jax.Array, scale_dtype: DTypeLike | None, mask: object
) -> str | None:
    """Says what in this call is beyond `rms_norm`: "argument must be …, got …"; None if nothing is.

    Args:
        module: the module that is called.
        x: its input, [..., *normalized].
        scale_dtype: the dtype of the stored scale; None without scale.
        mask: the mask of the call, if any.
    """
    if mask is not None:
        return "mask must be None, got one"
    if module.axis_name is not None:
        return f"axis_name must be None, got {module.axis_name!r}"
    if not isinstance(module.epsilon, numbers.Real):
        return f"epsilon must be a number, got {type(module.epsilon).__name__}"

    axes = _positive_axes(x.ndim, module.reduction_axes)
    if not axes or axes != set(range(x.ndim)[-len(axes) :]):
        return (
            f"reduction_axes must be the last axes of x, which has shape {x.shape}, "
            f"got {module.reduction_axes}"
        )
    if module.use_scale and axes != _positive_axes(x.ndim, module.feature_axes):
        return (
            f"feature_axes must be the same as reduction_axes={module.reduction_axes}, "
            f"got {module.feature_axes}"
        )
    if 0 in normalized_shape(module, x):
        return f"x must not be empty along reduction_axes={module.reduction_axes}, got {x.shape}"

    for name, dtype in {"x": x.dtype, "scale": scale_dtype, "dtype": module.dtype}.items():
        if dtype is not None and jnp.dtype(dtype) not in KERNEL_DTYPES:
            return f"{name} must be float32, bfloat16 or float16, got {jnp.dtype(dtype).name}"
    return None


def require_no_options(module: RMSNormModule, reason: str) -> None:
    """Raises unless Flax's own code can honour every option of a module whose call is not covered.

    Raises:
        ValueError: an option is set that only `rms_norm` has, ``reason`` being `why_not_covered`'s; or is not one that
            `rms_norm` knows either.
    """
    check_words(module.rounding, module.implementation)
    check_margin(module.sm_margin)
    for name, honoured in _OPTIONS_FLAX_LACKS.items():
        value = getattr(module, name)
        if value not in honoured:
            raise ValueError(
                f"RMSNorm with {name}={value!r} does not cover this call: {reason}. "
                f"Change that, or leave {name} at {honoured[0]!r} to have Flax's own RMSNorm."
            )


def normalize(
    module: RMSNormModule,
    x: jax.Array,
    scale: jax.Array | None,
    dtype: DTypeLike,
    copies: int | None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Calls `rms_norm` with the options of ``module``, for a call that is covered."""
    return rms_norm(x, _gamma(module, x, scale), copies=copies, **_options(module, x, dtype))


def add_and_normalize(
    module: RMSNormModule,
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None,
    dtype: DTypeLike,
    copies: int | None,
) -> tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
    """Calls `add_rms_norm` likewise."""
    gamma = _gamma(module, residual, scale)
    return add_rms_norm(x, residual, gamma, copies=copies, **_options(module, residual, dtype))


def normalize_uncovered(
    flax_norm: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    residual: jax.Array | None,
    copies: int | None,
) -> jax.Array | tuple[jax.Array, ...] | tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
    """What the functions would return, in a call that they do not cover: of Flax's own norm."""
    number = check_copies(copies)
    h = x
    if residual is not None:
        x, residual = check_summands(x, residual)
        h = _reference.add(residual, x).astype(residual.dtype)
    y = flax_norm(h)
    result = y if number is None else (y,) * number
    return result if residual is None else (result, h)


def _gamma(module: RMSNormModule, x: jax.Array, scale: jax.Array | None) -> jax.Array | None:
    return None if scale is None else scale.reshape(normalized_shape(module, x))


def _options(module: RMSNormModule, x: jax.Array, dtype: DTypeLike) -> dict[str, Any]:
    return {
        "normalized_shape": normalized_shape(module, x),
        "eps": float(module.epsilon),
        "zero_centered_gamma": module.zero_centered_gamma,
        "rounding": module.rounding,
        "dtype": dtype,
        "sm_margin": module.sm_margin,
        "implementation": module.implementation,
    }
