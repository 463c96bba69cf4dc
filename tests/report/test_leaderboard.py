"""Leaderboards agree with a plain second computation, and never average what does not compare."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from statistics import NormalDist
from typing import Any

import pytest
from click.testing import CliRunner

from tests.helpers.ablations import with_change, with_figures
from tests.helpers.answers import answer_record, run_answer
from tracker.analysis.agreement import agreements, drop_differences
from tracker.analysis.boards import (
    ModelBoard,
    layer_board,
    model_board,
    part_boards,
    relevance_estimate,
)
from tracker.analysis.claims import decide_claims
from tracker.analysis.comparable import benchmark_labels, comparison_key, row_labels
from tracker.cli import main
from tracker.ledger.cells import last_measured
from tracker.report.charts.headline import headline_chart
from tracker.report.export import build_boards
from tracker.report.leaderboard import layer_board_table
from tracker.report.page.sections import model_sections
from tracker.report.tables import overview_table
from tracker.report.wording import board_answer, model_answer, open_models_sentence, parts_answer
from tracker.schema.estimates import Estimate
from tracker.schema.records import CellRecord, RunRecord
from tracker.team.collect import remove_contained
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import describe_run

from .cells import (
    MIDDLE_EDITION,
    NEW_EDITION,
    OLD_EDITION,
    edited_cell,
    keep_layers,
    models_sharing_one,
)
from .conftest import LAYERS, build_cell, digest, read_table, replace_layer


def relevances(cells: list[CellRecord], layer: int) -> list[float]:
    return [cell.runs_of_kind()[layer].accuracy_relevance for cell in cells]


def model_ranks(board: ModelBoard) -> dict[str, int | None]:
    """Model → rank, in the order of the board."""
    return {standing.model.name: standing.rank.value for standing in board.models}


def test_layers_stand_where_their_mean_relevance_puts_them():
    cells = [build_cell(name, n=200, seed=4) for name in ("arc_easy", "piqa", "sciq")]
    board = layer_board(cells)
    means = {layer: statistics.mean(relevances(cells, layer)) for layer in range(LAYERS)}
    assert len(board.parts) == LAYERS
    assert not board.left_out

    def expected_rank(figures: dict[int, float], layer: int) -> int:
        return 1 + sum(round(figure, 12) > round(figures[layer], 12) for figure in figures.values())

    for standing in board.parts:
        assert standing.relevance.value == pytest.approx(means[standing.layer])
        assert standing.rank.value == expected_rank(means, standing.layer)
        assert standing.benchmarks == 3
        assert standing.rank.low <= standing.rank.value <= standing.rank.high
    assert [standing.rank.value for standing in board.ranked] == sorted(
        standing.rank.value for standing in board.parts
    )
    assert board.ranked[0].layer == max(means, key=means.get)


def test_the_interval_that_decides_is_shown_and_orders():
    """Was: 12.5 pp (4.6 to 20.1) was open beside 12.0 pp (4.7 to 19.0), which matters."""
    cells = [build_cell(name, n=100, seed=4) for name in ("arc_easy", "piqa")]
    drops_of_layer = {
        0: [(0.125, -0.05, 0.3), (0.125, 0.06, 0.19)],
        11: [(0.12, 0.03, 0.21), (0.12, 0.04, 0.20)],
    }
    for layer, drops in drops_of_layer.items():
        for number, (drop, low, high) in enumerate(drops):
            figures = {"accuracy_drop": drop, "accuracy_drop_low": low, "accuracy_drop_high": high}
            cells[number] = replace_layer(cells[number], layer, **figures, mcnemar_p=0.0001)
    board = layer_board(cells)
    quantile = NormalDist().inv_cdf(1 - 0.025 / LAYERS) / NormalDist().inv_cdf(0.975)
    for standing in board.parts:
        runs = [cell.runs_of_kind()[standing.layer] for cell in cells]
        half_width = math.hypot(*(run.drop.high - run.drop.low for run in runs)) / 4
        mean_drop = statistics.mean(run.drop.value for run in runs)
        assert standing.deciding.low == pytest.approx(mean_drop - quantile * half_width)
        assert (standing.shown == "matters") == (standing.deciding.low > 0)
    lower_bounds = [standing.deciding.low for standing in board.parts]
    assert lower_bounds == sorted(lower_bounds, reverse=True)
    order = [standing.layer for standing in board.parts]
    assert order.index(11) < order.index(0)
    table = layer_board_table(board, "m")
    column = [heading.label for heading in table.headings].index(
        "mean accuracy drop (simultaneous 95 % intervals of all rows)"
    )
    drops = [row[column].text for row in read_table(table).rows]
    assert drops[order.index(0)].startswith("12.5 (−"), drops
    assert drops[order.index(11)].startswith("12.0 (")
    assert "−" not in drops[order.index(11)]


def heads_of_layers(cell: CellRecord, *other_runs: RunRecord) -> CellRecord:
    """Build the same figures of heads, two a layer; `other_runs` are its other runs."""
    heads = [
        with_change(run, component="head", layer=run.change.layer // 2, number=run.change.layer % 2)
        for run in cell.runs
    ]
    return cell.model_copy(update={"runs": (*other_runs, *heads)})


def test_heads_stand_where_layers_of_the_same_figures_do():
    cells = [build_cell(name, n=200, seed=4) for name in ("arc_easy", "piqa")]
    layers_board, layer_claims = layer_board(cells), decide_claims(cells)
    (board,) = part_boards([heads_of_layers(cells[0], *cells[0].runs), heads_of_layers(cells[1])])
    assert not board.left_out
    part_figures = [
        (2 * p.change.layer + p.change.number, p.relevance, p.deciding, p.rank) for p in board.parts
    ]
    assert part_figures == [
        (layer.layer, layer.relevance, layer.deciding, layer.rank) for layer in layers_board.parts
    ]
    assert {2 * p.change.layer + p.change.number: p.shown for p in board.parts} == {
        layer: layer_claims.word(layer) for layer in range(LAYERS)
    }
    worst_part = max(board.parts, key=lambda part: part.deciding.value)
    text = board_answer(board)
    assert text.startswith(f"Of {LAYERS} heads {len(layer_claims.costly)} are shown to cost")
    assert f": {worst_part.change.label()}" in text


def test_reports_name_the_metric_of_traces():
    """Was: they called it an accuracy. An interval ends at what is possible."""
    cell = build_cell(n=100).model_copy(update={"metric": "answer_kept,number"})
    cell = replace_layer(cell, 3, accuracy_drop=0.9, accuracy_drop_low=0.5, accuracy_drop_high=1.3)
    table = layer_board_table(layer_board([cell]), "m")
    label = "mean answer retention drop (simultaneous 95 % intervals of all rows)"
    column = [heading.label for heading in table.headings].index(label)
    first, *_ = read_table(table).rows
    assert first[column].text.endswith(" to 100.0)")
    (board,) = part_boards([heads_of_layers(cell)])
    assert "answer retention on arc_easy" in board_answer(board)
    headings = [heading.label for heading in overview_table([cell]).headings]
    assert "baseline answer retention with 95 % interval" in headings
    assert "answer retention" in headline_chart(layer_board([cell]), "m").explanation


def test_a_part_without_a_figure_has_no_rank_and_one_that_lacks_a_benchmark_no_row():
    undefined_figures = dict.fromkeys(
        ("accuracy", "accuracy_drop", "accuracy_relevance", "mcnemar_p")
    )
    reason_fields = {"reasons": dict.fromkeys(undefined_figures, "nothing reaches it")}
    cells = [
        replace_layer(build_cell(), 3, **undefined_figures, **reason_fields),
        build_cell("piqa", missing=(7,)),
    ]
    (board,) = part_boards([heads_of_layers(cell) for cell in cells])
    assert len(board.parts) == LAYERS - 1
    (unranked_part,) = [part for part in board.parts if part.rank.value is None]
    assert (unranked_part.change.label(), unranked_part.shown) == ("layer 1 head 1", "open")
    (single_board,) = part_boards([heads_of_layers(cells[0])])
    last_part = single_board.parts[-1]
    assert (last_part.rank.value, last_part.rank.reason) == (None, "nothing reaches it")
    assert last_part.shown == "undefined"


def test_parts_of_which_no_benchmark_counts_are_spoken_of_one_by_one():
    """Was: nothing can be said of the layers."""
    cell = build_cell()
    runs = [
        run.model_copy(update={"accuracy_relevance": None}) for run in heads_of_layers(cell).runs
    ]
    weak_cell = cell.model_copy(update={"runs": tuple(runs)})
    assert part_boards([weak_cell]) == []
    answer_text = model_answer(decide_claims([weak_cell]), [], [weak_cell])
    assert answer_text == f"arc_easy: {parts_answer(weak_cell)}"
    assert "no statement about the layers" in model_answer(decide_claims([]), [], [])


def test_a_relevance_has_the_interval_of_its_drop_over_the_baseline():
    cell = build_cell(n=400, baseline=0.75)
    record = cell.runs[0]
    estimate = relevance_estimate(cell, record)
    assert estimate.value == record.accuracy_relevance
    assert estimate.low < estimate.value < estimate.high <= 1
    # With a baseline that is known exactly, it is the drop's interval, scaled.
    exact_cell = cell.model_copy(update={"baseline": Estimate(0.75, 0.75, 0.75)})
    scaled_estimate = relevance_estimate(exact_cell, record)
    assert scaled_estimate.low == pytest.approx(record.drop.low / 0.5)
    assert scaled_estimate.high == pytest.approx(record.drop.high / 0.5)
    weak_cell = build_cell(n=40, baseline=0.3)
    assert weak_cell.baseline.low is not None
    assert weak_cell.baseline.low < 0.25
    assert relevance_estimate(weak_cell, weak_cell.runs[0]).low is None


def test_a_layer_that_lacks_a_benchmark_has_no_rank():
    cells = [build_cell("arc_easy", missing=(7,)), build_cell("piqa")]
    board = layer_board(cells)
    last_standing = board.parts[-1]
    assert (
        last_standing.layer,
        last_standing.rank.value,
        last_standing.benchmarks,
        last_standing.rank.low,
    ) == (7, None, 1, None)
    assert last_standing.relevance.value == pytest.approx(relevances([cells[1]], 7)[0])
    assert sum(standing.rank.value is None for standing in board.parts) == 1


def test_models_are_ranked_on_what_all_of_them_share():
    cells = models_sharing_one()
    board = model_board(cells)
    assert board.benchmarks == ("arc_easy · 0-shot",)
    assert model_ranks(board) == {"solid": 1, "other": 2, "weak": 3}
    solid_standing = board.models[0]
    values = [relevances([cells[0]], layer)[0] for layer in range(LAYERS)]
    assert solid_standing.relevance.value == pytest.approx(statistics.mean(values))
    assert solid_standing.layers == LAYERS
    assert solid_standing.worst_layer is None, "two layers cost about as much"
    widening = NormalDist().inv_cdf(1 - 0.025 / LAYERS) / NormalDist().inv_cdf(0.975)
    half_width = (cells[0].runs[0].drop.high - cells[0].runs[0].drop.low) / 2
    assert solid_standing.costly == sum(
        r.drop.value - widening * half_width > 0 for r in cells[0].runs
    )


def test_models_are_told_apart_where_their_intervals_are():
    """Was a place each, 1 and 2, however little their documents say of it."""
    for documents, is_distinct in ((160, False), (200_000, True)):
        cells = [build_cell(model="weak", n=documents, baseline=0.5)]
        cells.append(build_cell(model="solid", n=documents, baseline=0.9))
        board = model_board(cells)
        assert model_ranks(board) == {"solid": 1, "weak": 2}
        rank_ranges = [(standing.rank.low, standing.rank.high) for standing in board.models]
        assert rank_ranges == ([(1, 1), (2, 2)] if is_distinct else [(1, 2), (1, 2)])
        assert bool(open_models_sentence(board)) is not is_distinct
    # With as many documents as it names, a difference of 0.1 is one of its intervals and some more.
    small_board = model_board([build_cell(model=name, n=160) for name in ("a", "b")])
    half_width = (small_board.models[0].relevance.high - small_board.models[0].relevance.low) / 2
    quantile = NormalDist().inv_cdf
    at_needed = half_width * math.sqrt(2 * 160 / small_board.needed)
    assert at_needed * (1 + quantile(0.8) / quantile(0.975)) == pytest.approx(0.1, rel=1e-3)


def test_a_rank_lies_in_its_interval_below_chance_too():
    """Was ranked by relevances, which end at 1, and held against drops, which do not."""
    easy_cell, hard_cell = (
        build_cell(name, n=1_000_000, baseline=0.75) for name in ("arc_easy", "piqa")
    )
    for layer, drops in ((5, (0.75, 0.0)), (6, (0.5, 0.2))):
        easy_cell, hard_cell = (
            replace_layer(
                cell,
                layer,
                accuracy_drop=drop,
                accuracy_drop_low=drop - 0.001,
                accuracy_drop_high=drop + 0.001,
                accuracy_relevance=min(drop / 0.5, 1.0),
            )
            for cell, drop in zip((easy_cell, hard_cell), drops, strict=True)
        )
    standings = layer_board([easy_cell, hard_cell]).ranked
    assert all(
        standing.rank.low <= standing.rank.value <= standing.rank.high for standing in standings
    )
    assert [standing.layer for standing in standings[:2]] == [6, 5]


def test_a_benchmark_that_a_model_only_guesses_is_left_out_in_one_line():
    """Was said twice, the second time as 'not measured, or otherwise'."""
    shared_cells = [build_cell("arc_easy", model=name, n=100) for name in ("a", "b")]
    known_cell, guessed_cell = (build_cell("piqa", model=name, n=100) for name in ("a", "b"))
    reason = "the baseline is at or below chance"
    undefined_figures = {"accuracy_relevance": None, "reasons": {"accuracy_relevance": reason}}
    runs = tuple(run.model_copy(update=undefined_figures) for run in guessed_cell.runs)
    board = model_board([*shared_cells, known_cell, guessed_cell.model_copy(update={"runs": runs})])
    assert board.left_out == {"piqa · 0-shot": f"b: {reason}"}


def test_more_documents_of_one_model_take_nobodys_rank():
    """Was: one colleague's larger n left no benchmark that all models shared."""
    small_cells = [build_cell(model=name, n=100, seed=3) for name in ("a", "b", "c")]
    small_board = model_board(small_cells)
    assert all(s.rank.value for s in small_board.models)
    large_cell = build_cell(model="a", n=400, seed=3)
    # The colleague adds to what was there …
    board = model_board([*small_cells, large_cell])
    assert board.models == small_board.models
    assert board.left_out == {"arc_easy · 0-shot · 400 documents": "no such measurement of b, c"}
    # … or it is gone: the others are still ranked, and it is said why one is not.
    board = model_board([large_cell, *small_cells[1:]])
    assert {name for name, rank in model_ranks(board).items() if rank is None} == {"a"}
    assert board.left_out["a"] == "not all layers of the model are measured on arc_easy · 0-shot"
    # When all have more, more counts.
    large_cells = [build_cell(model=name, n=400, seed=3) for name in ("a", "b", "c")]
    board = model_board([*small_cells, *large_cells])
    assert board.benchmarks == ("arc_easy · 0-shot",)
    assert board.models == model_board(large_cells).models
    assert list(board.left_out.values()) == [
        "another measurement of the benchmark has more documents; only the largest counts"
    ]


