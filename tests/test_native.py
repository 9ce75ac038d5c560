"""The native handlers on their own: calls that are right, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsnorm import _ffi

F32, BF16, F16, F64 = jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64
ARITHMETIC = {
    "zero_centered_gamma": np.bool_(False),
    "round_before_gamma": np.bool_(False),
    "sm_margin": np.int64(0),
}


def call(target, operands, results, attributes):
    """The handler, called with anything; operands and results are (dtype, shape)."""
    structs = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in results]
    arrays = [np.ones(shape, dtype) for dtype, *shape in operands]
    # A fresh jit each time: JAX's cache takes np.float32(0) and np.float64(0) for the same attribute.
    out = jax.jit(lambda *a: jax.ffi.ffi_call(target, structs)(*a, **attributes))(*arrays)
    return [np.asarray(array) for array in out]


def with_gradients(gradients: int):
    return {**ARITHMETIC, "gradients": np.int64(gradients)}


def forward(operands, results, **attributes):
    return call(_ffi.FORWARD, operands, results, {"eps": np.float32(0), **ARITHMETIC, **attributes})


def backward(operands, results, gradients=1):
    return call(_ffi.BACKWARD, operands, results, with_gradients(gradients))


def add_forward(operands, results):
    return call(_ffi.ADD_FORWARD, operands, results, {"eps": np.float32(0), **ARITHMETIC})


def add_backward(operands, results, gradients=1):
    return call(_ffi.ADD_BACKWARD, operands, results, with_gradients(gradients))


def rotary(heads: int, interleaved: bool):
    return {**ARITHMETIC, "heads": np.int64(heads), "interleaved": np.bool_(interleaved)}


def rope_forward(operands, results, *, heads=3, interleaved=False):
    attributes = {"eps": np.float32(0), **rotary(heads, interleaved)}
    return call(_ffi.ROPE_FORWARD, operands, results, attributes)


def rope_backward(operands, results, *, heads=3, interleaved=False):
    return call(_ffi.ROPE_BACKWARD, operands, results, rotary(heads, interleaved))


X, GAMMA, ROWS, PARTIALS = (F32, 2, 3, 8), (F32, 8), (F32, 2, 3), (F32, 4, 8)
HALF = (F16, 2, 3, 8)
TABLE = (F32, 2, 3)  # of cos and sin: two positions, six of eight elements rotated


def test_right_calls():
    y, rrms = forward([X, GAMMA], [X, ROWS])
    assert np.all(y == 1)
    assert np.all(rrms == 1)
    assert np.all(forward([X], [X])[0] == 1)
    dx, dgamma, _ = backward([X, ROWS, X, GAMMA], [X, GAMMA, PARTIALS])
    assert np.all(dx == 0)
    assert np.all(dgamma == 6)
    assert np.all(backward([X, ROWS, (F32, 6, 8)], [X])[0] == 0)


def test_right_calls_with_a_sum():
    y, h, rrms = add_forward([X, (BF16, 2, 3, 8), GAMMA], [X, X, ROWS])
    assert np.all(y == 1)
    assert np.all(h == 2)
    assert np.all(rrms == 0.5)
    y, h = add_forward([(BF16, 6, 8), (F32, 6, 8)], [X, (BF16, 6, 8)])
    assert np.all(y == 1)
    assert np.all(h == 2)
    dx, dgamma, _ = add_backward([X, ROWS, X, X, GAMMA], [X, GAMMA, PARTIALS])
    assert np.all(dx == 1)
    assert np.all(dgamma == 6)
    assert np.all(add_backward([X, ROWS, X, X], [X])[0] == 1)


@pytest.mark.parametrize("gradients", [1, 2, 3, 4])
def test_right_calls_with_several_gradients(gradients):
    dys = [(BF16, 2, 3, 8)] * gradients
    dx, dgamma, _ = backward([X, ROWS, *dys, GAMMA], [X, GAMMA, PARTIALS], gradients)
    assert np.all(dx == 0)
    assert np.all(dgamma == 6 * gradients)
    dx, dgamma, _ = add_backward([X, ROWS, X, *dys, GAMMA], [X, GAMMA, PARTIALS], gradients)
    assert np.all(dx == 1)
    assert np.all(dgamma == 6 * gradients)
    assert np.all(add_backward([X, ROWS, X, *dys], [X], gradients)[0] == 1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_right_calls_with_a_rotation(interleaved):
    """With cos = sin = 1 a pair of ones becomes (0, 2), and (2, 0) backward."""
    first = np.array([0, 2, 4] if interleaved else [0, 1, 2])
    second = first + (1 if interleaved else 3)
    turned, turned_back = np.ones(8), np.ones(8)
    turned[first], turned[second] = 0, 2
    turned_back[first], turned_back[second] = 2, 0
    y, rrms = rope_forward([X, TABLE, TABLE, GAMMA], [X, ROWS], interleaved=interleaved)
    assert np.all(y == turned)
    assert np.all(rrms == 1)
    y = rope_forward([X, (BF16, 2, 3), (BF16, 2, 3)], [X], interleaved=interleaved)[0]
    assert np.all(y == turned)
    operands = [X, ROWS, X, TABLE, TABLE, GAMMA]
    dx, dgamma, _ = rope_backward(operands, [X, GAMMA, PARTIALS], interleaved=interleaved)
    assert np.all(dx == turned_back - 1)
    assert np.all(dgamma == 6 * turned_back)
    dx = rope_backward(operands[:-1], [X], interleaved=interleaved)[0]
    assert np.all(dx == turned_back - 1)


def test_rotation_of_nothing():
    """A rotary width of zero, and no rows at all."""
    no_width, no_rows = (F32, 2, 0), (F32, 0, 3, 8)
    assert np.all(rope_forward([X, no_width, no_width], [X])[0] == 1)
    _, dgamma, _ = rope_backward([X, ROWS, X, no_width, no_width, GAMMA], [X, GAMMA, PARTIALS])
    assert np.all(dgamma == 6)
    table = (F32, 0, 3)
    y, rrms = rope_forward([no_rows, table, table, GAMMA], [no_rows, (F32, 0, 3)])
    assert y.shape == (0, 3, 8)
    assert rrms.shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "hidden", "rows_per_task"),
    [(16, 2**16, 1), (64, 2**15, 2), (1600, 2**10, 40), (16, 2**12, 8), (100, 2**6, 100)],
)
def test_partial_rows(rows, hidden, rows_per_task):
    """A task and its partial row for each of few long rows, the square root of their number for many, of short rows
    enough to be worth a task: on any number of threads."""
    x, gamma = (F32, rows, hidden), (F32, hidden)
    tasks = rows // rows_per_task
    _, dgamma, partials = backward([x, (F32, rows), x, gamma], [x, gamma, (F32, tasks, hidden)])
    assert np.all(partials == rows_per_task)
    assert np.all(dgamma == rows)
    _, _, partials = backward([x, (F32, rows), x, gamma], [x, gamma, (F32, rows, hidden)])
    assert np.all(partials[:tasks] == rows_per_task)


FORWARD_ERRORS = [
    ([(F32,), GAMMA], [X], "x must end in an axis of one element or more"),
    ([X, (F32, 7)], [X], "gamma must begin with x's first axes and end in x's last one"),
    ([X, (F32, 9)], [X], "gamma must begin"),
    ([X, (F32,)], [X], "gamma must begin"),
    ([X, (F32, 3, 8)], [X], "gamma must begin"),
    ([X, (F32, 1, 2, 3, 8)], [X], "gamma must begin"),
    ([(jnp.int32, 2, 8)], [(F32, 2, 8)], "x must be float32, bfloat16 or float16"),
    ([X, (jnp.int32, 8)], [X], "gamma must be float32, bfloat16 or float16"),
    ([X], [(jnp.int8, 2, 3, 8)], "y must be float32, bfloat16 or float16"),
    ([HALF], [(BF16, 2, 3, 8)], "y must have x's dtype, or one be float32"),
    ([HALF, (BF16, 8)], [HALF], "gamma must have x's dtype, or one be float32"),
    ([X], [(F32, 2, 3, 7)], "y has 42 elements, expected 48"),
    ([X], [(F32, 2, 3, 9)], "y has 54 elements, expected 48"),
    ([X], [X, (BF16, 2, 3)], "rrms must be float32"),
    ([X], [X, (F32, 5)], "rrms has 5 elements, expected 6"),
]
BACKWARD_ERRORS = [
    ([X, ROWS, (F32, 2, 3, 7)], [X], "dy has 42 elements, expected 48"),
    ([X, (F32, 5), X], [X], "rrms has 5 elements, expected 6"),
    ([X, (BF16, 2, 3), X], [X], "rrms must be float32"),
    ([X, ROWS, (jnp.int32, 2, 3, 8)], [X], "dy must be float32, bfloat16 or float16"),
    ([HALF, ROWS, (BF16, 2, 3, 8)], [HALF], "dy must have x's dtype, or one be float32"),
    ([X, ROWS, X], [(BF16, 2, 3, 8)], "dx must have x's dtype"),
    ([X, ROWS, X], [(F32, 2, 3, 7)], "dx has 42 elements, expected 48"),
    ([X, ROWS, X, (F32, 9)], [X, (F32, 9), PARTIALS], "gamma must begin"),
    ([X, ROWS, X, GAMMA], [X], "with gamma, backward also returns dgamma and partials"),
    ([X, ROWS, X, GAMMA], [X, GAMMA], "with gamma, backward also returns dgamma and partials"),
    ([X, ROWS, X, GAMMA], [X, (BF16, 8), PARTIALS], "dgamma must have gamma's dtype"),
    ([X, ROWS, X, GAMMA], [X, (F32, 7), PARTIALS], "dgamma has 7 elements, expected 8"),
    ([X, ROWS, X, GAMMA], [X, GAMMA, (BF16, 4, 8)], "partials must be float32"),
    ([X, ROWS, X, GAMMA], [X, GAMMA, (F32, 32)], "partials must be"),
    ([X, ROWS, X, GAMMA], [X, GAMMA, (F32, 0, 8)], "partials must be"),
    ([X, ROWS, X, GAMMA], [X, GAMMA, (F32, 4, 7)], "partials has 28 elements, expected 32"),
    ([X, ROWS], [X], "expected 1 dy as the last operands, and gamma or none, got 0 operands"),
    ([X, ROWS, X, GAMMA, GAMMA], [X, GAMMA, PARTIALS], "expected 1 dy .* got 3 operands"),
    ([X], [X], "arguments"),
]
ADD_FORWARD_ERRORS = [
    ([X, (F32, 2, 3, 7)], [X, X], "addend has 42 elements, expected 48"),
    ([X, (F32, 1, 3, 8)], [X, X], "addend has 24 elements, expected 48"),
    ([X, (jnp.int32, 2, 3, 8)], [X, X], "addend must be float32, bfloat16 or float16"),
    ([HALF, (BF16, 2, 3, 8)], [HALF, HALF], "addend must have x's dtype, or one be float32"),
    ([X, X], [X, (F32, 1, 3, 8)], "h has 24 elements, expected 48"),
    ([X, X], [X, (BF16, 2, 3, 8)], "h must have x's dtype"),
    ([X, X], [X, (jnp.int8, 2, 3, 8)], "h must be float32, bfloat16 or float16"),
    ([X, X], [(F32, 2, 3, 7), X], "y has 42 elements, expected 48"),
    ([X, X], [X, X, (F32, 5)], "rrms has 5 elements, expected 6"),
    ([X, X, (F32, 7)], [X, X], "gamma must begin"),
    ([X], [X, X], "arguments"),
    ([X, X], [X], "results"),
]
ADD_BACKWARD_ERRORS = [
    ([X, ROWS, (F32, 1, 3, 8), X], [X], "dh has 24 elements, expected 48"),
    ([X, ROWS, (BF16, 2, 3, 8), X], [X], "dh must have h's dtype"),
    ([X, ROWS, (jnp.int32, 2, 3, 8), X], [X], "dh must be float32, bfloat16 or float16"),
    ([X, ROWS, X, (F32, 1, 3, 8)], [X], "dy has 24 elements, expected 48"),
    ([X, (F32, 5), X, X], [X], "rrms has 5 elements, expected 6"),
    ([X, ROWS, X, X, GAMMA], [X], "with gamma, backward also returns dgamma and partials"),
    ([X, ROWS, X], [X], "expected 1 dy as the last operands, and gamma or none, got 0 operands"),
    ([X, ROWS], [X], "arguments"),
]
# Of the gradients of y, behind x and rrms (with a sum, h, rrms and dh).
GRADIENTS_ERRORS = [
    (2, [X], "expected 2 dy as the last operands, and gamma or none, got 1 operands"),
    (2, [X, X, GAMMA, GAMMA], "expected 2 dy .* got 4 operands"),
    (1, [X, X], "dgamma has 8 elements, expected 48"),
    (3, [X, X, GAMMA], "dy has 8 elements, expected 48"),
    (2, [X, (F32, 2, 3, 7)], "dy has 42 elements, expected 48"),
    (2, [X, (BF16, 2, 3, 8)], "all dy must be of one dtype"),
    (2, [X, (jnp.int32, 2, 3, 8)], "dy must be float32, bfloat16 or float16"),
    (5, [X] * 5, "gradients must be from 1 to 4, got 5"),
    (0, [GAMMA], "gradients must be from 1 to 4, got 0"),
    (-1, [], "gradients must be from 1 to 4, got -1"),
    (2**40, [X], "gradients must be from 1 to 4, got 1099511627776"),
]
# Of cos and sin; x, gamma, y and the gradients are decoded as without them.
ROTARY_ERRORS = [
    ((F32,), (F32,), 3, "cos must end in an axis of at most half"),
    ((F32, 2, 5), (F32, 2, 5), 3, "cos must end in an axis of at most half"),
    ((jnp.int32, 2, 3), (jnp.int32, 2, 3), 3, "cos must be float32, bfloat16 or float16"),
    (TABLE, (jnp.int32, 2, 3), 3, "sin must be float32, bfloat16 or float16"),
    (TABLE, (BF16, 2, 3), 3, "sin must have cos's dtype"),
    (TABLE, (F32, 2, 2), 3, "sin has 4 elements, expected 6"),
    (TABLE, (F32, 1, 3), 3, "sin has 3 elements, expected 6"),
    (TABLE, TABLE, 4, "x's 6 rows must be a multiple of 4 heads at 2 positions"),
    (TABLE, TABLE, 6, "a multiple of 6 heads at 2 positions"),
    (TABLE, TABLE, 0, "a multiple of 0 heads"),
    (TABLE, TABLE, -3, "a multiple of -3 heads"),
    ((F32, 4, 3), (F32, 4, 3), 3, "a multiple of 3 heads at 4 positions"),
    ((F32, 0, 3), (F32, 0, 3), 3, "a multiple of 3 heads at 0 positions"),
]


@pytest.mark.parametrize(("operands", "results", "message"), FORWARD_ERRORS)
def test_forward_refuses(operands, results, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        forward(operands, results)


@pytest.mark.parametrize(("operands", "results", "message"), BACKWARD_ERRORS)
def test_backward_refuses(operands, results, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        backward(operands, results)


@pytest.mark.parametrize(("operands", "results", "message"), ADD_FORWARD_ERRORS)
def test_add_forward_refuses(operands, results, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        add_forward(operands, results)


@pytest.mark.parametrize(("operands", "results", "message"), ADD_BACKWARD_ERRORS)
def test_add_backward_refuses(operands, results, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        add_backward(operands, results)


@pytest.mark.parametrize(("gradients", "rest", "message"), GRADIENTS_ERRORS)
def test_gradients_are_counted(gradients, rest, message):
    results = [X, GAMMA, PARTIALS]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        backward([X, ROWS, *rest], results, gradients)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        add_backward([X, ROWS, X, *rest], results, gradients)


@pytest.mark.parametrize(("cos", "sin", "heads", "message"), ROTARY_ERRORS)
def test_rope_refuses(cos, sin, heads, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        rope_forward([X, cos, sin, GAMMA], [X], heads=heads)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        rope_backward([X, ROWS, X, cos, sin], [X], heads=heads)


def test_rope_refuses_what_the_norm_does():
    with pytest.raises(jax.errors.JaxRuntimeError, match="y has 42 elements, expected 48"):
        rope_forward([X, TABLE, TABLE], [(F32, 2, 3, 7)])
    with pytest.raises(jax.errors.JaxRuntimeError, match="dy has 42 elements, expected 48"):
        rope_backward([X, ROWS, (F32, 2, 3, 7), TABLE, TABLE], [X])
    with pytest.raises(jax.errors.JaxRuntimeError, match="arguments"):
        rope_forward([X, TABLE], [X])


@pytest.mark.parametrize("attribute", [{"eps": 0.0}, {"sm_margin": np.int32(0)}], ids=str)
def test_attributes_are_strictly_typed(attribute):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Wrong scalar data type"):
        forward([X], [X], **attribute)


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(jax.errors.JaxRuntimeError, match="x must be float32"):
        forward([(F64, 2, 8)], [(F64, 2, 8)])
