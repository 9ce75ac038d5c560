"""The CPU kernels on each instruction set that this machine has."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from jax_rmsnorm import _cpu


def run(arguments: list[str], instruction_set: str) -> str:
    """Standard output of this Python with another instruction set."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_RMSNORM_CPU_ISA": instruction_set,
        # Of a pytest in there: whatever else is installed may warn, which is an error.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
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
    folder = pathlib.Path(_cpu.__file__).parent  # the module on its own starts sooner than JAX
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import _cpu; print(_cpu.active_instruction_set())"
    available = _cpu.instruction_sets()
    assert run(["-c", code], name).strip() == (name if name in available else available[0])


@pytest.mark.parametrize(
    "name", [n for n in _cpu.instruction_sets() if n != _cpu.active_instruction_set()]
)
def test_values_on_other_instruction_sets(name):
    """The tests of values that this process runs on the best one, but for those of plain JAX alone."""
    files = [
        "test_add_rms_norm.py::test_many_and_long_rows",
        "test_conversions.py",
        "test_copies.py::test_every_pair_of_dtypes",
        "test_fused_special_values.py::test_add_rms_norm",
        "test_rms_norm_rope.py::test_heads_of_models",
        "test_special_values.py",
        "test_values.py",
    ]
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=line"]
    run(["-m", "pytest", *options, "-k", "not (xla or plain)", *files], name)
