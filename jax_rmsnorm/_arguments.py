"""Checks of the public functions' arguments, all at trace time, and their defaults."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Collection, Sequence, Set
from typing import Any, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike, DTypeLike

from ._compat import is_static_dim
from ._margin import check_margin
from ._options import Implementation, Options, Rounding, SMMargin, Summand
from ._partitioning import why_no_kernel_for_parts
from ._primitives.common import KERNEL_DTYPES
from ._types import hidden_axes

_DTYPES = (*KERNEL_DTYPES, np.dtype(np.float64))
_MOST_HIDDEN = 2**30  # columns are counted in 32 bits
_DTYPE_NAMES = "float32, bfloat16, float16 or float64"


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked call: one normalized axis, x's last, and gamma of its length."""

    x: jax.Array
    gamma: jax.Array | None
    options: Options
    use_kernel: bool


class Settings(TypedDict, total=False):
    """What all public functions take by keyword."""

    normalized_shape: int | Sequence[int] | None
    eps: float
    zero_centered_gamma: bool
    rounding: Rounding
    dtype: DTypeLike | None
    sm_margin: int | SMMargin | None
    implementation: Implementation | None


def check(
    x: ArrayLike,
    gamma: ArrayLike | None,
    *,
    normalized_shape: int | Sequence[int] | None,
    eps: float,
    zero_centered_gamma: bool,
    rounding: Rounding,
    dtype: DTypeLike | None,
    sm_margin: int | SMMargin | None,
    implementation: Implementation | None,
    interleaved: bool = False,
    overwrite: Summand | None = None,
    beside: Collection[np.dtype] = (),
    heads: Any = 1,
    gathers_rows: bool = False,
) -> Call:
    """Checks and normalizes the arguments of `rms_norm`; its docstring says what they may be.

    ``beside`` are the dtypes of other operands that a kernel would have to take; ``gathers_rows`` says that rows of
    which each device has a part are no reason for there being none.
    """
    x = _to_array("x", x)
    gamma = None if gamma is None else _to_array("gamma", gamma)
    shape = _normalized_shape(x, gamma, normalized_shape)
    check_words(rounding, implementation)
    if _check_bool("zero_centered_gamma", zero_centered_gamma) and gamma is None:
        raise ValueError("zero_centered_gamma=True needs a gamma, got gamma=None")
    out_dtype = x.dtype if dtype is None else _result_dtype(dtype)
    options = Options(
        eps=_check_eps(eps),
        zero_centered_gamma=bool(zero_centered_gamma),
        rounding=rounding,
        out_dtype=out_dtype,
        sm_margin=check_margin(sm_margin),
        require_kernel=implementation == "kernel",
        interleaved=_check_bool("interleaved", interleaved),
        overwrite=overwrite,
    )
    hidden = math.prod(shape)
    dtypes = {x.dtype, out_dtype, *beside, *(() if gamma is None else (gamma.dtype,))}
    reason = _why_no_kernel(dtypes, hidden, heads)
    if options.require_kernel and reason is not None:
        raise NotImplementedError(
            f"implementation='kernel': {reason}. Use implementation=None or 'xla'."
        )
    x = x.reshape(*x.shape[: x.ndim - len(shape)], hidden)
    if options.require_kernel and not gathers_rows and (axes := hidden_axes(x)):
        raise NotImplementedError(why_no_kernel_for_parts(axes))
    return Call(
        x=x,
        gamma=None if gamma is None else gamma.reshape(hidden),
        options=options,
        use_kernel=implementation != "xla" and reason is None,
    )


def check_add(
    x: ArrayLike,
    residual: ArrayLike,
    gamma: ArrayLike | None,
    *,
    overwrite: Summand | None,
    **settings: Unpack[Settings],
) -> tuple[Call, jax.Array]:
    """As `check`, for `add_rms_norm`. Returns residual too, in the shape of the call's x."""
    x, residual = check_summands(x, residual)
    _check_word("overwrite", overwrite, (None, *get_args(Summand)))
    if overwrite == "x" and x.dtype != residual.dtype:
        raise ValueError(
            f"overwrite='x' needs an x of h's dtype, which is residual's, {residual.dtype}; got {x.dtype}"
        )
    call = check(x, gamma, overwrite=overwrite, beside=(residual.dtype,), **settings)
    return call, residual.reshape(call.x.shape)


