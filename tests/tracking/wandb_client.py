"""The real W&B client and CLI, in processes of their own because the SDK keeps global state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.wandb_double import WandbDouble

BIN = Path(sys.executable).parent
FAST_AGENT = """
from wandb.cli.cli import cli
from wandb.wandb_agent import Agent
Agent.POLL_INTERVAL = 0.5
cli()
"""
"""The agent as it is, but for the 5 s between two looks at its trials."""


class Client:
    """Runs programs that know of a double, a folder and the tests' cache, and of nothing else."""

    def __init__(self, double: WandbDouble, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": os.pathsep.join([str(BIN), os.defpath]),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "WANDB_BASE_URL": double.url,
            "WANDB_API_KEY": double.key,
            "WANDB_SILENT": "true",
            "WANDB_ERROR_REPORTING": "false",
        }
        # The code, threads and kernels of the process that compares: figures agree to the last
        # digit.
        prefixes = ("PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_")
        self.environment |= {n: value for n, value in os.environ.items() if n.startswith(prefixes)}
        # What any process of this run of the tests has found out, none finds out again.
        self.environment["TRACKER_CACHE"] = os.environ["TRACKER_CACHE"]
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            self.environment[f"WANDB_{name}"] = str(folder / name.lower())
            (folder / name.lower()).mkdir()

    def lend(self, patch: pytest.MonkeyPatch, **environment: str) -> None:
        """Configure this process for the double and no other W&B, as the programs do."""
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            patch.delenv(name)
        for name, value in {**self.environment, **environment}.items():
            if name.startswith("WANDB") or name == "HOME":
                patch.setenv(name, value)

    def trial(self, run_id: str) -> dict[str, str]:
        """Make the environment of a trial of a sweep `s1` over layer 1, as an agent does."""
        sweep_file = self.folder / "sweep.json"
        sweep_file.write_text('{"wandb_version": 1, "layer": {"value": 1}}')
        variables = {"SWEEP_ID": "s1", "RUN_ID": run_id, "ENTITY": "team", "PROJECT": "layers"}
        variables["SWEEP_PARAM_PATH"] = str(sweep_file)
        return {f"WANDB_{name}": value for name, value in variables.items()}

    def call(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"cwd": self.folder, "env": {**self.environment, **environment}}
        return subprocess.run(command, capture_output=True, text=True, check=False, **settings)

    def python(self, program: str, *arguments: str, **environment: str) -> str:
        completed = self.call(sys.executable, "-c", program, *arguments, **environment)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def cli(self, *arguments: str) -> str:
        completed = self.call(str(BIN / "wandb"), *arguments)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def agent(self, sweep: str) -> str:
        """Run `wandb agent` until the sweep is done; returns what its trials printed."""
        completed = self.call(sys.executable, "-c", FAST_AGENT, "agent", sweep)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout + completed.stderr

    def read(self, *expressions: str) -> list[Any]:
        """Evaluate expressions of `api` where nothing of the writer is left."""
        values_text = f"[{', '.join(expressions)}]"
        program = f"import json, wandb\napi = wandb.Api()\nprint(json.dumps({values_text}))"
        values: list[Any] = json.loads(self.python(program))
        return values
