"""Which executors there are."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.runs import Heard, arc, run, typed
from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError
from tracker.measuring.job import Options


@pytest.mark.parametrize(("executor", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_without_the_extra(tiny_llama, experiment, tmp_path, monkeypatch, executor, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"tracker.executors.{executor}", raising=False)
    file = experiment(tiny_llama(), data=str(arc(tmp_path / "data")))
    code, output = typed("run", file, "--results", tmp_path / "results", "--executor", executor)
    assert code == 2, output
    assert install_extra(executor) in output
    assert not (tmp_path / "results").exists()


def test_another_package_provides_one(tiny_llama, experiment, tmp_path, monkeypatch):
    file = experiment(tiny_llama(), data=str(arc(tmp_path / "data", 4)), layer=[0])
    points = tmp_path / "other-0.dist-info" / "entry_points.txt"
    points.parent.mkdir()
    points.write_text(
        "[layer_tracker.executors]\n"
        "other = tests.helpers.runs:OtherExecutor\n"
        "broken = tests.helpers.runs:Nowhere\n"
    )
    with pytest.raises(RequestError, match="there is no executor 'other'"):
        Options(executor="other")
    monkeypatch.syspath_prepend(tmp_path)
    _, output = typed("run", "--help")
    assert "[local|ray|slurm|broken|other]" in output
    heard = Heard()
    assert not run(file, tmp_path / "results", heard, executor="other").outcome.failed
    assert "measured by another package" in heard.lines
    code, output = typed("run", file, "--results", tmp_path / "none", "--executor", "broken")
    assert code == 2, output
    assert "broken, an entry point tests.helpers.runs:Nowhere, cannot be opened" in output
