"""RMSNorm as a Flax linen module, in place of `flax.linen.RMSNorm`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from . import _flax
from ._options import Implementation, Rounding, SMMargin

# Linen wraps each method; through super() the wrapper would run twice in one call, and all that
# hangs on it (captured intermediates, tabulate, interceptors) would see the layer twice.
_flax_call = inspect.unwrap(nn.RMSNorm.__call__)


# Linen names a parameter scope after the class: any other name than Flax's would lose checkpoints.
class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm`, computed by `jax_rmsnorm.rms_norm`.

        y = x · rsqrt(mean(x²) + epsilon) · γ    γ = scale, or 1 + scale with zero_centered_gamma

    As in Flax, x and scale enter in their own dtypes, the arithmetic is in float32, and the one
    rounding is the last, to ``dtype`` or to what x and scale promote to.

    Calls that the kernels do not cover are computed by Flax's own code, with Flax's own result:
    with a ``mask``, an ``axis_name``, ``force_float32_reductions=False``, reduction axes other than
    the last ones, feature axes other than the reduction axes, or an operand that is not float32,
    bfloat16 or float16.

    Attributes, after those of Flax:
        scale_init: initialiser of the scale; by default ones, or zeros with zero_centered_gamma.
        zero_centered_gamma: store γ - 1 instead of γ.
        rounding: "once" at the end, or "before_gamma" as well (the normalised value, to x's dtype).
        sm_margin: streaming multiprocessors that the GPU kernels leave free; see `rms_norm`.
        implementation: None (a kernel where there is one and it pays), "kernel" (an error otherwise) or "xla".
    """

    scale_init: Initializer = _flax.default_scale_init
    zero_centered_gamma: bool = dataclasses.field(default=False, kw_only=True)
    rounding: Rounding = dataclasses.field(default="once", kw_only=True)
    sm_margin: int | SMMargin | None = dataclasses.field(default=None, kw_only=True)
    implementation: Implementation | None = dataclasses.field(default=None, kw_only=True)

    @overload
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: jax.Array | None = None,
        residual: None = None,
        copies: None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: jax.Array | None = None,
        residual: None = None,
        copies: int,
    ) -> tuple[jax.Array, ...]: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: jax.Array | None = None,
        residual: ArrayLike,
        copies: None = None,
    ) -> tuple[jax.Array, jax.Array]: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: jax.Array | None = None,
        residual: ArrayLike,
        copies: int,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]: ...

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: jax.Array | None = None,
        residual: ArrayLike | None = None,
        copies: int | None = None,
    ) -> jax.Array | tuple[jax.Array, ...] | tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
        """Normalises x [..., features], or with a residual h = x + residual.

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
        if self.force_float32_reductions:
            reason = _flax.why_not_covered(self, normalized, self._scale_dtype(), mask)
        else:
            reason = "force_float32_reductions must be True, got False"
        if reason is not None:
            _flax.require_no_options(self, reason)
            flax_norm = functools.partial(_flax_call, self, mask=mask)
            return _flax.normalize_uncovered(flax_norm, array, stream, copies)

        scale = None
        if self.use_scale:
            init = _flax.resolve_scale_init(self.scale_init, self.zero_centered_gamma)
            shape = _flax.normalized_shape(self, normalized)
            scale = jnp.asarray(self.param("scale", init, list(shape), self.param_dtype))
        dtype = dtypes.canonicalize_dtype(normalized, scale, dtype=self.dtype)
        if stream is None:
            return _flax.normalize(self, array, scale, dtype, copies)
        return _flax.add_and_normalize(self, array, stream, scale, dtype, copies)

    def _scale_dtype(self) -> Dtype | None:
        """The dtype the scale has or will get; asking must not create it, as Flax may have to."""
        if not self.use_scale:
            return None
        stored = jax.tree.leaves(self.get_variable("params", "scale"))
        return jnp.result_type(stored[0]) if stored else self.param_dtype
