"""Two processes on this machine, each with two of four devices, compute what one process does."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import oracle
from distributed_data import operands

PROCESSES, DEVICES_EACH, SECONDS = 2, 2, 120


def run_processes(path: pathlib.Path) -> list[dict]:
    """What each process printed."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        address = f"localhost:{listening.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_EACH}",
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
    }
    worker = pathlib.Path(__file__).with_name("distributed_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), address, str(PROCESSES), str(number), str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, out + err
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_two_processes(tmp_path):
    path = tmp_path / "results.npz"
    for found in run_processes(path):
        assert (found["devices"], found["local"]) == (4, 2)
        rows, hidden = found["rows"], found["hidden"]
        assert rows["kernels"] == {"add_forward f32[2,6,64]": 1, "add_backward f32[2,6,64]": 1}
        assert rows["collectives"] == {"all-reduce f32[64]": 1}
        assert hidden["collectives"] == {"all-reduce f32[8,6]": 2}

    h_want, want = oracle.add_rms_norm(*operands())
    results = np.load(path)
    for name in ("rows", "hidden"):
        y, h, dx, dresidual, dgamma = (results[f"{name} {i}"] for i in range(5))
        np.testing.assert_array_equal(h, h_want)
        oracle.assert_close(y, want.y, what=f"{name}: y")
        for gradient in (dx, dresidual):
            oracle.assert_close(gradient, want.dx, terms=want.dx_terms, what=f"{name}: dx")
        oracle.assert_close(dgamma, want.dgamma, terms=want.dgamma_terms, what=f"{name}: dgamma")
