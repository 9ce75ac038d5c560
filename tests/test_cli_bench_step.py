"""``jax-rmsnorm bench --step`` in runs of a tiny model, and its parts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from checks import needs_8_devices
from rich.console import Console

from jax_rmsnorm import cli
from jax_rmsnorm.cli._bench import (
    step_model,
    step_norms,
    step_program,
    step_report,
    step_results,
    step_session,
)
from jax_rmsnorm.cli._bench.profile import DeviceTime
from jax_rmsnorm.cli._bench.step_config import CONFIGS, DEFAULTS, IMPLEMENTATIONS
from jax_rmsnorm.cli._bench.step_norms import NORMS
from jax_rmsnorm.cli._bench.step_program import Memory
from jax_rmsnorm.cli._bench.step_results import Measured, Result
from jax_rmsnorm.cli._layout import Layout

FAST = step_session.Plan(rounds=3, steps=2, seconds=0.0)
TINY = CONFIGS["tiny"]
SMALL = dataclasses.replace(TINY, layers=1, seq=32, vocabulary=64)  # quicker to compile


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(step_session.PLANS, "cpu", FAST)
    with jax.numpy_dtype_promotion("standard"):  # as JAX's own attention needs it
        yield


def bench(*options: str) -> int:
    return cli.main(["bench", "--step", *options])


def test_a_run_writes_table_and_json_and_all_train_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(step_session.CONFIGS, "tiny", SMALL)
    path = tmp_path / "step.json"
    assert bench("--json", str(path)) == 0

    printed = capsys.readouterr().out
    for text in ("tiny: d 64 x 1 layers", "norm tax", "speed-up", "peak GiB", *IMPLEMENTATIONS):
        assert text in printed

    found = json.loads(path.read_text())
    assert found["environment"]["jax"] == jax.__version__
    (step,) = found["steps"]
    assert step["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(step_model.init(SMALL)))
    assert step["problems"] == []
    assert tuple(step["implementations"]) == IMPLEMENTATIONS
    losses = {name: one["losses"] for name, one in step["implementations"].items()}
    fall = losses["jnp"][0] - losses["jnp"][-1]
    assert losses["jnp"][0] == pytest.approx(math.log(SMALL.vocabulary), rel=0.05)
    assert fall > 1, "parameters must move far enough for losses to tell implementations apart"
    for name in ("unfused", "fused"):
        assert losses[name] == pytest.approx(losses["jnp"], abs=0.005 * fall)
    assert losses["identity"] != pytest.approx(losses["jnp"], abs=0.005 * fall)

    for name, one in step["implementations"].items():
        lower, upper = one["step_ms"]["quartiles"]
        assert 0 < lower <= one["step_ms"]["median"] <= upper
        assert one["step_ms"]["samples"] == FAST.rounds
        assert (one["norm_tax_ms"] is None) == (name == "identity")
        assert one["speedup"]["median"] > 0
        memory = one["memory"]
        assert one["peak_bytes"] == (
            memory["argument"] + memory["output"] - memory["alias"] + memory["temp"]
        )
        state_bytes = 3 * 4 * step["parameters"]
        assert memory["alias"] >= state_bytes, "the state must be donated"
        assert one["peak_bytes"] > state_bytes
    assert step["implementations"]["jnp"]["norm_tax_of_jnp"] in (1.0, None)
    assert step["implementations"]["jnp"]["speedup"]["median"] == 1


def test_joint_projections_and_remat_train_alike_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step_session.CONFIGS, "tiny", SMALL)
    path = tmp_path / "step.json"
    options = ("--joint", "--remat", "--implementations", "jnp", "fused", f"--json={path}")
    assert bench(*options) == 0
    (step,) = json.loads(path.read_text())["steps"]
    assert (step["joint"], step["remat"]) == (True, True)
    assert tuple(step["implementations"]) == ("jnp", "fused")
    assert step["implementations"]["fused"]["norm_tax_ms"] is None
    assert "joint projections, remat on" in capsys.readouterr().out


def test_a_norm_whose_gamma_gets_no_gradient_fails_the_run(monkeypatch, capsys):
    right = NORMS["fused"]
    wrong = right._replace(
        norm=lambda x, gamma, copies: right.norm(x, jax.lax.stop_gradient(gamma), copies)
    )
    wrong = wrong._replace(
        add_norm=lambda x, residual, gamma, copies: right.add_norm(
            x, residual, jax.lax.stop_gradient(gamma), copies
        )
    )
    monkeypatch.setitem(step_session.NORMS, "fused", wrong)
    monkeypatch.setitem(step_session.CONFIGS, "tiny", SMALL)
    assert bench("--implementations", "jnp", "fused") == 1
    captured = capsys.readouterr()
    assert "tiny: losses of fused and jnp are up to" in captured.err
    assert "speed-up" in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--step", "--config", "d7"), "argument --config"),
        (("--step", "--implementations", "none"), "argument --implementations"),
        (("--step", "--shapes", "8x8"), "--shapes: not together with --step"),
        (("--step", "--plot", "x.png"), "--plot: not together with --step"),
        (("--step", "--json", "no/such/folder/x.json"), "--json: there is no folder"),
        (("--step", "--remat", "--forward"), "--remat: not together with --forward"),
        (("--step", "--stream", "whole"), "--stream: only together with --mesh"),
        (("--remat",), "--remat: only together with --step"),
        (("--config", "tiny"), "--config: only together with --step"),
    ],
)
def test_wrong_options_exit_with_2_and_name_the_option(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", DEFAULTS["gpu"])
def test_the_models_for_a_gpu_can_be_traced(name: str):
    """Their shapes fit each other, with joint projections and remat and without."""
    for joint in (False, True):
        config = dataclasses.replace(CONFIGS[name], joint=joint, remat=joint)
        params = jax.eval_shape(lambda config=config: step_model.init(config))
        data = jax.eval_shape(lambda config=config: step_model.draw(config))
        loss = jax.eval_shape(
            lambda p, d, config=config: step_model.loss(p, d, config, NORMS["fused"]), params, data
        )
        assert (loss.shape, loss.dtype) == ((), jnp.float32)
        sizes = {leaf.shape for layer in params.layers for leaf in layer.qkv}
        assert len(params.layers[0].qkv) == (1 if joint else 3)
        assert sum(size[1] for size in sizes if joint) in (
            0,
            (config.heads + 2 * config.kv_heads) * config.head_dim,
        )


def test_separate_and_joint_projections_are_the_same_products():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    first, second = (jax.random.normal(jax.random.key(n), (8, 2 + n)) for n in (1, 2))
    joint = [jnp.concatenate([first, second], axis=1)]
    for got, expected in zip(
        step_model._project((x,), joint, [3, 4], Layout()),
        step_model._project((x, x), [first, second], [3, 4], Layout()),
        strict=True,
    ):
        assert got.shape == expected.shape
        assert jnp.allclose(got, expected, rtol=1e-6, atol=1e-6)
        assert jnp.abs(got).max() > 0.1


HLO = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%region_0.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0), metadata={op_name="jit(step)/jvp(rms_norm)/reduce_sum"}
  ROOT %add.1 = f32[] add(%a.1, %a.1), metadata={op_name="jit(step)/jvp(rms_norm)/reduce_sum"}
}

%fused_norm (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  %multiply.1 = f32[8]{0} multiply(%p.1, %p.1), metadata={op_name="jit(step)/transpose(jvp(rms_norm))/mul"}
  ROOT %add.2 = f32[8]{0} add(%p.1, %multiply.1), metadata={op_name="jit(step)/add"}
}

%fused_product (p.2: f32[8,8]) -> f32[8,8] {
  %p.2 = f32[8,8]{1,0} parameter(0)
  %convert.1 = f32[8,8]{1,0} convert(%p.2), metadata={op_name="jit(step)/jvp(rms_norm)/convert"}
  ROOT %dot.1 = f32[8,8]{1,0} dot(%convert.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_other (p.3: f32[8]) -> f32[8] {
  ROOT %negate.1 = f32[8]{0} negate(%p.3), metadata={op_name="jit(step)/neg"}
}

ENTRY %main.9 (x.1: f32[8]) -> f32[8] {
  %loop_add_fusion.3 = f32[8]{0} fusion(%x.1), kind=kLoop, calls=%fused_norm, metadata={op_name="jit(step)/add"}
  %gemm_fusion_dot.1 = f32[8,8]{1,0} fusion(%x.1), kind=kCustom, calls=%fused_product
  %loop_negate_fusion = f32[8]{0} fusion(%x.1), kind=kLoop, calls=%fused_other
  ROOT %wrapped.2 = f32[8]{0} copy(%x.1), metadata={op_name="jit(step)/rms_norm/copy"}
}
"""


