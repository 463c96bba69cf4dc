"""What a run prints at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracker.cli.printing import print_measured, print_next
from tracker.core.records import CellRecord

from .conftest import build_cell


def mattering(benchmark: str) -> CellRecord:
    """Make a cell in which removing layer 0 surely costs much, and removing any other nothing."""
    cell = build_cell(benchmark, n=400, sample_seed=1234)

    def changed(layer: int) -> dict[str, float]:
        drop = 0.2 if layer == 0 else 0.0
        ends = {"accuracy_drop_low": drop - 0.04, "accuracy_drop_high": drop + 0.04}
        p_value = 1e-9 if layer == 0 else 0.9
        return {"accuracy_drop": drop, "drop_sd": 0.4, "mcnemar_p": p_value, **ends}

    runs = tuple(run.model_copy(update=changed(run.layer)) for run in cell.runs)
    return cell.model_copy(update={"runs": runs})


@pytest.mark.parametrize("benchmarks", [["arc_easy"], ["arc_easy", "piqa"]])
def test_a_run_ends_with_its_answer_and_lists_what_is_shown(
    benchmarks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_measured([mattering(name) for name in benchmarks])
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "without layer 0" in next(filter(None, lines)), "the answer comes first"
    assert "50.0 %" in said
    assert "guessing" in said
    assert f"29 of {len(mattering('arc_easy').runs)} runs are not listed" in said
    tables = [line for line in lines if line.split()[:1] == ["0"]]
    assert len(tables) == (1 if len(benchmarks) == 1 else 3), "each benchmark's, and the mean's"
    assert not [line for line in lines if line.split()[:1] == ["5"]]


def test_what_is_undefined_is_not_called_chance(capsys: pytest.CaptureFixture[str]) -> None:
    cell = mattering("arc_easy")
    gone = {f"accuracy_drop{end}": None for end in ("", "_low", "_high")} | {"mcnemar_p": None}
    gone |= {"reasons": {"accuracy_drop": "nothing was asked"}}
    runs = [run.model_copy(update=gone if run.layer > 27 else {}) for run in cell.runs]
    print_measured([cell.model_copy(update={"runs": tuple(runs)})])
    said = capsys.readouterr().out
    assert f"27 of {len(runs)} runs are not listed: by itself" in said
    assert "the drop of layer 28 and 1 more is undefined (nothing was asked)" in said


def test_a_run_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [build_cell(n=100, sample_seed=1234)]
    print_next("demo.yaml", Path("here"), cells)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "all figures: tracker report --format csv --results here"
    assert said[1].startswith("next")
    assert said[1].endswith("--results here")
