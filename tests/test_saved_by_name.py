"""What the operations save for their backward, by name, in policies of `jax.checkpoint`."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from checks import draw
from compare import assert_near, assert_same_bits

from jax_rmsnorm import add_rms_norm, rms_norm, rms_norm_rope

F32 = jnp.float32
ROWS, HIDDEN = 8, 64
OPERANDS = [
    *(draw(seed, (ROWS, HIDDEN), F32) for seed in (0, 1)),
    draw(2, (HIDDEN,), F32, offset=1.0),
    draw(3, (HIDDEN, HIDDEN), F32, scale=HIDDEN**-0.5),
]
TABLES = [draw(seed, (ROWS, 8), F32) for seed in (4, 5)]
POLICIES = jax.checkpoint_policies
SAVED = ("rms_norm_y", "rms_norm_h", "rms_norm_rrms")


def block(x, residual, gamma, matrix):
    """Each operation, and readers whose derivatives need what they read."""
    y, h = add_rms_norm(x, residual, gamma)
    z = rms_norm(jnp.sin(y @ matrix), gamma)
    q = rms_norm_rope((z @ matrix).reshape(ROWS, 4, 16), gamma[:16], *TABLES)
    return jnp.sin(q.reshape(ROWS, HIDDEN) @ matrix), h


def slopes(**options):
    f = jax.checkpoint(block, **options) if options else block

    def loss(*operands):
        y, h = f(*operands)
        return jnp.sum(y**2) + jnp.sum(h**3)

    return jax.jit(jax.grad(loss, range(len(OPERANDS))))


@pytest.mark.parametrize(
    ("policy", "forwards"),
    [
        (None, 2),
        (POLICIES.save_only_these_names(*SAVED), 1),
        (POLICIES.save_only_these_names(*SAVED[1:]), 2),  # y is computed again, for its reader
        (
            POLICIES.save_and_offload_only_these_names(
                names_which_can_be_saved=SAVED[2:],
                names_which_can_be_offloaded=SAVED[:2],
                offload_src="device",
                offload_dst="pinned_host",
            ),
            1,
        ),
    ],
    ids=["nothing", "all", "all but y", "offloaded"],
)
def test_forward_kernels_in_the_backward(policy, forwards):
    remat = slopes(policy=policy)
    calls = re.findall(r"@jax_rmsnorm_(\w*)\(", remat.lower(*OPERANDS).as_text())
    for name in ("", "add_", "rope_"):
        assert calls.count(f"{name}forward") == forwards
        assert calls.count(f"{name}backward") == 1
    actual, expected = remat(*OPERANDS), slopes()(*OPERANDS)
    if policy is None:
        assert_near(actual, expected)
    else:
        assert_same_bits(jax.device_get(actual), jax.device_get(expected))


def test_names_are_seen(capsys):
    policy = POLICIES.save_only_these_names("rms_norm_h")
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(block, policy=policy), *OPERANDS)
    saved = [line for line in capsys.readouterr().out.splitlines() if " named " in line]
    assert [line.split(" from ")[0] for line in saved] == ["f32[8,64] named 'rms_norm_h'"]
