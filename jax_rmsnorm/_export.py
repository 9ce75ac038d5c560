"""What `jax.export` must be told about the custom calls."""

from jax.export import DisabledSafetyCheck

from . import _ffi

DISABLED_EXPORT_CHECKS: tuple[DisabledSafetyCheck, ...] = tuple(
    DisabledSafetyCheck.custom_call(target) for target in _ffi.TARGETS
)
"""For ``jax.export.export(f, disabled_checks=jax_rmsnorm.DISABLED_EXPORT_CHECKS)``.

`jax.export` refuses custom calls that it does not know to be stable. These are: their operands and attributes change
with the package's major version only.
"""