@pytest.mark.parametrize("text", [HLO, HLO.replace("%", "")])
def test_norm_kernels_are_fusions_with_a_part_of_a_norm(text: str):
    found = step_program.norm_kernels(text, step_norms.SCOPE)
    assert found >= {"loop_add_fusion_3", "wrapped_2"}
    assert not found & {"gemm_fusion_dot_1", "loop_negate_fusion", "multiply_1", "convert_1"}


def test_a_norms_operations_carry_the_scope_and_nothing_else_does():
    x, gamma = jnp.ones((2, 4, 2, 8)), jnp.ones(8)
    cos = jnp.ones((4, 4))

    def value(name: str) -> Any:
        return lambda x, gamma: NORMS[name].norm_rope(x, gamma, cos, cos).sum()

    def lower(name: str) -> str:
        compiled = jax.jit(jax.grad(value(name), argnums=(0, 1))).lower(x, gamma).compile()
        return compiled.as_text() or ""

    for name in ("jnp", "unfused", "fused"):
        assert step_program.norm_kernels(lower(name), step_norms.SCOPE), name
    assert not step_program.norm_kernels(lower("identity"), step_norms.SCOPE)


def make_result(**devices: DeviceTime | None) -> Result:
    """Steps of 40, 36 and 35 ms in a first round, and all 2 ms longer from round to round."""
    firsts = {"jnp": 40, "fused": 36, "identity": 35}
    return Result(
        TINY,
        1000,
        {
            name: Measured(
                1.0,
                Memory(argument=10, output=10, alias=8, temp=5),
                frozenset({"loop_add_fusion_3", "loop_add_fusion_4"}),
                losses=[5.0, 4.0],
                samples=[1e-3 * (first + 2 * n) for n in range(3)],
                device=devices.get(name),
            )
            for name, first in firsts.items()
        },
    )


