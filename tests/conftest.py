"""Eight CPU devices for the sharding tests, strict dtype promotion, and quiet, repeatable property tests."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# Tests start Python in the checkout, whose own jax_rmsnorm folder must not hide the installed package.
os.environ["PYTHONSAFEPATH"] = "1"

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")
