"""``jax-rmsnorm train`` from its options to its files, in runs of a few steps."""

from __future__ import annotations

import json
import shutil
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.image
import numpy as np
import pytest
from checks import needs_8_devices

import jax_rmsnorm
from jax_rmsnorm import cli
from jax_rmsnorm.cli._train import session
from jax_rmsnorm.cli._train.corpus import Corpus

STEPS = 40
TINY = (
    "--d-model=32 --layers=1 --heads=2 --kv-heads=1 --seq=32 --batch=8 --lr=2e-2 --sample-bytes=40 "
    f"--held-out-windows=16 --steps={STEPS} --seed=3 --deterministic"
).split()


class Result(NamedTuple):
    folder: Path
    metrics: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return self.metrics["history"]["train"]

    @property
    def held_out(self) -> list[list[float]]:
        return self.metrics["history"]["held_out"]


def train(folder: Path, *options: str) -> Result:
    assert cli.main(["train", f"--out={folder}", *options]) == 0
    return Result(folder, json.loads((folder / "metrics.json").read_text()))


@pytest.fixture(scope="module", autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax mixes integer step counts with floating-point numbers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a tiny run, on a part of the standard library."""
    text = tmp_path_factory.mktemp("text")
    for package in ("asyncio", "email", "json"):
        shutil.copytree(Path(sysconfig.get_paths()["stdlib"], package), text / package)
    return [*TINY, f"--data={text}"]


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tmp_path_factory.mktemp("whole"), *tiny)


def test_the_model_learns(whole):
    assert len(whole.losses) == STEPS
    assert whole.losses[0] == pytest.approx(8, abs=0.1)
    assert np.mean(whole.losses[-5:]) < 5.5
    assert whole.held_out[0][0] == 0
    assert whole.held_out[0][1] == pytest.approx(8, abs=0.1)
    assert whole.held_out[-1] == [STEPS, whole.metrics["held_out_bits_per_byte"]]
    assert whole.metrics["held_out_bits_per_byte"] < 5.5
    assert whole.metrics["bytes_per_second"] > 0
    assert not whole.metrics["interrupted"]


def test_metrics_name_the_norms_that_ran(whole):
    kernels = jax_rmsnorm.info()[{"gpu": "cuda kernels"}.get(jax.default_backend(), "cpu kernels")]
    expected = "hand-written kernel" if kernels["loaded"] == "yes" else "plain JAX"
    assert whole.metrics["norms"] == expected


def test_the_files_are_written(whole):
    curve = matplotlib.image.imread(whole.folder / "loss.png")
    assert min(curve.shape[:2]) > 500
    assert curve[..., :3].std() > 0.01
    sample = (whole.folder / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("def ")
    assert len(sample) > len("def \n")


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(whole, tiny, tmp_path, capsys):
    half = train(tmp_path, *tiny, f"--stop-at={STEPS // 2}")
    assert half.losses == whole.losses[: STEPS // 2]
    assert f"jax-rmsnorm train --resume {tmp_path}" in capsys.readouterr().out

    resumed = train(tmp_path, f"--resume={tmp_path}")
    assert resumed.losses == whole.losses
    assert resumed.held_out == whole.held_out
    assert (tmp_path / "sample.txt").read_bytes() == (whole.folder / "sample.txt").read_bytes()


@needs_8_devices
def test_a_run_on_a_mesh_goes_on_without(whole, tiny, tmp_path, capsys):
    """And has the losses of a run that was on one device all the time."""
    first = train(tmp_path, *tiny, "--mesh=data=2,tensor=2", "--stop-at=6")
    mesh = "data 2 x tensor 2 of 8 devices"
    assert first.metrics["mesh"] == mesh
    assert f"\nmesh: {mesh}\n" in capsys.readouterr().out
    second = train(tmp_path, f"--resume={tmp_path}", "--stop-at=10")
    assert "mesh" not in second.metrics
    assert "mesh:" not in capsys.readouterr().out
    # Rounding errors of 1e-7 grow from step to step.
    np.testing.assert_allclose(second.losses, whole.losses[:10], rtol=1e-4)
    np.testing.assert_allclose(second.held_out[:2], whole.held_out[:2], rtol=1e-4)


def test_kernel_and_xla_agree(whole, tiny, tmp_path):
    xla = train(tmp_path, *tiny, "--implementation=xla", "--stop-at=10")
    assert xla.metrics["norms"] == "plain JAX"
    # Rounding errors of 1e-7 grow from step to step.
    np.testing.assert_allclose(xla.losses, whole.losses[:10], rtol=1e-4)


def test_ctrl_c_ends_the_run_with_what_was_reached(whole, tiny, tmp_path, monkeypatch, capsys):
    draw = Corpus.batch

    def draw_and_interrupt(self, config, step):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return draw(self, config, step)

    monkeypatch.setattr(Corpus, "batch", draw_and_interrupt)
    handler = signal.getsignal(signal.SIGINT)
    stopped = train(tmp_path, *tiny)
    assert signal.getsignal(signal.SIGINT) is handler
    assert stopped.losses == whole.losses[:7]
    assert stopped.metrics["interrupted"]
    assert stopped.metrics["held_out_bits_per_byte"] < 8
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint",
        "loss.png",
        "metrics.json",
        "sample.txt",
    }
    assert f"stopped after 7 of {STEPS} steps" in capsys.readouterr().out


def test_an_abort_exits_with_130(monkeypatch, capsys):
    def abort(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run", abort)
    assert cli.main(["train"]) == 130
    assert "aborted" in capsys.readouterr().err


def assert_rejected(capsys: pytest.CaptureFixture[str], option: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", *arguments])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.replace("argument ", "").startswith(f"jax-rmsnorm train: error: {option}: ")
    return message


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--heads", ["--heads=3"]),
        ("--heads", ["--d-model=6", "--heads=2"]),
        ("--kv-heads", ["--heads=4", "--kv-heads=3"]),
        ("--steps", ["--steps=0"]),
        ("--steps", ["--steps=many"]),
        ("--batch", ["--batch=-1"]),
        ("--held-out-windows", ["--held-out-windows=0"]),
        ("--lr", ["--lr=0"]),
        ("--lr", ["--lr=nan"]),
        ("--seed", ["--seed=-1"]),
        ("--temperature", ["--temperature=-0.1"]),
        ("--prompt", ["--prompt="]),
        ("--implementation", ["--implementation=fast"]),
        ("--stop-at", ["--steps=10", "--stop-at=11"]),
        ("--stop-at", ["--stop-at=0"]),
        ("--data", ["--data=/nonexistent"]),
        ("--mesh", ["--mesh=model=2"]),
        ("--resume", ["--resume=/nonexistent"]),
        ("--resume", ["--preset=cpu", "--resume=/nonexistent"]),
    ],
)
def test_a_bad_option_is_named(option, arguments, capsys):
    assert_rejected(capsys, option, *arguments)


def test_a_window_longer_than_the_text(tiny, tmp_path, capsys):
    message = assert_rejected(capsys, "--seq", *tiny, "--seq=9999999", f"--out={tmp_path}")
    assert "9999999" in message
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_holds_limits_the_options(whole, tiny, capsys):
    resume = f"--resume={whole.folder}"
    assert "32" in assert_rejected(capsys, "--d-model", resume, "--steps=80", "--d-model=64")
    assert str(STEPS) in assert_rejected(capsys, "--steps", resume)
    assert_rejected(capsys, "--out", *tiny, f"--out={whole.folder}")


def test_the_kernel_where_there_is_none(tiny, tmp_path, monkeypatch, capsys):
    def rms_norm(x, gamma, *, implementation):
        raise NotImplementedError("the kernels did not load")

    monkeypatch.setattr(jax_rmsnorm, "rms_norm", rms_norm)
    message = assert_rejected(
        capsys, "--implementation", *tiny, "--implementation=kernel", f"--out={tmp_path}"
    )
    assert "the kernels did not load" in message
