"""Checks of the public functions' arguments, all at trace time, and their defaults."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import os
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike, DTypeLike

from ._compat import is_static_dim
from ._options import Implementation, Options, Rounding, SMMargin
from ._primitives.common import KERNEL_DTYPES

_DTYPES = (*KERNEL_DTYPES, np.dtype(np.float64))
_MOST_HIDDEN = 2**30  # columns are counted in 32 bits
_MOST_MARGIN = 2**16 - 1  # SMs; no GPU has as many
_DTYPE_NAMES = "float32, bfloat16, float16 or float64"


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked call: one normalized axis, x's last, and gamma of its length."""

    x: jax.Array
    gamma: jax.Array | None
    options: Options
    use_kernel: bool


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
) -> Call:
    """Checks and normalizes the arguments of `rms_norm`; its docstring says what they may be."""
    x = _to_array("x", x)
    gamma = None if gamma is None else _to_array("gamma", gamma)
    shape = _normalized_shape(x, gamma, normalized_shape)
    _check_word("rounding", rounding, get_args(Rounding))
    _check_word("implementation", implementation, (None, *get_args(Implementation)))
    if not isinstance(zero_centered_gamma, bool | np.bool_):
        raise TypeError(f"zero_centered_gamma must be a bool, got {zero_centered_gamma!r}")
    if zero_centered_gamma and gamma is None:
        raise ValueError("zero_centered_gamma=True needs a gamma, got gamma=None")
    out_dtype = x.dtype if dtype is None else _result_dtype(dtype)
    options = Options(
        eps=_check_eps(eps),
        zero_centered_gamma=bool(zero_centered_gamma),
        rounding=rounding,
        out_dtype=out_dtype,
        sm_margin=_check_margin(sm_margin),
        require_kernel=implementation == "kernel",
    )
    dtypes = {x.dtype, out_dtype, *(() if gamma is None else (gamma.dtype,))}
    if options.require_kernel and not dtypes <= KERNEL_DTYPES:
        raise NotImplementedError(
            "implementation='kernel': the kernels take float32, bfloat16 and float16, got "
            f"{', '.join(sorted(map(str, dtypes)))}. Use implementation=None or 'xla' for float64."
        )
    leading = x.shape[: x.ndim - len(shape)]
    hidden = math.prod(shape)
    fits = not is_static_dim(hidden) or hidden <= _MOST_HIDDEN
    if options.require_kernel and not fits:
        raise NotImplementedError(
            f"implementation='kernel': the kernels normalize up to {_MOST_HIDDEN} elements, got {hidden}. "
            "Use implementation=None or 'xla'."
        )
    return Call(
        x=x.reshape(*leading, hidden),
        gamma=None if gamma is None else gamma.reshape(hidden),
        options=options,
        use_kernel=implementation != "xla" and dtypes <= KERNEL_DTYPES and fits,
    )


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


def _check_margin(margin: Any) -> SMMargin:
    if margin is None:
        margin = SMMargin(
            forward=_margin_from_environment("FORWARD"),
            backward=_margin_from_environment("BACKWARD"),
            inference=_margin_from_environment("INFERENCE"),
        )
    elif not isinstance(margin, SMMargin):
        margin = SMMargin(margin, margin, margin)
    values = dataclasses.asdict(margin)
    for kind, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"sm_margin must be an int or an SMMargin of ints, got {kind}={value!r}"
            )
        if value < 0:
            raise ValueError(f"sm_margin must be 0 or more, got {kind}={value}")
        if value > _MOST_MARGIN:
            raise ValueError(f"sm_margin must be {_MOST_MARGIN} or less, got {kind}={value}")
    if any(values.values()) and (count := _sm_count()) is not None:
        for kind, value in values.items():
            if value >= count:
                raise ValueError(
                    f"sm_margin must leave at least one of the device's {count} SMs, got {kind}={value}"
                )
    return SMMargin(**{kind: int(value) for kind, value in values.items()})


def _margin_from_environment(kind: str) -> int:
    for name in (f"JAX_RMSNORM_{kind}_SM_MARGIN", "JAX_RMSNORM_SM_MARGIN"):
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.strip().isdecimal():
            raise ValueError(
                f"environment variable {name} must be an int of 0 or more, got {text!r}"
            )
        return int(text)
    return 0


def _sm_count() -> int | None:
    """SMs of the smallest local GPU; None where JAX's default backend is no GPU."""
    if jax.default_backend() != "gpu":
        return None
    return min((device.core_count for device in jax.local_devices()), default=None)
