"""Eight CPU devices for the sharding tests, quick compilation, strict dtype promotion, repeatable property tests."""

import importlib.metadata
import os

# Most of the tests' time is XLA's, compiling the plain JAX that the kernels are compared with.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Later jaxlibs do not know this flag, and one that they do not know ends the process.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# Tests start Python in the checkout, whose own jax_rmsnorm folder must not hide the installed package.
os.environ["PYTHONSAFEPATH"] = "1"

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")