def test_a_few_layers_on_more_documents_do_not_stand_for_all():
    whole_cell, part_cell = build_cell(n=100), keep_layers(build_cell(n=400), 15, 16)
    assert layer_board([part_cell, whole_cell]).cells == (whole_cell,)
    own_cell, other_cell = (
        build_cell(n=100),
        build_cell(n=100).model_copy(update={"metric": "acc_norm"}),
    )
    board = layer_board([other_cell, own_cell])
    assert board.cells == (own_cell,)
    assert board.left_out == {
        "arc_easy · 0-shot · acc_norm": (
            "the ranking uses another measurement of this benchmark: arc_easy · 0-shot · acc"
        )
    }


@pytest.mark.parametrize(
    "change", [{"n": 80}, {"num_fewshot": 5}, {"metric": "acc_norm"}, {"sample_seed": 1234}]
)
def test_other_settings_are_not_compared(change):
    cell, other_cell = build_cell(model="a"), build_cell(model="b")
    assert comparison_key(cell) == comparison_key(other_cell)
    if "num_fewshot" in change:
        change = {"benchmark": other_cell.benchmark.model_copy(update=change)}
    other_cell = other_cell.model_copy(update=change)
    assert comparison_key(cell) != comparison_key(other_cell)
    board = model_board([cell, other_cell])
    assert board.benchmarks == ()
    assert all(s.rank.value is None and s.relevance.value is None for s in board.models)
    assert len(board.left_out) == 2


