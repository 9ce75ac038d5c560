"""Two processes on this machine, each with two of four devices, compute what one process does."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import oracle
from distributed_data import operands

PROCESSES, DEVICES_EACH, SECONDS = 2, 2, 60
RESULTS = "results.npz"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def wait(processes: list[subprocess.Popen]) -> None:
    """Until all have ended, one has failed (the others would wait for it), or it takes too long."""
    end = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_processes(folder: pathlib.Path) -> list[dict]:
    """What each process printed. The results are in a file of the folder."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_EACH}",
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
    }
    worker = str(pathlib.Path(__file__).with_name("distributed_worker.py"))
    address, results = f"localhost:{free_port()}", str(folder / RESULTS)
    outputs = [folder / f"{number}.out" for number in range(PROCESSES)]
    errors = [folder / f"{number}.err" for number in range(PROCESSES)]
    processes = []
    for number, (out, err) in enumerate(zip(outputs, errors, strict=True)):
        with out.open("w") as stdout, err.open("w") as stderr:
            arguments = [address, str(PROCESSES), str(number), results]
            processes.append(
                subprocess.Popen(
                    [sys.executable, worker, *arguments],
                    env=environment,
                    stdout=stdout,
                    stderr=stderr,
                )
            )
    wait(processes)
    codes = [process.returncode for process in processes]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(
        f"--- {path.name}\n{path.read_text()}" for path in (*outputs, *errors)
    )
    return [json.loads(path.read_text().splitlines()[-1]) for path in outputs]


def test_two_processes(tmp_path):
    for found in run_processes(tmp_path):
        assert (found["devices"], found["local"]) == (4, 2)
        rows, hidden = found["rows"], found["hidden"]
        assert rows["kernels"] == {"add_forward f32[2,6,64]": 1, "add_backward f32[2,6,64]": 1}
        assert rows["collectives"] == {"all-reduce f32[64]": 1}
        assert hidden["collectives"] == {"all-reduce f32[8,6]": 2}

    h_want, want = oracle.add_rms_norm(*operands())
    results = np.load(tmp_path / RESULTS)
    for name in ("rows", "hidden"):
        y, h, dx, dresidual, dgamma = (results[f"{name} {i}"] for i in range(5))
        np.testing.assert_array_equal(h, h_want)
        oracle.assert_close(y, want.y, what=f"{name}: y")
        for gradient in (dx, dresidual):
            oracle.assert_close(gradient, want.dx, terms=want.dx_terms, what=f"{name}: dx")
        oracle.assert_close(dgamma, want.dgamma, terms=want.dgamma_terms, what=f"{name}: dgamma")