def check_summands(x: ArrayLike, residual: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns both as arrays."""
    x, residual = _to_array("x", x), _to_array("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {x.shape}, got {residual.shape}")
    return x, residual


def check_words(rounding: Any, implementation: Any) -> None:
    """Raises unless these options are among the words for them."""
    _check_word("rounding", rounding, get_args(Rounding))
    _check_word("implementation", implementation, (None, *get_args(Implementation)))


def check_rope(
    x: ArrayLike,
    gamma: ArrayLike | None,
    cos: ArrayLike,
    sin: ArrayLike,
    *,
    interleaved: bool,
    **settings: Unpack[Settings],
) -> tuple[Call, jax.Array, jax.Array]:
    """As `check`, for `rms_norm_rope`. Returns cos and sin too, [*P, R/2] with P the last of x's axes up to T."""
    x, cos, sin = _to_array("x", x), _to_array("cos", cos), _to_array("sin", sin)
    if x.ndim < 3:
        raise ValueError(f"x must be [..., T, N, D], of three axes or more, got shape {x.shape}")
    _check_tables(x, cos, sin)
    *_, heads, _ = x.shape
    call = check(
        x,
        gamma,
        beside=(cos.dtype,),
        heads=heads,
        gathers_rows=True,
        interleaved=interleaved,
        **settings,
    )
    if call.x.ndim != x.ndim:
        raise ValueError(
            "rms_norm_rope normalizes x's last axis alone: gamma and normalized_shape must have one axis"
        )
    return call, _without_ones(cos, x), _without_ones(sin, x)


def _check_tables(x: jax.Array, cos: jax.Array, sin: jax.Array) -> None:
    if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
        raise ValueError(
            f"sin must have the shape and dtype of cos, {cos.shape} and {cos.dtype}, "
            f"got {sin.shape} and {sin.dtype}"
        )
    *rows, _, hidden = x.shape
    if not 2 <= cos.ndim <= x.ndim - 1:
        raise ValueError(
            f"cos and sin must be [..., T, R/2], of 2 to {x.ndim - 1} axes for x of shape {x.shape}, got {cos.shape}"
        )
    *leading, length, half = cos.shape
    shared = rows[len(rows) - 1 - len(leading) : -1]
    if length != rows[-1] or any(
        size not in (1, full) for size, full in zip(leading, shared, strict=True)
    ):
        raise ValueError(
            "cos and sin must be [..., T, R/2] with T and, where they are not 1, the axes before it as in x's "
            f"[..., T, N, D]: got {cos.shape} for x of shape {x.shape}"
        )
    if half == 0 or (is_static_dim(half) and is_static_dim(hidden) and 2 * half > hidden):
        raise ValueError(
            f"cos and sin must end in half the rotary width, from 1 to {hidden // 2} for x's last axis of {hidden}, "
            f"got {half}"
        )


def _without_ones(table: jax.Array, x: jax.Array) -> jax.Array:
    """[*P, R/2] with P the last of x's axes up to T, and as few of them as possible."""
    *leading, _, half = table.shape
    ones = next((i for i, size in enumerate(leading) if size != 1), len(leading))
    table = table.reshape(table.shape[ones:])
    return jnp.broadcast_to(table, (*x.shape[x.ndim - table.ndim - 1 : -2], half))


def _why_no_kernel(dtypes: Set[np.dtype], hidden: Any, heads: Any) -> str | None:
    if not dtypes <= KERNEL_DTYPES:
        names = ", ".join(sorted(map(str, dtypes)))
        return f"the kernels take float32, bfloat16 and float16, got {names}"
    if is_static_dim(hidden) and hidden > _MOST_HIDDEN:
        return f"the kernels normalize up to {_MOST_HIDDEN} elements, got {hidden}"
    if not is_static_dim(heads):
        return f"the kernels need a number of heads that is known at trace time, got {heads}"
    return None


def check_copies(copies: Any) -> int | None:
    """How many times y is returned in a tuple; None for y alone."""
    if copies is None:
        return None
    try:
        number = _to_length(copies)
    except TypeError:
        raise TypeError(
            f"copies must be None or an int known at trace time, got {type(copies).__name__}: {copies!r}"
        ) from None
    if number < 1:
        raise ValueError(f"copies must be 1 or more, or None for y without a tuple, got {copies!r}")
    return number


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return bool(value)


def _to_array(name: str, value: Any) -> jax.Array:
    if not isinstance(value, jax.Array) and hasattr(value, "__jax_array__"):  # a Flax variable, say
        value = value.__jax_array__()
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be {_DTYPE_NAMES}, got {value.dtype}. Cast it with {name}.astype(jax.numpy.float32)."
        )
    return jnp.asarray(value)


def _normalized_shape(
    x: jax.Array, gamma: jax.Array | None, wanted: int | Sequence[int] | None
) -> tuple[int, ...]:
    if wanted is not None:
        shape = _to_shape(wanted)
        source = f"normalized_shape={shape}"
        if gamma is not None and gamma.shape != shape:
            raise ValueError(
                f"gamma must have the shape normalized_shape={shape}, got {gamma.shape}"
            )
    elif gamma is not None:
        shape, source = gamma.shape, f"gamma of shape {gamma.shape}"
    else:
        shape, source = x.shape[-1:], "no gamma and no normalized_shape"
    if not shape:
        raise ValueError(
            f"at least one axis must be normalized, got {source} and x of shape {x.shape}"
        )
    if len(shape) > x.ndim or x.shape[x.ndim - len(shape) :] != shape:
        raise ValueError(
            f"x must end in the normalized axes {shape} ({source}), got x of shape {x.shape}"
        )
    if 0 in shape:
        raise ValueError(
            f"the normalized axes must have at least one element, got {shape} ({source})"
        )
    return shape


def _to_shape(value: int | Sequence[int]) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    try:
        return tuple(v if is_symbolic_dim(v) else _to_length(v) for v in values)
    except TypeError:
        raise TypeError(
            f"normalized_shape must be an int or a sequence of ints, got {value!r}"
        ) from None


def _to_length(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _check_word(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if not any(value is word or (isinstance(value, str) and value == word) for word in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_eps(eps: Any) -> float:
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real | np.floating | np.integer):
        raise TypeError(
            f"eps must be a number known at trace time, got {type(eps).__name__}: {eps!r}"
        )
    try:
        value = float(eps)
    except OverflowError:
        value = math.inf
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise ValueError(f"eps must be finite in float32 and 0 or more, got {eps!r}")
    return value


def _result_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        result = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        result = None
    if result is None or result not in _DTYPES:  # None alone would compare equal to float64
        raise TypeError(f"dtype must be {_DTYPE_NAMES}, got {dtype!r}")
    return result