def test_as_many_drawn_documents_are_others_and_count_first():
    first_cell = build_cell()
    sampled_cells = [first_cell.model_copy(update={"sample_seed": seed}) for seed in (1234, 7)]
    assert len({comparison_key(cell) for cell in (first_cell, *sampled_cells)}) == 3
    board = layer_board([first_cell, sampled_cells[0]])
    assert board.cells == (sampled_cells[0],)
    label = "arc_easy · 0-shot · 160 documents"
    assert board.left_out == {
        label: "the ranking uses another measurement of this benchmark: "
        f"{label} drawn at random (seed 1234)"
    }
    models = [build_cell(model=name).model for name in "ab"]
    model_cells = [
        c.model_copy(update={"model": m}) for m in models for c in (first_cell, sampled_cells[0])
    ]
    assert model_board(model_cells).benchmarks == ("arc_easy · 0-shot",)
    assert all(model_ranks(model_board(model_cells)).values())


def test_as_many_documents_are_not_the_same_ones_while_a_cell_grows():
    cell, other_cell = build_cell(model="a"), build_cell(model="b")
    growing_cell = other_cell.model_copy(
        update={"unfinished": "160 of 200 documents are measured so far"}
    )
    assert comparison_key(cell) == comparison_key(other_cell) != comparison_key(growing_cell)
    assert all(s.rank.value is None for s in model_board([cell, growing_cell]).models)
    # The source of equal documents does not count.
    hub_benchmark = other_cell.benchmark.model_copy(update={"data": "hub"})
    assert comparison_key(cell) == comparison_key(
        other_cell.model_copy(update={"benchmark": hub_benchmark})
    )


