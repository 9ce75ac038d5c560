"""``jax-rmsnorm train --mesh``: the same losses on any mesh, and arrays that really are in parts."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from checks import needs_8_devices
from compiled import kernels

from jax_rmsnorm import cli
from jax_rmsnorm.cli._errors import OptionError
from jax_rmsnorm.cli._train import config, layout, step

pytestmark = needs_8_devices
STEPS = 12
SETTINGS = {
    "d_model": 32,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "seq": 32,
    "batch": 8,
    "lr": 2e-2,
    "steps": STEPS,
    "held_out_windows": 8,
    "sample_bytes": 4,
}


@pytest.fixture(scope="module", autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax mixes integer step counts with floating-point numbers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("text")
    for package in ("asyncio", "email", "json"):
        shutil.copytree(Path(sysconfig.get_paths()["stdlib"], package), text / package)
    return [f"{config.option(name)}={value}" for name, value in SETTINGS.items()] + [
        f"--data={text}"
    ]


def train(folder: Path, *options: str) -> list[float]:
    """The loss of every step so far."""
    assert cli.main(["train", f"--out={folder}", *options]) == 0
    return json.loads((folder / "metrics.json").read_text())["history"]["train"]


def test_losses_do_not_depend_on_the_mesh(options, tmp_path, capsys):
    """Begun on one mesh and resumed on another."""
    on_one = train(tmp_path / "one", *options)
    assert len(on_one) == STEPS
    folder = tmp_path / "mesh"
    train(folder, *options, "--mesh=data=2,tensor=2", f"--stop-at={STEPS // 2}")
    assert "mesh: data 2 x tensor 2 of 8 devices" in capsys.readouterr().out
    resumed = train(folder, f"--resume={folder}", "--mesh=fsdp=4")
    # Rounding errors of 1e-7 grow from step to step.
    np.testing.assert_allclose(resumed, on_one, rtol=1e-4)


def test_arrays_are_in_parts_and_norms_are_kernels():
    settings = config.from_preset("cpu", {**SETTINGS, "kv_heads": 2})
    placed = layout.make({"data": 2, "fsdp": 2, "tensor": 2}, settings)
    trainer, state = step.build(settings, "xla", placed)
    query = state.params["blocks"][0]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (16, 16)
    parts = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    bytes_in_parts = sum(leaf.nbytes for leaf in parts)
    assert bytes_in_parts > 0.9 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    found = kernels(trainer.compile_step(state, settings))
    # Two windows a device, and half of their positions where the stream is normalised; one head of two.
    assert set(found) == {
        "forward f32[2,16,32]",
        "backward f32[2,16,32]",
        "add_forward f32[2,16,32]",
        "add_backward f32[2,16,32]",
        "rope_forward f32[2,32,1,16]",
        "rope_backward f32[2,32,1,16]",
    }


@pytest.mark.parametrize(
    "text", ["", "data", "data=0", "data=two", "rows=2", "data=2,data=2", "data=2;tensor=2"]
)
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(OptionError, match="expected sizes of data, fsdp, tensor"):
        layout.parse(text)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=16", "needs 16 devices, and there are 8"),
        ("data=3", r"--batch \(8\) must be a multiple of 3"),
        ("tensor=4", r"--heads \(2\) must be a multiple of 4"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(mesh, message):
    with pytest.raises(OptionError, match=message):
        layout.make(layout.parse(mesh), config.from_preset("cpu", SETTINGS))
