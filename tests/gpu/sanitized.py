"""Run under compute-sanitizer: every scope, forward and backward, aligned and not, and more groups of rows than
there are blocks. Checks no values.

Operands come from the host by copies: initcheck, told to look at this project's kernels alone, takes what any other
kernel writes for not written.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_rmsnorm

rms_norm = functools.partial(jax_rmsnorm.rms_norm, implementation="kernel")
HIDDEN = (1, 3, 64, 100, 1000, 1024, 4100, 5121, 16_384, 20_001, 65_536, 100_001, 600_000)

calls = 0
for dtype in (jnp.bfloat16, jnp.float32):
    for hidden in HIDDEN:
        x = jnp.asarray(np.random.default_rng(hidden).standard_normal((21, hidden)), dtype)
        gamma = jnp.asarray(np.ones(hidden, np.float32))
        for sm_margin in (0, 1):  # the kernels for few rows, and those for many
            norm = functools.partial(rms_norm, sm_margin=sm_margin)
            y, vjp = jax.vjp(norm, x, gamma)
            jax.block_until_ready(vjp(y))
            calls += 1

for hidden in (64, 100, 1024, 4096, 20_480):
    groups = 290
    x = jnp.asarray(
        np.random.default_rng(hidden).standard_normal((groups, 3, hidden)), jnp.bfloat16
    )
    y, vjp = jax.vjp(jax.vmap(rms_norm), x, jnp.asarray(np.ones((groups, hidden), np.float32)))
    jax.block_until_ready(vjp(y))
    calls += 1
print(f"sanitized: {calls} calls")