def test_two_models_are_compared_layer_by_layer():
    cell, other_cell = build_cell(model="base", seed=1), build_cell(model="instruct", seed=2)
    other_cell = other_cell.model_copy(update={"runs": other_cell.runs[:10]})
    differences = drop_differences(cell, other_cell)
    assert sorted(differences) == list(range(10))
    assert differences[3].value == pytest.approx(
        cell.runs[3].drop.value - other_cell.runs[3].drop.value
    )
    half_width = cell.runs[3].drop.high - cell.runs[3].drop.value
    assert differences[3].high == pytest.approx(differences[3].value + half_width * 2**0.5)


def test_proxies_are_set_beside_chance():
    cell = build_cell()
    perfect_runs = tuple(
        r.model_copy(update={"relative_update": 1.0 + r.drop.value}) for r in cell.runs
    )
    proxy_agreements = {
        a.proxy: a for a in agreements([cell.model_copy(update={"runs": perfect_runs})])
    }
    assert proxy_agreements["relative_update"].differ == 0
    drop_counts = Counter(r.drop.value for r in cell.runs).values()
    by_chance = 1 - sum(count**2 for count in drop_counts) / LAYERS**2
    assert proxy_agreements["relative_update"].chance == pytest.approx(by_chance)
    assert proxy_agreements["cosine_score"].differ > 0.5
    assert len(proxy_agreements["cosine_score"].spearman) == 1
    assert agreements([])[0].differ is None


