"""One of several processes that compute on a common mesh: started by test_distributed.py.

Arguments: the coordinator's address, the number of processes, this one's number, the file for the results.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
from compiled import collectives, kernels
from distributed_data import LAYOUTS, operands
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import add_gradients

address, count, number, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, count, number, initialization_timeout=60)

mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))
results = {}
programs = {}
for name, (spec, gamma_spec) in LAYOUTS.items():
    arrays = [
        jax.make_array_from_callback(
            array.shape,
            NamedSharding(mesh, P(*(spec if array.ndim == 3 else gamma_spec))),
            array.__getitem__,
        )
        for array in operands()
    ]
    program = jax.jit(add_gradients).lower(*arrays).compile()
    programs[name] = {"collectives": collectives(program), "kernels": kernels(program)}
    for i, result in enumerate(program(*arrays)):
        results[f"{name} {i}"] = multihost_utils.process_allgather(result, tiled=True)
if number == 0:
    np.savez(path, **results)
print(json.dumps({"devices": jax.device_count(), "local": jax.local_device_count(), **programs}))
