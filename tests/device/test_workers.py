"""`--device all`: a process on each device, and the results of one process."""

from __future__ import annotations

import os
import sys

import pandas as pd

from tests.helpers.runs import RecordingProgress, read_outcomes, run_experiment, write_arc
from tracker.engine.scoring import row_size
from tracker.ledger.blocks import BLOCK_SIZE


def test_a_worker_on_each_device(tiny_llama, experiment, tmp_path, monkeypatch):
    heard, data = RecordingProgress(), str(write_arc(tmp_path / "data"))
    file = experiment(tiny_llama(layers=2), limit=BLOCK_SIZE + 4, data=data, layer=[0])
    monkeypatch.setattr(
        row_size, "ACCELERATOR_ROW_SIZES", (512,)
    )  # workers read what is kept of it
    points = tmp_path / "simulated-0.dist-info" / "entry_points.txt"
    points.parent.mkdir()
    points.write_text("[torch.backends]\nsim = tests.device.simulated:build")
    monkeypatch.syspath_prepend(tmp_path)  # torch imports the device in other processes, too
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("SIM_PROTECT", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    frames = []
    for device in ("sim:1", "all"):
        run_experiment(file, tmp_path / device, heard, device=device)
        frames.append(read_outcomes(tmp_path / device))
        assert frames[-1].pop("provenance").str.contains("simulated").all()
    assert any("2 workers: sim:0; sim:1" in line for line in heard.lines)
    pd.testing.assert_frame_equal(*frames, check_exact=True)
