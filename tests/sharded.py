"""What the tests of sharded arrays share: programs of a forward and its gradients, on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rmsnorm import add_rms_norm, rms_norm, rms_norm_rope

AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)


def put(mesh: jax.sharding.Mesh, array: Any, *spec: Any) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def norm_gradients(x, gamma, dy, **options):
    y, vjp = jax.vjp(lambda x, gamma: rms_norm(x, gamma, **options), x, gamma)
    return y, *vjp(dy)


def add_gradients(x, residual, gamma, dy, dh):
    (y, h), vjp = jax.vjp(add_rms_norm, x, residual, gamma)
    dx, dresidual, dgamma = vjp((dy, dh.astype(h.dtype)))
    return y, h, dx, dresidual, dgamma


def rope_gradients(q, gamma, cos, sin, dy):
    y, vjp = jax.vjp(lambda q, gamma: rms_norm_rope(q, gamma, cos, sin), q, gamma)
    return y, *vjp(dy)


def compile_on(mesh: jax.sharding.Mesh, f: Any, *arguments: jax.Array) -> Any:
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*arguments).compile()


def assert_gradients(dx, dgamma, want: oracle.Result) -> None:
    oracle.assert_close(dx, want.dx, terms=want.dx_terms, what="dx")
    oracle.assert_close(dgamma, want.dgamma, terms=want.dgamma_terms, what="dgamma")