STOPPED_REASON = (
    "the measurement stopped when 'top 2' was answered: each run was evaluated on 64 to 96 of "
    "2000 documents"
)


def stopped_cell(**changes: Any) -> CellRecord:
    """Return a cell whose layers 0 and 1 were looked at longer than the others."""
    cell = build_cell(n=64)
    longer_runs = [
        record.model_copy(update={"n": 96}) if record.change.layer < 2 else record
        for record in cell.runs
    ]
    runs = [with_figures(record, mcnemar_p=None) for record in longer_runs]
    answers = (
        run_answer(record.change.layer, "+" if record.change.layer < 2 else "", n=record.n)
        for record in runs
    )
    stopped_answer = answer_record("top 2", *answers, looked=96, measured=96)
    return build_cell(
        **{"n": 64, "runs": tuple(runs), "answer": stopped_answer, "unfinished": STOPPED_REASON}
        | changes
    )


@pytest.fixture(scope="module")
def cell() -> CellRecord:
    return stopped_cell()


def test_its_layers_are_not_ranked_beside_others(cell):
    whole_cell = build_cell("piqa")
    board = layer_board([cell, whole_cell])
    assert [board_cell.benchmark.name for board_cell in board.cells] == ["piqa"]
    assert board.left_out == {"arc_easy · 0-shot · stopped at an answer": STOPPED_REASON}
    assert agreements([cell, whole_cell]) == agreements([whole_cell])
    assert not layer_board([cell]).parts
    (section,) = model_sections([cell], {})
    assert "headline" not in section.charts


