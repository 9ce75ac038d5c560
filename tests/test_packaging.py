"""What is installed, what importing it needs and starts, and what the native modules show of themselves."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

import jax_rmsnorm
from jax_rmsnorm import _ffi

NATIVE = [native.module for native in (_ffi.CPU, _ffi.CUDA) if native.module is not None]
SYSTEM_LIBRARIES = {
    "libc",
    "libm",
    "libstdc++",
    "libgcc_s",
    "libpthread",
    "libdl",
    "librt",
    "ld-linux-x86-64",
}
each_native = pytest.mark.parametrize("module", NATIVE, ids=lambda module: module.__name__)


def run(code: str) -> str:
    """Standard output of a new Python."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed_files() -> tuple[list[pathlib.PurePath], bool]:
    """The distribution's files, and whether it is an editable install, whose Python files lie elsewhere."""
    distribution = importlib.metadata.distribution("jax-rmsnorm")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return list(distribution.files or []), origin.get("dir_info", {}).get("editable", False)


def test_file_list():
    files, editable = installed_files()
    names = {file.as_posix() for file in files}
    tops = {file.parts[0] for file in files if file.suffix != ".pyc"}
    package = {file for file in files if file.parts[0] == "jax_rmsnorm" and file.suffix != ".pyc"}
    dist_info = {top for top in tops if top.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert {".."} >= {top for top in tops - dist_info - {"jax_rmsnorm"} if "_editable_" not in top}
    assert f"{dist_info.pop()}/licenses/LICENSE" in names
    for module in NATIVE:
        assert module.__file__ is not None
        assert f"jax_rmsnorm/{pathlib.Path(module.__file__).name}" in names
        assert f"jax_rmsnorm/{module.__name__.split('.')[-1]}.pyi" in names
    kinds = {"".join(file.suffixes[-1:]) for file in package if file.name != "py.typed"}
    assert kinds == ({".so", ".pyi"} if editable else {".so", ".pyi", ".py"})
    if not editable:
        assert {
            "jax_rmsnorm/__init__.py",
            "jax_rmsnorm/py.typed",
            "jax_rmsnorm/_primitives/forward.py",
        } <= names


def test_typed():
    assert importlib.resources.files(jax_rmsnorm).joinpath("py.typed").is_file()


def test_metadata():
    metadata = importlib.metadata.metadata("jax-rmsnorm")
    core = {r.split(">")[0] for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert core == {"jax", "jaxlib", "numpy"}
    assert set(metadata.get_all("Provides-Extra", [])) >= {
        "cuda12",
        "cuda13",
        "flax",
        "train",
        "test",
    }
    assert metadata["Requires-Python"] == ">=3.11"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="jax-rmsnorm")
    assert script.value == "jax_rmsnorm.cli:main"


@each_native
def test_stubs_name_everything(module):
    stub = pathlib.Path(module.__file__).with_name(f"{module.__name__.split('.')[-1]}.pyi")
    tree = ast.parse(stub.read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    values = {
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    public = {name for name in dir(module) if not name.startswith("_")}
    assert functions | values == public
    assert functions >= {"forward", "backward"}
    assert functions == {name for name in public if callable(getattr(module, name))}


@each_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_symbols(module):
    """The module's entry alone: nothing of ours can clash with another library in the process.

    Weak symbols of the C++ library and of nanobind, which are the same in every module, may stand beside it.
    """
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", module.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = {name: kind for name, kind, *_ in map(str.split, lines)}
    entry = f"PyInit_{module.__name__.split('.')[-1]}"
    assert {name for name, kind in kinds.items() if kind not in "VWu"} == {entry}
    assert not [name for name in kinds if "jax_rmsnorm" in name]


@each_native
def test_capsules(module):
    assert [type(getattr(module, name)()).__name__ for name in ("forward", "backward")] == [
        "PyCapsule"
    ] * 2


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf"
)
@each_native
def test_libraries(module):
    """The system's own libraries only: the CUDA runtime is linked in, and no driver is asked for."""
    text = subprocess.run(
        ["readelf", "-d", module.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line}
    assert {name.split(".")[0] for name in needed} <= SYSTEM_LIBRARIES
    assert "libc" in {name.split(".")[0] for name in needed}


CORE = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
import jax, jax.numpy as jnp
import jax_rmsnorm
from jax._src import xla_bridge  # JAX has no public word for whether a backend runs
assert not xla_bridge.backends_are_initialized(), "import"
jax_rmsnorm.info()
jax.jit(jax_rmsnorm.rms_norm).trace(jax.ShapeDtypeStruct((2, 4), jnp.float32))
assert not xla_bridge.backends_are_initialized(), "info or tracing"
print(jax.grad(lambda x: jax_rmsnorm.rms_norm(x).sum())(jnp.arange(4.0)).shape)
"""


def test_core_needs_only_jax_and_starts_nothing():
    blocked = {
        "flax",
        "optax",
        "orbax",
        "matplotlib",
        "rich",
        "flatbuffers",
        "hypothesis",
        "pytest",
        "nanobind",
    }
    assert run(CORE.replace("{blocked}", repr(blocked))) == "(4,)\n"


def test_import_without_the_native_modules():
    """From its sources alone, the package is plain JAX and says so."""
    code = """
import sys
sys.modules["jax_rmsnorm._cpu"] = sys.modules["jax_rmsnorm._cuda"] = None
import jax.numpy as jnp
import jax_rmsnorm
print(jax_rmsnorm.rms_norm(jnp.ones((2, 4)), eps=0.0).sum())
print(jax_rmsnorm.info()["cpu kernels"])
try:
    jax_rmsnorm.rms_norm(jnp.ones((2, 4)), implementation="kernel")
except NotImplementedError as error:
    print(error)
"""
    total, kernels, error = run(code).splitlines()
    assert total == "8.0"
    described = ast.literal_eval(kernels)
    assert described["loaded"] == "no"
    assert "the sources were imported, not the installed package" in described["reason"]
    assert "on platform cpu: the cpu kernels did not load: " in error


def test_public_names():
    public = {
        name
        for name, value in vars(jax_rmsnorm).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    functions = {"rms_norm", "add_rms_norm", "rms_norm_rope", "info"}
    assert public == {*functions, "SMMargin", "DISABLED_EXPORT_CHECKS"}
    assert all(getattr(jax_rmsnorm, name).__doc__ for name in public)


def test_info():
    info = jax_rmsnorm.info()
    assert set(info) == {"versions", "cpu kernels", "cuda kernels"}
    versions = info["versions"]
    assert isinstance(versions, dict)
    assert versions["jax_rmsnorm"] == importlib.metadata.version("jax-rmsnorm")
    for name, native in [("cpu kernels", _ffi.CPU), ("cuda kernels", _ffi.CUDA)]:
        kernels = info[name]
        assert isinstance(kernels, dict)
        assert kernels["loaded"] == ("no" if native.module is None else "yes")
        assert all(isinstance(value, str) and value for value in kernels.values())
