"""``jax-rmsnorm info``, and the command line's frame."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import jax_rmsnorm
from jax_rmsnorm import cli

FACTS = {
    "versions": {"jax": "1.2.3", "python": "3.99.0"},
    "cpu kernels": {"loaded": "yes", "instruction set": "avx2"},
    "cuda kernels": {"loaded": "no", "reason": "not part of this build"},
}
TEXT = """\
versions:
  jax:    1.2.3
  python: 3.99.0
cpu kernels:
  loaded:          yes
  instruction set: avx2
cuda kernels:
  loaded: no
  reason: not part of this build
"""
WITHOUT_EXTRAS = """
import sys
for package in ("flax", "optax", "orbax", "matplotlib", "rich"):
    sys.modules[package] = None
from jax_rmsnorm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_prints_every_fact_aligned(monkeypatch, capsys):
    monkeypatch.setattr(jax_rmsnorm, "info", lambda: FACTS)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == TEXT


def test_json_is_what_info_returns(capsys):
    assert cli.main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == jax_rmsnorm.info()
    assert {"versions", "cpu kernels", "cuda kernels"} <= printed.keys()


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_unknown_words_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: jax-rmsnorm" in capsys.readouterr().err


def test_help_lists_the_subcommands(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert "train" in out
    assert "info" in out


def run_without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_info_needs_no_extra():
    done = run_without_extras("info")
    assert done.returncode == 0, done.stderr
    assert "versions:" in done.stdout


def test_train_without_extras_says_what_to_install():
    done = run_without_extras("train", "--steps", "1")
    assert done.returncode == 1
    assert 'pip install "jax-rmsnorm[train]"' in done.stderr
    assert "Traceback" not in done.stderr