def test_an_answer_stands_beside_the_whole_cell_and_another_answer(cell):
    whole_cell = build_cell(n=2000)
    assert remove_contained([cell, whole_cell]) == [cell, whole_cell]
    other_cell = stopped_cell(answer=cell.answer.model_copy(update={"question": "sign"}))
    assert remove_contained([cell, other_cell]) == [cell, other_cell]
    assert remove_contained([cell, cell]) == [cell]


def test_a_run_is_updated_when_its_part_of_the_answer_changes(cell):
    """Its figures are the same, its tags are not."""
    runs = [
        answer_run.model_copy(update={"chosen": not answer_run.chosen})
        for answer_run in cell.answer.runs
    ]
    other_cell = stopped_cell(answer=cell.answer.model_copy(update={"runs": tuple(runs)}))
    for digest_of in (
        lambda c: mlflow_run(describe_run(c, c.runs[3]), "p").digest,
        lambda c: describe_run(c, c.runs[3]).digest(),
    ):
        assert digest_of(cell) == digest_of(cell)
        assert digest_of(cell) != digest_of(other_cell)
    assert run_key(cell, "cell") == run_key(build_cell(), "cell"), "continued, it is the same run"


LATEST_LABEL = f"measured 2026-11-28 09:30:00 UTC ({NEW_EDITION.key[:8]})"