def test_taxes_and_speedups_are_taken_within_rounds():
    result = make_result()
    tax = result.tax("jnp")
    assert tax is not None
    assert tax.median == pytest.approx(5e-3)
    assert tax.upper - tax.lower == pytest.approx(0)
    assert result.of_plain_tax("fused") == pytest.approx(1 / 5)
    speedup = result.speedup("fused")
    assert speedup is not None
    assert speedup.median == pytest.approx(42 / 38)
    assert result.tax("identity") is None
    assert result.measured["jnp"].memory.peak == 17


def test_kernels_of_norms_are_found_by_program_and_by_package():
    kernels = {
        "loop_add_fusion_3": 1e-3,
        "loop_add_fusion_4": 2e-3,
        "loop_add_fusion_9": 4e-3,
        "void jax_rmsnorm::Forward<8>": 5e-4,
        "nvjet_hsh_128": 3e-2,
    }
    result = make_result(
        jnp=DeviceTime(37.5e-3, 5.0, kernels),
        fused=DeviceTime(33e-3, 5.0, kernels),
        identity=DeviceTime(32e-3, 2.0, {"nvjet_hsh_128": 3e-2}),
    )
    jnp_step = result.measured["jnp"]
    assert sum(jnp_step.of_norms().values()) == pytest.approx(3.5e-3)
    assert result.kernel_tax("jnp") == pytest.approx(5.5e-3)
    assert result.of_plain_kernel_tax("fused") == pytest.approx(1 / 5.5)
    found = [
        (one.name, one.kernels, one.of_norms, one.seconds)
        for one in step_results.families(jnp_step)
    ]
    assert found == [
        ("nvjet_hsh_128", 1, False, 3e-2),
        ("loop_add_fusion", 1, False, 4e-3),
        ("loop_add_fusion", 2, True, pytest.approx(3e-3)),
        ("void jax_rmsnorm::Forward<8>", 1, True, 5e-4),
    ]
    as_json = step_results.to_json([result], {})["steps"][0]["implementations"]["jnp"]["kernels"]
    assert as_json["of_norms_ms"] == pytest.approx(3.5)
    assert next(iter(as_json["all_us"])) == "nvjet_hsh_128"

    console = Console(width=300, record=True)
    console.print(step_report.table([result]), step_report.kernels(result, "jnp"))
    printed = console.export_text()
    for text in ("kernel tax", "37.500", "5.500", "0.18", "void jax_rmsnorm::Forward<8>"):
        assert text in printed


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([5.0, 4.004], None),
        ([5.0, 4.006], "losses of fused and jnp are up to 0.006 apart, over 0.005"),
        ([5.0, math.nan], "losses of fused are not all finite"),
    ],
)
def test_losses_may_differ_by_little_of_their_fall(losses: list[float], message: str | None):
    result = make_result()
    result.measured["fused"].losses = losses
    result.measured["identity"].losses = [5.0, 4.9]
    assert list(result.problems()) == ([] if message is None else [f"tiny: {message}"])
    json.dumps(step_results.to_json([result], {}), allow_nan=False)


