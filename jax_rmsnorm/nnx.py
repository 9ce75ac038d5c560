"""RMSNorm as a Flax nnx module, in place of `flax.nnx.RMSNorm`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from . import _flax
from ._options import Implementation, Rounding, SMMargin


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm`, computed by `jax_rmsnorm.rms_norm`.

        y = x · rsqrt(mean(x²) + epsilon) · γ    γ = scale, or 1 + scale with zero_centered_gamma

    As in Flax, x and scale are first brought to one dtype (``dtype``, or what the two promote to),
    which is also y's; the arithmetic is in float32. With a residual, the norm is taken of the sum as it is,
    in the residual's dtype.

    Calls that the kernels do not cover are computed by Flax's own code, with Flax's own result:
    with a ``mask``, an ``axis_name``, a ``promote_dtype`` of your own, reduction axes other than
    the last ones, feature axes other than the reduction axes, or an operand that is not float32,
    bfloat16 or float16.

    Attributes:
        scale: the parameter [num_features] in ``param_dtype``, or None without ``use_scale``.

    Args:
        num_features: length of the normalised axis (the product of several).
        epsilon: added to the mean square.
        dtype: dtype of the arithmetic's operands and of the result; None promotes x and scale.
        param_dtype: dtype of the parameter.
        use_scale: whether there is a scale.
        scale_init: its initialiser; by default ones, or zeros with ``zero_centered_gamma``.
        reduction_axes: axes of the mean.
        feature_axes: axes of the scale.
        axis_name: mapped axis over which the mean is taken as well.
        axis_index_groups: groups of indices within ``axis_name``.
        use_fast_variance: accepted for Flax's sake; without meaning for an RMS.
        promote_dtype: brings ``(x, scale)`` to one dtype.
        rngs: random number streams for the initialiser.
        scale_metadata: metadata of the scale's `nnx.Param`.
        zero_centered_gamma: store γ - 1 instead of γ.
        rounding: "once" at the end, or "before_gamma" as well (the normalised value, to x's dtype).
        sm_margin: streaming multiprocessors that the GPU kernels leave free; see `rms_norm`.
        implementation: None (a kernel where there is one and it pays), "kernel" (an error otherwise) or "xla".
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = _flax.default_scale_init,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        zero_centered_gamma: bool = False,
        rounding: Rounding = "once",
        sm_margin: int | SMMargin | None = None,
        implementation: Implementation | None = None,
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_scale=use_scale,
            scale_init=_flax.resolve_scale_init(scale_init, zero_centered_gamma),
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            scale_metadata=scale_metadata,
        )
        self.zero_centered_gamma = zero_centered_gamma
        self.rounding: Rounding = rounding
        self.sm_margin = sm_margin
        self.implementation: Implementation | None = implementation

    @overload
    def __call__(
        self,
        x: ArrayLike,
        mask: jax.Array | None = None,
        *,
        residual: None = None,
        copies: None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        mask: jax.Array | None = None,
        *,
        residual: None = None,
        copies: int,
    ) -> tuple[jax.Array, ...]: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        mask: jax.Array | None = None,
        *,
        residual: ArrayLike,
        copies: None = None,
    ) -> tuple[jax.Array, jax.Array]: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        mask: jax.Array | None = None,
        *,
        residual: ArrayLike,
        copies: int,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]: ...

    def __call__(
        self,
        x: ArrayLike,
        mask: jax.Array | None = None,
        *,
        residual: ArrayLike | None = None,
        copies: int | None = None,
    ) -> jax.Array | tuple[jax.Array, ...] | tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
        """Normalises x [..., num_features], or with a residual h = x + residual.

        Args:
            x: the input.
            mask: booleans that broadcast against x: the entries that count in the mean.
            residual: of x's shape; the sum is rounded to its dtype, in one pass with the norm.
            copies: return y that many times in a tuple, one for each place that reads it: see `rms_norm`.

        Returns:
            y, of the shape of x, or with copies (y, ..., y); with a residual a pair of that and h.

        Raises:
            ValueError: ``zero_centered_gamma``, ``rounding="before_gamma"`` or
                ``implementation="kernel"`` in a call that only Flax's own code covers.
        """
        array = jnp.asarray(x)
        stream = None if residual is None else jnp.asarray(residual)
        normalized = array if stream is None else stream
        scale = None if self.scale is None else self.scale[...]
        if self.promote_dtype is not dtypes.promote_dtype:
            reason = f"promote_dtype must be Flax's default, got {self.promote_dtype!r}"
        else:
            scale_dtype = None if scale is None else jnp.result_type(scale)
            reason = _flax.why_not_covered(self, normalized, scale_dtype, mask)
        if reason is not None:
            _flax.require_no_options(self, reason)
            flax_norm = functools.partial(super().__call__, mask=mask)
            return _flax.normalize_uncovered(flax_norm, array, stream, copies)
        normalized, scale = self.promote_dtype((normalized, scale), dtype=self.dtype)
        if stream is None:
            return _flax.normalize(self, normalized, scale, normalized.dtype, copies)
        return _flax.add_and_normalize(self, array, stream, scale, normalized.dtype, copies)
