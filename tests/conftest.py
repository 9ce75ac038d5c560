"""Eight CPU devices for the sharding tests, quick compilation, strict dtype promotion, repeatable property tests."""

import importlib.metadata
import os
import tempfile

# Most of the tests' time is XLA's, compiling the plain JAX that the kernels are compared with: quickly, then, and what
# two of pytest's processes or their children compile alike only once.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Later jaxlibs do not know this flag, and one that they do not know ends the process.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # In the process that pytest starts in; the others inherit it.
    CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tests start Python in the checkout, whose own jax_rmsnorm folder must not hide the installed package.
os.environ["PYTHONSAFEPATH"] = "1"

# JAX reads what is above as it is imported, hence the imports down here.
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from jax_rmsnorm._primitives import choice  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")

# The tests are of the kernels, also where a GPU would be better off with plain JAX.
MEASURED = choice.LEAST_ELEMENTS, choice.LEAST_ELEMENTS_UNDIFFERENTIATED
choice.LEAST_ELEMENTS = choice.LEAST_ELEMENTS_UNDIFFERENTIATED = 0


@pytest.fixture
def as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain JAX for few elements, as users have it."""
    least, undifferentiated = MEASURED
    monkeypatch.setattr(choice, "LEAST_ELEMENTS", least)
    monkeypatch.setattr(choice, "LEAST_ELEMENTS_UNDIFFERENTIATED", undifferentiated)
