"""Higher derivatives of rms_norm against float64, numerical checks of gradients, and forward mode."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import draw
from compare import assert_near, in_float64
from jax.test_util import check_grads

from jax_rmsnorm import rms_norm

X, GAMMA = draw(0, (3, 5), jnp.float32), draw(1, (5,), jnp.float32, scale=0.5, offset=1.0)
WEIGHTS, DIRECTION = draw(2, (3, 5), jnp.float32), draw(3, (3, 5), jnp.float32)
OPTIONS = [{}, {"rounding": "before_gamma"}, {"zero_centered_gamma": True, "eps": 0.1}]


def loss(x, gamma, **options):
    y = rms_norm(x, gamma, **options)
    return jnp.sum(jnp.sin(y) * WEIGHTS.astype(y.dtype))


def grad_of_grad(x, gamma, **options):
    y_dtype = options.get("dtype", x.dtype)

    def slope(x, gamma):
        dx, dgamma = jax.grad(loss, (0, 1))(x, gamma, **options)
        dx, dgamma = dx.astype(y_dtype), dgamma.astype(y_dtype)
        return jnp.vdot(DIRECTION.astype(y_dtype), dx) + jnp.sum(jnp.cos(dgamma))

    return jax.grad(slope, (0, 1))(x, gamma)


def hessian(x, gamma, **options):
    return jax.jacrev(jax.grad(loss, (0, 1)), (0, 1))(x, gamma, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("derivative", [grad_of_grad, hessian])
def test_second_order(derivative, options):
    derivative = functools.partial(derivative, **options)
    actual = jax.jit(functools.partial(derivative, implementation="kernel"))(X, GAMMA)
    assert_near(actual, in_float64(derivative, X, GAMMA))


def test_third_order():
    def derivative(x, gamma, **options):
        return jax.grad(lambda x: jnp.sum(jnp.sin(grad_of_grad(x, gamma, **options)[0])))(x)

    actual = jax.jit(functools.partial(derivative, implementation="kernel"))(X, GAMMA)
    assert_near(actual, in_float64(derivative, X, GAMMA), 1e-4)


def test_grad_of_grad_without_gamma():
    def derivative(x, **options):
        slope = jax.grad(lambda x: jnp.vdot(WEIGHTS.astype(x.dtype), rms_norm(x, **options)))
        return jax.grad(lambda x: jnp.vdot(DIRECTION.astype(x.dtype), slope(x)))(x)

    actual = derivative(X, implementation="kernel")
    assert_near(actual, in_float64(derivative, X), 1e-4)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16")], ids=str)
def test_grad_of_grad_in_half_precision(dtypes):
    x, gamma = X.astype(dtypes[0]), GAMMA.astype(dtypes[1])
    derivative = functools.partial(grad_of_grad, dtype=jnp.float32, implementation="kernel")
    actual = jax.jit(derivative)(x, gamma)
    assert [a.dtype for a in actual] == [jnp.dtype(dtype) for dtype in dtypes]
    expected = in_float64(grad_of_grad, x, gamma)
    assert_near(actual, expected, 4 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes))


def test_jacobian_of_the_kernel():
    jacobian = jax.jacrev(functools.partial(rms_norm, implementation="kernel"), (0, 1))
    assert_near(jacobian(X, GAMMA), in_float64(jax.jacrev(rms_norm, (0, 1)), X, GAMMA))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gamma", [None, GAMMA], ids=["no gamma", "gamma"])
def test_numerical_gradients_in_float32(gamma, options):
    if gamma is None:
        options = {**options, "zero_centered_gamma": False}
    norm = functools.partial(rms_norm, implementation="kernel", **options)
    arguments = (X,) if gamma is None else (X, gamma)
    check_grads(norm, arguments, order=2, modes=["rev"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_numerical_gradients_in_float64(implementation, options):
    norm = functools.partial(rms_norm, implementation=implementation, **options)
    with jax.enable_x64(True):
        arguments = np.asarray(X, np.float64), np.asarray(GAMMA, np.float64)
        check_grads(norm, arguments, order=2, modes=["fwd", "rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.hessian])
def test_forward_mode_of_the_kernel_raises(transform):
    with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp"):
        transform(rms_norm)(X)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_mode_in_plain_jax(options):
    """Its directional derivative pairs with a cotangent as the kernel's gradients do."""
    norm = functools.partial(rms_norm, **options)
    plain = functools.partial(norm, implementation="xla")
    _, tangent = jax.jvp(plain, (X, GAMMA), (DIRECTION, GAMMA))
    _, vjp = jax.vjp(norm, X, GAMMA)
    dx, dgamma = vjp(WEIGHTS)
    assert_near(jnp.vdot(WEIGHTS, tangent), jnp.vdot(dx, DIRECTION) + jnp.vdot(dgamma, GAMMA))


def test_hessian_in_plain_jax():
    def cube(x, implementation):
        return jnp.sum(rms_norm(x, GAMMA, implementation=implementation) ** 3)

    expected = jax.jit(jax.jacrev(jax.grad(cube)), static_argnums=1)(X, "kernel")
    actual = jax.jit(jax.hessian(cube), static_argnums=1)(X, "xla")
    assert_near(actual, expected, 1e-4)
