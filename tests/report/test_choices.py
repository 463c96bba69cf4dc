"""Test what is said of accuracy and of choice probability together, as one family."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import NormalDist

import pytest
from scipy import stats

from tracker.analysis.boards import layer_board
from tracker.analysis.claims import decide_claims, run_verdicts
from tracker.cli.printing import print_next
from tracker.report.tables import layer_table
from tracker.report.wording import layers_answer
from tracker.schema.estimates import Estimate
from tracker.schema.formats import metric_format

from .cells import CHOICE_DROPS, cell_of_choices
from .conftest import LAYERS

ALPHA = 0.05
SHARE = 0.45
"""Of the error rate, for each of the two measures; the rest is for all options together."""


def test_all_intervals_hold_together():
    cell = cell_of_choices()
    claims = decide_claims([cell])
    level = 1 - ALPHA * SHARE / LAYERS / 2
    normal = NormalDist().inv_cdf(level) / NormalDist().inv_cdf(0.975)
    df = cell.n - 1
    student = float(stats.t.ppf(level, df) / stats.t.ppf(0.975, df))
    for layer, drop in CHOICE_DROPS.items():
        choice = claims.choices[layer]
        assert choice.value == pytest.approx(drop)
        # The number of statements is a whole number, so an interval is a bit wider.
        assert choice.high - drop == pytest.approx(0.005 * student, rel=2e-3)
        assert claims.drops[layer].high - claims.drops[layer].value == pytest.approx(
            0.1 * normal, rel=2e-3
        )


def test_an_exact_test_must_agree_at_the_same_level():
    """A p-value of 0.04 / 30 is below 5 % after Holm's adjustment, and not below 2.25 %."""
    cell = cell_of_choices()
    first, *others = (
        run.model_copy(update={"drop": Estimate(0.4, 0.3, 0.5, 0.04 / LAYERS)}) for run in cell.runs
    )
    runs = (first, *(run.model_copy(update={"drop": cell.runs[5].drop}) for run in others))
    assert decide_claims([cell.model_copy(update={"runs": runs})]).costly == []
    without = [run.model_copy(update={"choice_drop": Estimate(None)}) for run in runs]
    assert decide_claims([cell.model_copy(update={"runs": tuple(without)})]).costly == [0]


@pytest.mark.parametrize(
    ("metric", "level"),
    [
        ("choice_probability", "Choice probability"),
        ("choice_probability_norm", "Normalised choice probability"),
    ],
)
def test_a_cell_by_choice_probability_says_so(metric, level):
    cell = cell_of_choices(metric=metric)
    claims = decide_claims([cell])
    assert not claims.choices
    assert layers_answer(claims).startswith(f"{level} on arc_easy falls without layer 1.")
    assert metric_format(cell).change == f"{level.lower()} drop"
    assert "less probable" not in layers_answer(claims)


def test_the_next_step_is_the_cheaper_measure(capsys):
    cell = cell_of_choices(n=100, half_width=0.03, outcome_seconds=0.02, sample_seed=1234)
    accuracy, choice = decide_claims([cell]).next_steps()
    assert (accuracy.measure, choice.measure) == ("", "choice_probability")
    assert choice.documents < accuracy.documents
    assert choice.seconds == pytest.approx((choice.documents - 100) * 31 * 0.02)
    # As many as reveal the loss, by the variance in an interval of 100 documents.
    deviation = 0.06 / NormalDist().inv_cdf(0.975) * 10
    quantile = NormalDist().inv_cdf(1 - ALPHA * SHARE / LAYERS / 2) + NormalDist().inv_cdf(0.8)
    assert choice.documents == pytest.approx((quantile * deviation / choice.loss) ** 2, rel=0.05)
    print_next("demo.yaml", Path("results"), [cell])
    sample = re.search(r"--sample (\d+)", capsys.readouterr().out)
    assert sample is not None
    assert int(sample[1]) == choice.documents


def test_measures_that_disagree_are_not_called_open():
    """Layer 1 costs accuracy while its choice probability rises."""
    cell = cell_of_choices()
    runs = [
        run.model_copy(update={"choice_drop": Estimate(-0.1, -0.11, -0.09)})
        if run.change.layer == 1
        else run
        for run in cell.runs
    ]
    claims = decide_claims([cell.model_copy(update={"runs": tuple(runs)})])
    assert claims.costly == [1]
    assert 1 not in {*claims.more_probable, *claims.small_by_choice}
    assert "Without layer 2 (" in layers_answer(claims)


def test_the_rest_of_a_page_names_the_same_layers():
    """An interval that excludes 0 for 30 layers, and not for 67 statements."""
    cell = cell_of_choices()
    runs = [
        run.model_copy(update={"drop": Estimate(0.165, 0.065, 0.265, 1e-9)})
        if run.change.layer == 5
        else run
        for run in cell.runs
    ]
    cell = cell.model_copy(update={"runs": tuple(runs)})
    claims, verdicts = decide_claims([cell]), run_verdicts(cell, cell.whole_layers)
    assert claims.costly == [1]
    assert [run.layer for run, verdict in verdicts.items() if verdict == "costs"] == [1]
    plain = [run.model_copy(update={"choice_drop": Estimate(None)}) for run in runs]
    without = cell.model_copy(update={"runs": tuple(plain)})
    assert decide_claims([without]).costly == [1, 5]


def test_an_undefined_layer_takes_nothing_from_the_others():
    cell = cell_of_choices()
    first, *others = cell.runs
    undefined = first.model_copy(update={"choice_drop": Estimate(None, reason="not finite")})
    claims = decide_claims([cell.model_copy(update={"runs": (undefined, *others)})])
    assert [*claims.choices] == [*range(1, LAYERS)]
    assert claims.word(0) == "open"


def test_different_quantities_have_no_mean():
    accuracy, choice = cell_of_choices(), cell_of_choices(benchmark="piqa")
    choice = choice.model_copy(update={"metric": "choice_probability"})
    board = layer_board([accuracy, choice])
    assert board.cells == (accuracy,)
    assert [*board.left_out.values()] == [
        "the mean over benchmarks cannot combine accuracy with the metric choice_probability"
    ]
    assert "on arc_easy falls" in layers_answer(board.claims)


@pytest.mark.parametrize("metric", ["acc", "choice_probability", "choice_probability_norm"])
def test_no_two_columns_have_one_heading(metric):
    headings = [heading.label for heading in layer_table(cell_of_choices(metric=metric)).headings]
    assert len({*headings}) == len(headings)
