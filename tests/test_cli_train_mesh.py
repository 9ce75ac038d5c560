"""``jax-rmsnorm train --mesh``: what a step computes, communicates and keeps on each device; which meshes there are."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import needs_8_devices
from compiled import collectives, kernels

from jax_rmsnorm.cli import _layout
from jax_rmsnorm.cli._errors import OptionError
from jax_rmsnorm.cli._layout import Layout
from jax_rmsnorm.cli._train import checkpoint, layout
from jax_rmsnorm.cli._train.config import PRESETS, Config
from jax_rmsnorm.cli._train.history import History
from jax_rmsnorm.cli._train.step import State, build

pytestmark = needs_8_devices
STEPS = 6
CONFIG = dataclasses.replace(
    PRESETS["cpu"], d_model=64, layers=1, heads=4, kv_heads=2, seq=16, batch=8, steps=STEPS, lr=1e-2
)
MESHES = pytest.mark.parametrize(
    ("mesh", "data", "fsdp", "tensor"),
    [
        ("fsdp=2", 1, 2, 1),
        ("data=2,tensor=2", 2, 1, 2),
    ],
)


def make(mesh: str, config: Config) -> Layout:
    return layout.make(_layout.parse(mesh), config)


class Program(NamedTuple):
    """A compiled step and the state that it starts from."""

    step: Any
    state: State

    def run(self, state: State, steps: int) -> tuple[State, list[float]]:
        """Steps on the same windows, so that each loss tells of all the updates before it."""
        windows = np.random.default_rng(0).integers(
            0, 256, (CONFIG.batch, CONFIG.seq + 1), np.uint8
        )
        state = jax.tree.map(jnp.copy, state)  # a step donates its state
        losses = []
        for _ in range(steps):
            state, loss = self.step(state, windows)
            losses.append(float(loss))
        return state, losses


@functools.cache
def program(mesh: str | None) -> Program:
    # Optax mixes step counts with floating-point numbers.
    with jax.numpy_dtype_promotion("standard"):
        trainer, state = build(CONFIG, "xla", make(mesh, CONFIG) if mesh else Layout())
        return Program(trainer.compile_step(state, CONFIG), state)


@functools.cache
def run(mesh: str | None) -> tuple[State, list[float]]:
    return program(mesh).run(program(mesh).state, STEPS)


@MESHES
def test_losses_are_those_of_one_device(mesh, data, fsdp, tensor):
    _, expected = run(None)
    assert expected[-1] < expected[0] - 0.5
    _, losses = run(mesh)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [("data=2,tensor=2", "fsdp=2"), ("fsdp=2", None), (None, "data=2,tensor=2")],
)
def test_a_checkpoint_goes_with_any_mesh(before, after, tmp_path):
    done = STEPS // 2
    state, losses = program(before).run(program(before).state, done)
    saved = checkpoint.Saved(tmp_path, done, CONFIG, History(losses), fingerprint="")
    checkpoint.save(saved, state)
    restored = checkpoint.restore(saved, like=program(after).state)
    _, rest = program(after).run(restored, STEPS - done)
    np.testing.assert_allclose([*losses, *rest], run(None)[1], rtol=1e-5)


@MESHES
def test_norms_run_on_shards(mesh, data, fsdp, tensor):
    """Those of the residual stream are split by positions, those of queries and keys by heads."""
    batch = CONFIG.batch // (data * fsdp)
    stream = f"f32[{batch},{CONFIG.seq // tensor},{CONFIG.d_model}]"
    query, key = (
        f"f32[{batch},{CONFIG.seq},{heads // tensor},{CONFIG.head_dim}]"
        for heads in (CONFIG.heads, CONFIG.kv_heads)
    )
    assert kernels(program(mesh).step) == {
        f"forward {stream}": 1,  # the first norm adds nothing
        f"add_forward {stream}": 2,
        f"backward {stream}": 2,  # nor does a gradient of the last one's sum come back
        f"add_backward {stream}": 1,
        **{f"rope_forward {x}": 1 for x in (query, key)},
        **{f"rope_backward {x}": 1 for x in (query, key)},
    }


@MESHES
def test_what_is_gathered(mesh, data, fsdp, tensor):
    """Sequences in front of attention and SwiGLU and their gradients, for tensor; parameters for fsdp; else nothing."""
    moved = collectives(program(mesh).step)
    sequences = f"all-gather f32[{CONFIG.batch // (data * fsdp)},{CONFIG.seq},{CONFIG.d_model}]"
    assert moved[sequences] == (4 if tensor > 1 else 0)
    gathers = sum(count for kind, count in moved.items() if kind.startswith("all-gather"))
    assert (gathers > moved[sequences]) == (fsdp * tensor > 1)
    assert not any(kind.startswith("all-to-all") for kind in moved)


@MESHES
def test_matrices_are_kept_in_parts(mesh, data, fsdp, tensor):
    """Those of the optimiser's two moments too, and after steps as before."""
    matrices = [leaf for leaf in jax.tree.leaves(run(mesh)[0]) if leaf.ndim == 2]
    assert len(matrices) == 3 * (2 + 7)
    for matrix in matrices:
        assert len(matrix.addressable_shards) == data * fsdp * tensor
        assert {shard.data.size for shard in matrix.addressable_shards} == {
            matrix.size // (fsdp * tensor)
        }


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("", "expected sizes of data, fsdp, tensor"),
        ("data", "got 'data'"),
        ("data=0", "got 'data=0'"),
        ("data=two", "got 'data=two'"),
        ("model=2", "got 'model=2'"),
        ("data=2,data=2", "each once"),
        ("data=2;tensor=2", "got 'data=2;tensor=2'"),
        ("data=2,fsdp=3", r"data=2,fsdp=3 must divide --batch, which is 8"),
        ("data=2,tensor=8", r"tensor=8 must divide --heads, which is 4"),
        ("tensor=4", r"tensor=4 must divide --kv-heads, which is 2"),
        (
            "data=8,tensor=2",
            "data=8,tensor=2 needs 16 devices, and there are 8 .*JAX_NUM_CPU_DEVICES=16",
        ),
    ],
)
def test_a_mesh_that_cannot_be(mesh, message):
    with pytest.raises(OptionError, match=f"^--mesh: .*{message}"):
        make(mesh, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq": 17}, r"tensor=2 must divide --seq, which is 17"),
        ({"d_model": 24}, r"fsdp=8,tensor=2 must divide --d-model, which is 24"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide(change, message):
    with pytest.raises(OptionError, match=message):
        make("fsdp=8,tensor=2", dataclasses.replace(CONFIG, **change))
