"""The native handlers on their own: what they refuse, and each instruction set that this machine has."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsnorm import _cpu, _ffi

F32, BF16, F64 = jnp.float32, jnp.bfloat16, jnp.float64
ARITHMETIC = {
    "zero_centered_gamma": np.bool_(False),
    "round_before_gamma": np.bool_(False),
    "sm_margin": np.int64(0),
}


def call(target, operands, results, attributes):
    """The handler, called with anything; operands and results are (dtype, shape)."""
    structs = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in results]
    arrays = [jnp.ones(shape, dtype) for dtype, *shape in operands]
    # A fresh jit each time: JAX's cache takes np.float32(0) and np.float64(0) for the same attribute.
    out = jax.jit(lambda *a: jax.ffi.ffi_call(target, structs)(*a, **attributes))(*arrays)
    return [np.asarray(array) for array in out]


def forward(operands, results, **attributes):
    return call(_ffi.FORWARD, operands, results, {"eps": np.float32(0), **ARITHMETIC, **attributes})


def backward(operands, results, **attributes):
    return call(_ffi.BACKWARD, operands, results, {**ARITHMETIC, **attributes})


X, GAMMA, ROWS, PARTIALS = (F32, 2, 3, 8), (F32, 8), (F32, 2, 3), (F32, 4, 8)


def test_right_calls():
    y, rrms = forward([X, GAMMA], [X, ROWS])
    assert np.all(y == 1)
    assert np.all(rrms == 1)
    assert np.all(forward([X], [X])[0] == 1)
    dx, dgamma, _ = backward([X, ROWS, X, GAMMA], [X, GAMMA, PARTIALS])
    assert np.all(dx == 0)
    assert np.all(dgamma == 6)
    assert np.all(backward([X, ROWS, (F32, 6, 8)], [X])[0] == 0)


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
    ([X, ROWS], [X], "arguments"),
]


@pytest.mark.parametrize(("operands", "results", "message"), FORWARD_ERRORS)
def test_forward_refuses(operands, results, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        forward(operands, results)


@pytest.mark.parametrize(("operands", "results", "message"), BACKWARD_ERRORS)
def test_backward_refuses(operands, results, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        backward(operands, results)


@pytest.mark.parametrize("attribute", [{"eps": 0.0}, {"sm_margin": np.int32(0)}], ids=str)
def test_attributes_are_strictly_typed(attribute):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Wrong scalar data type"):
        forward([X], [X], **attribute)


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(jax.errors.JaxRuntimeError, match="x must be float32"):
        forward([(F64, 2, 8)], [(F64, 2, 8)])


def run(arguments: list[str], instruction_set: str) -> str:
    """Standard output of this Python with another instruction set."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_RMSNORM_CPU_ISA": instruction_set}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_instruction_sets():
    names = _cpu.instruction_sets()
    assert names[-1] == "baseline"
    assert set(names) <= {"avx512", "avx2", "baseline"}
    wanted = os.environ.get("JAX_RMSNORM_CPU_ISA")
    assert _cpu.active_instruction_set() == (wanted if wanted in names else names[0])


@pytest.mark.parametrize("name", [*_cpu.instruction_sets(), "none such"])
def test_choice_of_instruction_set(name):
    code = "from jax_rmsnorm import _cpu; print(_cpu.active_instruction_set())"
    available = _cpu.instruction_sets()
    assert run(["-c", code], name).strip() == (name if name in available else available[0])


@pytest.mark.parametrize(
    "name", [n for n in _cpu.instruction_sets() if n != _cpu.active_instruction_set()]
)
def test_values_on_other_instruction_sets(name):
    """The tests of values that this process runs on the best one."""
    files = ["test_conversions.py", "test_special_values.py", "test_values.py"]
    run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *files],
        name,
    )