def test_a_forward_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step_session.CONFIGS, "tiny", SMALL)
    path = tmp_path / "step.json"
    names = ("jnp", "fused", "kernels", "identity")
    assert bench("--forward", "--implementations", *names, f"--json={path}") == 0
    assert "forward alone" in capsys.readouterr().out
    (step,) = json.loads(path.read_text())["steps"]
    assert step["forward"]
    losses = {name: one["losses"] for name, one in step["implementations"].items()}
    assert tuple(losses) == names
    for name in names:
        assert len(set(losses[name])) == 1, "the state stays as it is"
    assert losses["fused"] == losses["kernels"] == pytest.approx(losses["jnp"], abs=0.01)
    assert losses["identity"] != pytest.approx(losses["jnp"], abs=0.01)


def test_a_forward_whose_norm_is_another_fails_the_run(monkeypatch, capsys):
    wrong = NORMS["fused"]._replace(
        add_norm=lambda x, residual, gamma, copies: ((3 * (x + residual),) * copies, x + residual)
    )
    monkeypatch.setitem(step_session.NORMS, "fused", wrong)
    monkeypatch.setitem(step_session.CONFIGS, "tiny", SMALL)
    assert bench("--forward", "--implementations", "jnp", "fused") == 1
    assert "tiny: losses of fused and jnp are up to" in capsys.readouterr().err


@needs_8_devices
@pytest.mark.parametrize(
    "options",
    [
        ("--mesh", "data=2"),
        ("--mesh", "fsdp=2,tensor=2"),
        ("--mesh", "tensor=2", "--stream", "features"),
        ("--mesh", "tensor=2", "--stream", "whole", "--remat"),
    ],
    ids=" ".join,
)
def test_on_a_mesh_losses_are_those_of_one_device(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step_session.CONFIGS, "tiny", SMALL)

    def losses(*options: str) -> dict[str, list[float]]:
        path = tmp_path / "step.json"
        chosen = ("--implementations", "jnp", "fused", f"--json={path}")
        assert bench(*chosen, *options) == 0
        (step,) = json.loads(path.read_text())["steps"]
        return {name: one["losses"] for name, one in step["implementations"].items()}

    expected = losses()
    assert expected["jnp"][0] - expected["jnp"][-1] > 1
    for name, got in losses(*options).items():
        assert got == pytest.approx(expected[name], rel=2e-3)
    assert f"mesh {options[1]}" in capsys.readouterr().out


@needs_8_devices
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "rows=2"), "--mesh: expected sizes of data, fsdp, tensor"),
        (("--mesh", "data=16"), "--mesh: data=16 must divide the batch, which is 2"),
        (("--mesh", "tensor=2", "--joint"), "--joint: not together with --mesh tensor"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench(*options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
