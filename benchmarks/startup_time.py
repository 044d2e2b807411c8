"""Time from the start of a process to its first update."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import problem


def startup(method: str, dtype: str, sizes: problem.Sizes) -> dict[str, float]:
    """Seconds from the start of a process of bsce_jax.main to its first update.

    A run on the digits, which need no preparing, with the network and batch size of
    CIFAR-100; with an empty compilation cache, and with that which it leaves.
    """
    config = problem.configuration(method, "none", dtype, sizes)
    fields = {
        "model.name": config.model.name,
        "model.width": config.model.width,
        "model.dtype": dtype,
        "optim.batch_size": config.optim.batch_size,
        "phase.base.epochs": 1,
        "phase.base.milestones": "()",
    }
    file, found = problem.ROOT / "configs" / "digits.py", {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process keeps its share
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(problem.ROOT), os.environ.get("PYTHONPATH")))
            ),
        }
        for name in ("cold", "warm"):
            workdir = pathlib.Path(folder, name)
            command = [sys.executable, "-m", "bsce_jax.main", f"--workdir={workdir}"]
            command += [f"--config={file}:method={method},prior=none"]
            command += [f"--config.{k}={v}" for k, v in fields.items()]
            start = time.time()
            with (
                open(f"{folder}/log", "w") as log,
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log
                ) as process,
            ):
                results = workdir / "results.json"  # after the base step
                while not results.exists() and process.poll() is None:
                    time.sleep(0.1)
                process.kill()
            if not results.exists():
                sys.exit(f"error: {pathlib.Path(folder, 'log').read_text()[-2000:]}")
            telemetry = json.loads(results.read_text())["steps"][0]["telemetry"]
            first = telemetry["started"] + telemetry["seconds_to_first_update"]
            found[name] = round(first - start, 2)
    return found