def test_the_list_tells_them_apart(monkeypatch):
    """By more than the key."""
    monkeypatch.setattr("tracker.api.ls", lambda *args: [OLD_EDITION, NEW_EDITION, MIDDLE_EDITION])
    result = CliRunner().invoke(main, ["ls"])
    assert result.exit_code == 0
    for (_, label), row in zip(
        row_labels([OLD_EDITION, NEW_EDITION, MIDDLE_EDITION]),
        result.output.splitlines()[1:],
        strict=True,
    ):
        assert f"our_sums (acc) · {label}" in row


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"benchmark": {"data": "hub"}}, "hub"),
        ({"benchmark": {"seed": 7}}, "seed 7"),
        ({"benchmark": {"apply_chat_template": True}}, "chat"),
        ({"benchmark": {"settings": {"system_instruction": "Add."}}}, "system_instruction=Add."),
    ],
)
def test_what_else_tells_rows_apart_is_shown(changes, says):
    other_cell = edited_cell("one", "2026-11-28T00:00:00+00:00", key=digest("other"), **changes)
    assert row_labels([OLD_EDITION, other_cell])[1][1] == says
    assert says in benchmark_labels([OLD_EDITION, other_cell])[1]


@pytest.mark.parametrize(
    "cells",
    [
        [OLD_EDITION, NEW_EDITION, MIDDLE_EDITION],
        [NEW_EDITION, MIDDLE_EDITION, OLD_EDITION],
        [MIDDLE_EDITION, OLD_EDITION, NEW_EDITION],
    ],
)
def test_the_board_takes_the_latest_and_names_the_others(cells):
    """Was: the first in order, which may be outdated."""
    board = layer_board(cells)
    assert board.cells == (NEW_EDITION,)
    other_labels = [label for label in benchmark_labels(cells) if LATEST_LABEL not in label]
    reason = (
        "the task was edited after this measurement; only the latest measurement counts: "
        f"our_sums · 0-shot · {LATEST_LABEL}"
    )
    assert board.left_out == dict.fromkeys(other_labels, reason)
    _, notes = build_boards(cells)
    assert [note for note in notes if "edited" in note] == [
        f"SmolLM2: {label} is left out of the ranking: {reason}." for label in other_labels
    ]


def test_a_larger_edition_that_is_outdated_does_not_count():
    small_cell = NEW_EDITION.model_copy(update={"n": 16})
    assert layer_board([OLD_EDITION, small_cell]).cells == (small_cell,)
    # Other documents of one edition are no edit: the larger counts, as ever.
    assert layer_board([small_cell, NEW_EDITION]).cells == (NEW_EDITION,)
    # Nor are other data or settings.
    hub_cell = edited_cell("hub", "2026-11-29T00:00:00+00:00", benchmark={"data": "hub"}, n=16)
    assert layer_board([NEW_EDITION, hub_cell]).cells == (NEW_EDITION,)


def test_models_are_compared_on_the_latest_that_they_share():
    other_cells = [
        edited_cell(name, OLD_EDITION.measured, model="Other") for name in ("one", "two")
    ]
    board = model_board([OLD_EDITION, NEW_EDITION, *other_cells])
    assert len(board.benchmarks) == 1
    assert (
        "the task was edited after this measurement; only the latest measurement counts"
        in board.left_out.values()
    )
    # Where they do not share it, they are compared on what they share.
    board = model_board([OLD_EDITION, NEW_EDITION, other_cells[0]])
    assert [model.rank.value for model in board.models] == [1, 1]


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("<b>now</b>", ""),
        ("9999-99-99", ""),
        ("0001-01-01T00:00:00+14:00", ""),
        ("2026-11-28T09:30:00.5+01:00", "2026-11-28T08:30:00+00:00"),
    ],
)
def test_an_invalid_date_is_left_out(text, date):
    assert last_measured([{"measured": text}]) == date
