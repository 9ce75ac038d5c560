"""The SM margin: where it comes from, its limits, and the part that each kind of call hands its kernel."""

from __future__ import annotations

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsnorm import SMMargin, rms_norm

X = jnp.ones((2, 4))
BOTH = "JAX_RMSNORM_SM_MARGIN"
FORWARD, BACKWARD, INFERENCE = (
    f"JAX_RMSNORM_{kind}_SM_MARGIN" for kind in ("FORWARD", "BACKWARD", "INFERENCE")
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (BOTH, FORWARD, BACKWARD, INFERENCE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as the check of the margin looks at them."""
    devices = [types.SimpleNamespace(core_count=count) for count in (144, 132)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


def in_custom_calls(sm_margin) -> list[int]:
    """As the kernels get them: of a differentiated call's forward and backward, and of an inference call."""

    def norm(x):
        return rms_norm(x, sm_margin=sm_margin)

    programs = (lambda x: jax.vjp(norm, x)[1](x), norm)
    text = "".join(jax.jit(program).lower(X).as_text() for program in programs)
    return [int(found) for found in re.findall(r"sm_margin = (\d+) : i64", text)]


@pytest.mark.parametrize(
    ("sm_margin", "expected"),
    [
        (None, [0, 0, 0]),
        (7, [7, 7, 7]),
        (np.int32(7), [7, 7, 7]),
        (SMMargin(), [0, 0, 0]),
        (SMMargin(1, 2, 3), [1, 2, 3]),
        (SMMargin(backward=np.int64(2)), [0, 2, 0]),
    ],
)
def test_argument(sm_margin, expected):
    assert in_custom_calls(sm_margin) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({BOTH: "5"}, [5, 5, 5]),
        ({BACKWARD: "2"}, [0, 2, 0]),
        ({BOTH: "5", FORWARD: "1"}, [1, 5, 5]),
        ({BOTH: "5", FORWARD: "1", BACKWARD: "0", INFERENCE: " 3 "}, [1, 0, 3]),
    ],
)
def test_environment(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert in_custom_calls(None) == expected
    assert in_custom_calls(9) == [9, 9, 9]
    assert in_custom_calls(SMMargin(backward=4)) == [0, 4, 0]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "four", "0x10", "1 2"])
@pytest.mark.parametrize("name", [BOTH, FORWARD, BACKWARD, INFERENCE])
def test_bad_environment(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name} must be an int of 0 or more, got {text!r}"):
        rms_norm(X)
    assert rms_norm(X, sm_margin=0).shape == X.shape


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("sm_margin", [0, 131, SMMargin(131, 0, 131)])
def test_within_the_smallest_gpu(sm_margin):
    assert jax.eval_shape(lambda x: rms_norm(x, sm_margin=sm_margin), X).shape == X.shape


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("sm_margin", "came"),
    [(132, "forward=132"), (SMMargin(backward=1000), "backward=1000"), (None, "inference=132")],
)
def test_beyond_the_smallest_gpu(monkeypatch, sm_margin, came):
    monkeypatch.setenv(INFERENCE, "132")
    with pytest.raises(
        ValueError, match=f"sm_margin must leave at least one of .* 132 SMs, got {came}"
    ):
        jax.eval_shape(lambda x: rms_norm(x, sm_margin=sm_margin), X)


def test_no_limit_without_a_gpu():
    assert in_custom_calls(10_000) == [10_000] * 3
