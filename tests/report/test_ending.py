"""Test the output at the end of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.ablations import with_figures
from tracker.analysis.claims import decide_claims
from tracker.cli.printing import print_cell, print_next, print_results
from tracker.report.page.html import render_page
from tracker.report.wording import layers_answer
from tracker.schema.records import CellRecord

from .conftest import build_cell


def cell_with_one_loss(benchmark: str) -> CellRecord:
    """Make a cell in which removing layer 0 surely costs much, and removing any other nothing."""
    cell = build_cell(benchmark, n=400, sample_seed=1234)

    def layer_fields(layer: int) -> dict[str, float]:
        drop = 0.2 if layer == 0 else 0.0
        bounds = {"accuracy_drop_low": drop - 0.04, "accuracy_drop_high": drop + 0.04}
        p_value = 1e-9 if layer == 0 else 0.9
        return {"accuracy_drop": drop, "drop_sd": 0.4, "mcnemar_p": p_value, **bounds}

    runs = tuple(with_figures(run, **layer_fields(run.change.layer)) for run in cell.runs)
    return cell.model_copy(update={"runs": runs})


def resize_benchmark(cell: CellRecord, documents: int) -> CellRecord:
    """Make the same of a benchmark that has so many documents."""
    (task,) = cell.benchmark.tasks
    tasks = (task.model_copy(update={"documents": documents}),)
    benchmark = cell.benchmark.model_copy(update={"tasks": tasks})
    return cell.model_copy(update={"benchmark": benchmark})


def test_a_benchmark_that_shows_nothing_leads_to_the_average_that_does(capsys):
    """Was: layer 0 matters, and on each benchmark none of 30 removals is shown to."""

    def weaker_cell(name: str) -> CellRecord:
        cell = cell_with_one_loss(name)
        bounds = {"accuracy_drop_low": 0.06, "accuracy_drop_high": 0.34, "mcnemar_p": 0.01}
        first_run = with_figures(cell.runs[0], **bounds)
        return cell.model_copy(update={"runs": (first_run, *cell.runs[1:])})

    cells = [weaker_cell("arc_easy"), weaker_cell("piqa")]
    print_results(cells)
    alone_text = (
        "On this benchmark alone, none of the 30 layers has a significant effect (the average "
        "above may have one)"
    )
    assert capsys.readouterr().out.count(alone_text) == 2
    page = render_page(cells, {})
    assert page.count(f"{alone_text}.") == 2
    assert "arc_easy and piqa falls without layer 0" in page
    assert "this benchmark alone" not in render_page(cells[:1], {})


@pytest.mark.parametrize("benchmarks", [["arc_easy"], ["arc_easy", "piqa"]])
def test_one_number_of_documents_is_named(benchmarks, capsys):
    """Was: 330 in the answer, 400 in the last line, another one below each table."""
    cells = [build_cell(name, n=100, sample_seed=1234) for name in benchmarks]
    print_results(cells)
    print_next("demo.yaml", Path("here"), cells)
    for cell in cells:
        print_cell(cell)
    output = " ".join(capsys.readouterr().out.split())
    (n_needed,) = re.findall(r"With about ([\d,]+) documents", output)
    assert f"--sample {n_needed.replace(',', '')} " in output
    assert {*re.findall(r"--sample \d+", output)} == {f"--sample {n_needed.replace(',', '')}"}
    assert "would take" not in output


def test_no_more_documents_are_asked_for_than_there_are(capsys):
    """Was: `--sample 1300` of a benchmark that has 570."""
    cell = resize_benchmark(build_cell(n=100, sample_seed=1234), 570)
    print_results([cell])
    print_next("demo.yaml", Path("here"), [cell])
    output = capsys.readouterr().out
    assert "documents, but there are only 570 of arc_easy." in output
    assert "'until' is cheaper than another benchmark" in output
    assert "--sample" not in output


@pytest.mark.parametrize(("documents", "loss"), [(1100, "3"), (8000, "1")])
def test_no_documents_are_asked_for_that_are_measured(documents, loss):
    """Was: 340 documents of each asked for where 400 were measured."""
    cell = resize_benchmark(cell_with_one_loss("arc_easy"), 10**6).model_copy(
        update={"n": documents}
    )
    text = layers_answer(decide_claims([cell]))
    match = re.search(rf"With about ([\d,]+) documents in all, a loss of {loss} pp would", text)
    assert match is not None, text
    assert int(match[1].replace(",", "")) > documents


def test_a_sample_counts_for_each_task(capsys):
    cell = build_cell("mmlu", n=100, sample_seed=1234)
    (task,) = cell.benchmark.tasks
    sizes = (100, *[400] * 9)
    tasks = [task.model_copy(update={"name": f"mmlu_{size}", "documents": size}) for size in sizes]
    group = cell.benchmark.model_copy(update={"tasks": tuple(tasks)})
    cell = cell.model_copy(update={"benchmark": group})
    n_needed = min(step.documents for step in decide_claims([cell]).next_steps())
    print_next("demo.yaml", Path("here"), [cell])
    sample = int(re.search(r"--sample (\d+)", capsys.readouterr().out)[1])
    n_drawn = [sum(min(size, limit) for size in sizes) for limit in (sample - 1, sample)]
    assert n_drawn[0] < n_needed <= n_drawn[1]
