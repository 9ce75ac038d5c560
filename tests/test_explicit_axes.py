"""Operands whose types say that they are sharded in different ways, over mesh axes of type Explicit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest
from checks import draw, needs_8_devices
from compare import assert_near
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_rmsnorm import DISABLED_EXPORT_CHECKS, add_rms_norm, rms_norm, rms_norm_rope

pytestmark = needs_8_devices
F32 = jnp.float32
SHAPE = (8, 16, 64)
X, RESIDUAL = draw(0, SHAPE, F32), draw(1, SHAPE, F32)
GAMMA = draw(2, (64,), F32, offset=1.0)
Q = draw(3, (8, 16, 4, 8), F32)
COS, SIN = draw(4, (16, 4), F32), draw(5, (16, 4), F32)
GAMMA_Q = draw(6, (8,), F32, offset=1.0)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [None, "xla"])


@pytest.fixture(autouse=True)
def mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def put(array: jax.Array, *spec: Any) -> jax.Array:
    return jax.device_put(array, P(*spec))


def spec(array: jax.Array) -> tuple[Any, ...]:
    return tuple(jax.typeof(array).sharding.spec)


def total(f, *operands: jax.Array) -> jax.Array:
    return sum(jnp.sum(jnp.sin(result)) for result in jax.tree.leaves(f(*operands)))


def curvature(f, *operands: jax.Array) -> jax.Array:
    """Depends on second derivatives."""
    slopes = jax.grad(functools.partial(total, f), range(len(operands)))(*operands)
    return sum(jnp.sum(jnp.sin(slope)) for slope in slopes)


def check_gradients(f, operands, plain) -> None:
    """First and second derivatives: values as without sharding, each in its own operand's."""
    first, second = (
        jax.grad(functools.partial(loss, f), range(len(operands))) for loss in (total, curvature)
    )
    for run, slopes in (
        (first, first),
        (jax.jit(first), first),
        (jax.jit(second), jax.jit(second)),
    ):
        actual = run(*operands)
        assert_near(actual, slopes(*plain), 1e-4)  # sums of thousands, added up in other orders
        assert [spec(slope) for slope in actual] == [spec(operand) for operand in operands]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("x_spec", "residual_spec", "sum_spec"),
    [
        (("data",), (), ("data", None, None)),
        ((), ("data",), ("data", None, None)),
        ((None, "model"), ("data",), ("data", "model", None)),
        (("data",), ("data", None, "model"), ("data", None, "model")),
    ],
    ids=str,
)
def test_summands(x_spec, residual_spec, sum_spec, implementation):
    """Those of a sum are sharded as `jax.numpy` has it."""
    norm = functools.partial(add_rms_norm, implementation=implementation)
    operands = put(X, *x_spec), put(RESIDUAL, *residual_spec), put(GAMMA)
    assert spec(operands[0] + operands[1]) == sum_spec
    assert [spec(result) for result in norm(*operands)] == [sum_spec] * 2
    check_gradients(norm, operands, (X, RESIDUAL, GAMMA))


def test_summands_that_do_not_go_together():
    """`jax.numpy`'s error."""
    with pytest.raises(Exception, match="add got incompatible shardings for broadcasting"):
        add_rms_norm(put(X, "data"), put(RESIDUAL, "model"), put(GAMMA))


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("x_spec", "gamma_spec"),
    [
        (("data",), ("data",)),
        (("data",), ("model",)),
        (("data", None, "model"), ()),
        ((), ("model",)),
    ],
    ids=str,
)
def test_gamma(x_spec, gamma_spec, implementation):
    """As of parameters that are kept in parts, or are not where features are."""
    norm = functools.partial(rms_norm, implementation=implementation)
    operands = put(X, *x_spec), put(GAMMA, *gamma_spec)
    assert spec(norm(*operands)) == spec(operands[0])
    check_gradients(norm, operands, (X, GAMMA))


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("x_spec", "table_spec"),
    [
        (("data",), ("model",)),
        (("data", "model"), ()),
        (("data", None, "model"), ("data",)),
        ((None, "data"), (None, "model")),
    ],
    ids=str,
)
def test_tables(x_spec, table_spec, implementation):
    operands = put(Q, *x_spec), put(GAMMA_Q), put(COS, *table_spec), put(SIN, *table_spec)
    norm = functools.partial(rms_norm_rope, implementation=implementation)
    assert spec(norm(*operands)) == spec(operands[0])
    check_gradients(norm, operands, (Q, GAMMA_Q, COS, SIN))
    slope = jax.grad(functools.partial(total, norm))  # of x alone
    assert_near([slope(*operands)], [slope(Q, GAMMA_Q, COS, SIN)])


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0)], ids=str)
def test_vmap(in_axes):
    """Over an axis that is sharded: what does not have it is repeated on each device, and so are the results."""
    arrays = [
        array if axis == 0 else array[0] for array, axis in zip((X, RESIDUAL), in_axes, strict=True)
    ]
    operands = [
        put(a, "data") if axis == 0 else put(a) for a, axis in zip(arrays, in_axes, strict=True)
    ]
    f = jax.vmap(functools.partial(add_rms_norm, gamma=None), in_axes)
    for results in (f(*operands), jax.jit(f)(*operands)):
        assert [spec(result) for result in results] == [("data", None, None)] * 2
        assert_near(results, f(*arrays))


def test_export():
    """With a gamma that is kept in parts along the axis that rows are sharded over."""
    operands = put(X, "data"), put(GAMMA, "data")
    slopes = jax.jit(jax.grad(functools.partial(total, rms_norm), (0, 1)))
    exported = jax.export.export(slopes, disabled_checks=DISABLED_EXPORT_CHECKS)(*operands)
    assert_near(jax.jit(exported.call)(*operands), slopes(X, GAMMA))


def test_kernels_for_parts_of_rows_are_refused_when_traced():
    """The types say where rows are; of other mesh axes the compiler finds out."""
    operands = put(X, "data", None, ("model",)), put(GAMMA)
    for norm in (rms_norm, lambda x, *a, **options: add_rms_norm(x, x, *a, **options)):
        with pytest.raises(NotImplementedError, match="normalized axis sharded over model"):
            jax.eval_shape(functools.partial(norm, implementation="kernel"), *operands)
    heads = put(Q, None, None, None, "model"), put(GAMMA_Q), put(COS), put(SIN)
    y = jax.jit(functools.partial(rms_norm_rope, implementation="kernel"))(*heads)  # gathered
    assert_near([y], [rms_norm_rope(Q, GAMMA_Q, COS, SIN)])
