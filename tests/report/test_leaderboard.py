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
from tests.helpers.answers import answer, run
from tracker.analysis.agreement import agreements, compare
from tracker.analysis.boards import (
    ModelBoard,
    layer_board,
    model_board,
    part_boards,
    relevance_estimate,
)
from tracker.analysis.claims import claims
from tracker.analysis.comparable import benchmark_labels, row_labels, setting
from tracker.cli import main
from tracker.core.estimates import Estimate
from tracker.core.records import CellRecord, RunRecord
from tracker.ledger.cells import measured_last
from tracker.report.export import boards
from tracker.report.leaderboard import layer_board_table
from tracker.report.page.sections import model_sections
from tracker.report.wording import board_answer, model_answer, models_open, parts_answer
from tracker.team.collect import merged
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import layer_run

from .cells import ONE, THREE, TWO, edition, sharing_one, some_layers
from .conftest import LAYERS, as_read, build_cell, digest, with_layer


def relevances(cells: list[CellRecord], layer: int) -> list[float]:
    return [cell.runs_of()[layer].accuracy_relevance for cell in cells]


def named(board: ModelBoard) -> dict[str, int | None]:
    """Model → rank, in the order of the board."""
    return {standing.model.name: standing.rank.value for standing in board.models}


def test_layers_stand_where_their_mean_relevance_puts_them():
    cells = [build_cell(name, n=200, seed=4) for name in ("arc_easy", "piqa", "sciq")]
    board = layer_board(cells)
    means = {layer: statistics.mean(relevances(cells, layer)) for layer in range(LAYERS)}
    assert len(board.parts) == LAYERS
    assert not board.left_out

    def rank(figures: dict[int, float], layer: int) -> int:
        return 1 + sum(round(other, 12) > round(figures[layer], 12) for other in figures.values())

    for standing in board.parts:
        assert standing.relevance.value == pytest.approx(means[standing.layer])
        assert standing.rank.value == rank(means, standing.layer)
        assert standing.benchmarks == 3
        assert standing.rank.low <= standing.rank.value <= standing.rank.high
    assert [standing.rank.value for standing in board.ranked] == sorted(
        standing.rank.value for standing in board.parts
    )
    assert board.ranked[0].layer == max(means, key=means.get)


def test_the_interval_that_decides_is_shown_and_orders():
    """Was: 12.5 pp (4.6 to 20.1) was open beside 12.0 pp (4.7 to 19.0), which matters."""
    cells = [build_cell(name, n=100, seed=4) for name in ("arc_easy", "piqa")]
    ends = {
        0: [(0.125, -0.05, 0.3), (0.125, 0.06, 0.19)],
        11: [(0.12, 0.03, 0.21), (0.12, 0.04, 0.20)],
    }
    for layer, drops in ends.items():
        for number, (drop, low, high) in enumerate(drops):
            figures = {"accuracy_drop": drop, "accuracy_drop_low": low, "accuracy_drop_high": high}
            cells[number] = with_layer(cells[number], layer, **figures, mcnemar_p=0.0001)
    board = layer_board(cells)
    quantile = NormalDist().inv_cdf(1 - 0.025 / LAYERS) / NormalDist().inv_cdf(0.975)
    for standing in board.parts:
        runs = [cell.runs_of()[standing.layer] for cell in cells]
        half = math.hypot(*(run.drop.high - run.drop.low for run in runs)) / 4
        middle = statistics.mean(run.drop.value for run in runs)
        assert standing.deciding.low == pytest.approx(middle - quantile * half)
        assert (standing.shown == "matters") == (standing.deciding.low > 0)
    lows = [standing.deciding.low for standing in board.parts]
    assert lows == sorted(lows, reverse=True)
    order = [standing.layer for standing in board.parts]
    assert order.index(11) < order.index(0)
    table = layer_board_table(board, "m")
    column = [heading.label for heading in table.headings].index(
        "mean accuracy drop with 95 % interval for all together"
    )
    drops = [row[column].text for row in as_read(table).rows]
    assert drops[order.index(0)].startswith("12.5 (−"), drops
    assert drops[order.index(11)].startswith("12.0 (")
    assert "−" not in drops[order.index(11)]


def as_heads(cell: CellRecord, *kept: RunRecord) -> CellRecord:
    """Build the same figures of heads, two a layer; `kept` are its other runs."""
    heads = [
        with_change(run, component="head", layer=run.change.layer // 2, number=run.change.layer % 2)
        for run in cell.runs
    ]
    return cell.model_copy(update={"runs": (*kept, *heads)})


def test_heads_stand_where_layers_of_the_same_figures_do():
    cells = [build_cell(name, n=200, seed=4) for name in ("arc_easy", "piqa")]
    layers, found = layer_board(cells), claims(cells)
    (board,) = part_boards([as_heads(cells[0], *cells[0].runs), as_heads(cells[1])])
    assert not board.left_out
    found_parts = [
        (2 * p.change.layer + p.change.number, p.relevance, p.deciding, p.rank) for p in board.parts
    ]
    assert found_parts == [
        (layer.layer, layer.relevance, layer.deciding, layer.rank) for layer in layers.parts
    ]
    assert {2 * p.change.layer + p.change.number: p.shown for p in board.parts} == {
        layer: found.word(layer) for layer in range(LAYERS)
    }
    worst = max(board.parts, key=lambda part: part.deciding.value)
    text = board_answer(board)
    assert text.startswith(f"Of {LAYERS} heads {len(found.costly)} are shown to cost")
    assert f": {worst.change.label()}" in text


def test_a_part_without_a_figure_has_no_rank_and_one_that_lacks_a_benchmark_no_row():
    nothing = dict.fromkeys(("accuracy", "accuracy_drop", "accuracy_relevance", "mcnemar_p"))
    why = {"reasons": dict.fromkeys(nothing, "nothing reaches it")}
    cells = [with_layer(build_cell(), 3, **nothing, **why), build_cell("piqa", missing=(7,))]
    (board,) = part_boards([as_heads(cell) for cell in cells])
    assert len(board.parts) == LAYERS - 1
    (unranked,) = [part for part in board.parts if part.rank.value is None]
    assert (unranked.change.label(), unranked.shown) == ("layer 1 head 1", "open")
    (alone,) = part_boards([as_heads(cells[0])])
    last = alone.parts[-1]
    assert (last.rank.value, last.rank.reason) == (None, "nothing reaches it")
    assert last.shown == "undefined"


def test_parts_of_which_no_benchmark_counts_are_spoken_of_one_by_one():
    """Was: nothing can be said of the layers."""
    cell = build_cell()
    runs = [run.model_copy(update={"accuracy_relevance": None}) for run in as_heads(cell).runs]
    weak = cell.model_copy(update={"runs": tuple(runs)})
    assert part_boards([weak]) == []
    said = model_answer(claims([weak]), [], [weak])
    assert said == f"arc_easy: {parts_answer(weak)}"
    assert "nothing can be said" in model_answer(claims([]), [], [])


def test_a_relevance_has_the_interval_of_its_drop_over_the_baseline():
    cell = build_cell(n=400, baseline=0.75)
    record = cell.runs[0]
    found = relevance_estimate(cell, record)
    assert found.value == record.accuracy_relevance
    assert found.low < found.value < found.high <= 1
    # With a baseline that is known exactly, it is the drop's interval, scaled.
    exact = cell.model_copy(update={"baseline": Estimate(0.75, 0.75, 0.75)})
    scaled = relevance_estimate(exact, record)
    assert scaled.low == pytest.approx(record.drop.low / 0.5)
    assert scaled.high == pytest.approx(record.drop.high / 0.5)
    weak = build_cell(n=40, baseline=0.3)
    assert weak.baseline.low is not None
    assert weak.baseline.low < 0.25
    assert relevance_estimate(weak, weak.runs[0]).low is None


def test_a_layer_that_lacks_a_benchmark_has_no_rank():
    cells = [build_cell("arc_easy", missing=(7,)), build_cell("piqa")]
    board = layer_board(cells)
    last = board.parts[-1]
    assert (last.layer, last.rank.value, last.benchmarks, last.rank.low) == (7, None, 1, None)
    assert last.relevance.value == pytest.approx(relevances([cells[1]], 7)[0])
    assert sum(standing.rank.value is None for standing in board.parts) == 1


def test_models_are_ranked_on_what_all_of_them_share():
    cells = sharing_one()
    board = model_board(cells)
    assert board.benchmarks == ("arc_easy · 0-shot",)
    assert named(board) == {"solid": 1, "other": 2, "weak": 3}
    solid = board.models[0]
    values = [relevances([cells[0]], layer)[0] for layer in range(LAYERS)]
    assert solid.relevance.value == pytest.approx(statistics.mean(values))
    assert solid.layers == LAYERS
    assert solid.worst_layer is None, "two layers cost about as much"
    wide = NormalDist().inv_cdf(1 - 0.025 / LAYERS) / NormalDist().inv_cdf(0.975)
    half = (cells[0].runs[0].drop.high - cells[0].runs[0].drop.low) / 2
    assert solid.costly == sum(r.drop.value - wide * half > 0 for r in cells[0].runs)


def test_drops_of_right_and_wrong_are_widened_by_one_quantile():
    """Was Student's in the answer, and the normal one in the verdicts beside it."""
    wide = NormalDist().inv_cdf(1 - 0.025 / LAYERS) / NormalDist().inv_cdf(0.975)
    for names in (["arc_easy"], ["arc_easy", "piqa"]):
        cells = [build_cell(name, n=12) for name in names]
        runs = [cell.runs_of()[3] for cell in cells]
        half = [(run.drop.high - run.drop.low) / 2 for run in runs]
        drop = claims(cells).drops[3]
        assert drop.high - drop.value == pytest.approx(wide * math.hypot(*half) / len(cells))


def test_models_are_told_apart_where_their_intervals_are():
    """Was a place each, 1 and 2, however little their documents say of it."""
    for documents, apart in ((160, False), (200_000, True)):
        cells = [build_cell(model="weak", n=documents, baseline=0.5)]
        cells.append(build_cell(model="solid", n=documents, baseline=0.9))
        found = model_board(cells)
        assert named(found) == {"solid": 1, "weak": 2}
        between = [(one.rank.low, one.rank.high) for one in found.models]
        assert between == ([(1, 1), (2, 2)] if apart else [(1, 2), (1, 2)])
        assert bool(models_open(found)) is not apart
    # With as many documents as it names, a difference of 0.1 is one of its intervals and some more.
    few = model_board([build_cell(model=name, n=160) for name in ("a", "b")])
    half = (few.models[0].relevance.high - few.models[0].relevance.low) / 2
    z = NormalDist().inv_cdf
    at_needed = half * math.sqrt(2 * 160 / few.needed)
    assert at_needed * (1 + z(0.8) / z(0.975)) == pytest.approx(0.1, rel=1e-3)


def test_a_rank_lies_in_its_interval_below_chance_too():
    """Was ranked by relevances, which end at 1, and held against drops, which do not."""
    easy, hard = (build_cell(name, n=1_000_000, baseline=0.75) for name in ("arc_easy", "piqa"))
    for layer, drops in ((5, (0.75, 0.0)), (6, (0.5, 0.2))):
        easy, hard = (
            with_layer(
                cell,
                layer,
                accuracy_drop=drop,
                accuracy_drop_low=drop - 0.001,
                accuracy_drop_high=drop + 0.001,
                accuracy_relevance=min(drop / 0.5, 1.0),
            )
            for cell, drop in zip((easy, hard), drops, strict=True)
        )
    standings = layer_board([easy, hard]).ranked
    assert all(one.rank.low <= one.rank.value <= one.rank.high for one in standings)
    assert [one.layer for one in standings[:2]] == [6, 5]


def test_a_benchmark_that_a_model_only_guesses_is_left_out_in_one_line():
    """Was said twice, the second time as 'not measured, or otherwise'."""
    shared = [build_cell("arc_easy", model=name, n=100) for name in ("a", "b")]
    known, guessed = (build_cell("piqa", model=name, n=100) for name in ("a", "b"))
    why = "the baseline is at or below chance"
    nothing = {"accuracy_relevance": None, "reasons": {"accuracy_relevance": why}}
    runs = tuple(run.model_copy(update=nothing) for run in guessed.runs)
    board = model_board([*shared, known, guessed.model_copy(update={"runs": runs})])
    assert board.left_out == {"piqa · 0-shot": f"b: {why}"}


def test_more_documents_of_one_model_take_nobodys_rank():
    """Was: one colleague's larger n left no benchmark that all models shared."""
    few = [build_cell(model=name, n=100, seed=3) for name in ("a", "b", "c")]
    before = model_board(few)
    assert all(s.rank.value for s in before.models)
    many = build_cell(model="a", n=400, seed=3)
    # The colleague adds to what was there …
    board = model_board([*few, many])
    assert board.models == before.models
    assert board.left_out == {"arc_easy · 0-shot · 400 documents": "no such measurement of b, c"}
    # … or it is gone: the others are still ranked, and it is said why one is not.
    board = model_board([many, *few[1:]])
    assert {name for name, rank in named(board).items() if rank is None} == {"a"}
    assert board.left_out["a"] == "not all its layers are measured on arc_easy · 0-shot"
    # When all have more, more counts.
    every = [build_cell(model=name, n=400, seed=3) for name in ("a", "b", "c")]
    board = model_board([*few, *every])
    assert board.benchmarks == ("arc_easy · 0-shot",)
    assert board.models == model_board(every).models
    assert list(board.left_out.values()) == ["the benchmark counts once, by its larger sample"]


def test_a_few_layers_on_more_documents_do_not_stand_for_all():
    whole, part = build_cell(n=100), some_layers(build_cell(n=400), 15, 16)
    assert layer_board([part, whole]).cells == (whole,)
    own, other = build_cell(n=100), build_cell(n=100).model_copy(update={"metric": "acc_norm"})
    board = layer_board([other, own])
    assert board.cells == (own,)
    assert board.left_out == {
        "arc_easy · 0-shot · acc_norm": "the benchmark counts once, as arc_easy · 0-shot · acc"
    }


@pytest.mark.parametrize(
    "change", [{"n": 80}, {"num_fewshot": 5}, {"metric": "acc_norm"}, {"sample_seed": 1234}]
)
def test_other_settings_are_not_compared(change):
    one, other = build_cell(model="a"), build_cell(model="b")
    assert setting(one) == setting(other)
    if "num_fewshot" in change:
        change = {"benchmark": other.benchmark.model_copy(update=change)}
    other = other.model_copy(update=change)
    assert setting(one) != setting(other)
    board = model_board([one, other])
    assert board.benchmarks == ()
    assert all(s.rank.value is None and s.relevance.value is None for s in board.models)
    assert len(board.left_out) == 2


def test_as_many_drawn_documents_are_others_and_count_first():
    first = build_cell()
    drawn = [first.model_copy(update={"sample_seed": seed}) for seed in (1234, 7)]
    assert len({setting(cell) for cell in (first, *drawn)}) == 3
    board = layer_board([first, drawn[0]])
    assert board.cells == (drawn[0],)
    label = "arc_easy · 0-shot · 160 documents"
    assert board.left_out == {
        label: f"the benchmark counts once, as {label} drawn at random (seed 1234)"
    }
    models = [build_cell(model=name).model for name in "ab"]
    both = [c.model_copy(update={"model": m}) for m in models for c in (first, drawn[0])]
    assert model_board(both).benchmarks == ("arc_easy · 0-shot",)
    assert all(named(model_board(both)).values())


def test_as_many_documents_are_not_the_same_ones_while_a_cell_grows():
    one, other = build_cell(model="a"), build_cell(model="b")
    growing = other.model_copy(update={"unfinished": "160 of 200 documents are measured so far"})
    assert setting(one) == setting(other) != setting(growing)
    assert all(s.rank.value is None for s in model_board([one, growing]).models)
    # The source of equal documents does not count.
    hub = other.benchmark.model_copy(update={"data": "hub"})
    assert setting(one) == setting(other.model_copy(update={"benchmark": hub}))


def test_two_models_are_compared_layer_by_layer():
    one, other = build_cell(model="base", seed=1), build_cell(model="instruct", seed=2)
    other = other.model_copy(update={"runs": other.runs[:10]})
    found = compare(one, other)
    assert sorted(found) == list(range(10))
    assert found[3].value == pytest.approx(one.runs[3].drop.value - other.runs[3].drop.value)
    wide = one.runs[3].drop.high - one.runs[3].drop.value
    assert found[3].high == pytest.approx(found[3].value + wide * 2**0.5)


def test_proxies_are_set_beside_chance():
    cell = build_cell()
    perfect = tuple(r.model_copy(update={"relative_update": 1.0 + r.drop.value}) for r in cell.runs)
    found = {a.proxy: a for a in agreements([cell.model_copy(update={"runs": perfect})])}
    assert found["relative_update"].differ == 0
    level = Counter(r.drop.value for r in cell.runs).values()
    by_chance = 1 - sum(count**2 for count in level) / LAYERS**2
    assert found["relative_update"].chance == pytest.approx(by_chance)
    assert found["cosine_score"].differ > 0.5
    assert len(found["cosine_score"].spearman) == 1
    assert agreements([])[0].differ is None


WHY = "stopped at the answer to 'top 2': 64 to 96 of 2000 documents were looked at, run by run"


def stopped(**changes: Any) -> CellRecord:
    """Return a cell whose layers 0 and 1 were looked at longer than the others."""
    cell = build_cell(n=64)
    longer = [
        one.model_copy(update={"n": 96}) if one.change.layer < 2 else one for one in cell.runs
    ]
    runs = [with_figures(one, mcnemar_p=None) for one in longer]
    answers = (run(one.change.layer, "+" if one.change.layer < 2 else "", n=one.n) for one in runs)
    found = answer("top 2", *answers, looked=96, measured=96)
    return build_cell(
        **{"n": 64, "runs": tuple(runs), "answer": found, "unfinished": WHY} | changes
    )


@pytest.fixture(scope="module")
def cell() -> CellRecord:
    return stopped()


def test_its_layers_are_not_ranked_beside_others(cell):
    whole = build_cell("piqa")
    board = layer_board([cell, whole])
    assert [one.benchmark.name for one in board.cells] == ["piqa"]
    assert board.left_out == {"arc_easy · 0-shot · stopped at an answer": WHY}
    assert agreements([cell, whole]) == agreements([whole])
    assert not layer_board([cell]).parts
    (section,) = model_sections([cell], {})
    assert "headline" not in section.charts


def test_an_answer_stands_beside_the_whole_cell_and_another_answer(cell):
    whole = build_cell(n=2000)
    assert merged([cell, whole]) == [cell, whole]
    other = stopped(answer=cell.answer.model_copy(update={"question": "sign"}))
    assert merged([cell, other]) == [cell, other]
    assert merged([cell, cell]) == [cell]


def test_a_run_is_updated_when_its_part_of_the_answer_changes(cell):
    """Its figures are the same, its tags are not."""
    runs = [one.model_copy(update={"chosen": not one.chosen}) for one in cell.answer.runs]
    other = stopped(answer=cell.answer.model_copy(update={"runs": tuple(runs)}))
    for digest_of in (
        lambda c: mlflow_run(layer_run(c, c.runs[3]), "p").digest,
        lambda c: layer_run(c, c.runs[3]).digest(),
    ):
        assert digest_of(cell) == digest_of(cell)
        assert digest_of(cell) != digest_of(other)
    assert run_key(cell, "cell") == run_key(build_cell(), "cell"), "continued, it is the same run"


LATEST = f"measured 2026-11-28 09:30:00 UTC ({TWO.key[:8]})"


def test_the_list_tells_them_apart(monkeypatch):
    """By more than the key."""
    monkeypatch.setattr("tracker.api.ls", lambda *args: [ONE, TWO, THREE])
    done = CliRunner().invoke(main, ["ls"])
    assert done.exit_code == 0
    for (_, says), row in zip(
        row_labels([ONE, TWO, THREE]), done.output.splitlines()[1:], strict=True
    ):
        assert f"our_sums (acc) · {says}" in row


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
    other = edition("one", "2026-11-28T00:00:00+00:00", key=digest("other"), **changes)
    assert row_labels([ONE, other])[1][1] == says
    assert says in benchmark_labels([ONE, other])[1]


@pytest.mark.parametrize("cells", [[ONE, TWO, THREE], [TWO, THREE, ONE], [THREE, ONE, TWO]])
def test_the_board_takes_the_latest_and_names_the_others(cells):
    """Was: the first in order, which may be outdated."""
    board = layer_board(cells)
    assert board.cells == (TWO,)
    others = [label for label in benchmark_labels(cells) if LATEST not in label]
    why = "its task was edited since: what was measured last counts, our_sums · 0-shot · " + LATEST
    assert board.left_out == dict.fromkeys(others, why)
    _, notes = boards(cells)
    assert [note for note in notes if "edited" in note] == [
        f"SmolLM2: {label} does not count: {why}." for label in others
    ]


def test_a_larger_edition_that_is_outdated_does_not_count():
    small = TWO.model_copy(update={"n": 16})
    assert layer_board([ONE, small]).cells == (small,)
    # Other documents of one edition are no edit: the larger counts, as ever.
    assert layer_board([small, TWO]).cells == (TWO,)
    # Nor are other data or settings.
    hub = edition("hub", "2026-11-29T00:00:00+00:00", benchmark={"data": "hub"}, n=16)
    assert layer_board([TWO, hub]).cells == (TWO,)


def test_models_are_compared_on_the_latest_that_they_share():
    other = [edition(name, ONE.measured, model="Other") for name in ("one", "two")]
    found = model_board([ONE, TWO, *other])
    assert len(found.benchmarks) == 1
    assert "its task was edited since: what was measured last counts" in found.left_out.values()
    # Where they do not share it, they are compared on what they share.
    found = model_board([ONE, TWO, other[0]])
    assert [model.rank.value for model in found.models] == [1, 1]


@pytest.mark.parametrize(
    ("said", "date"),
    [
        ("<b>now</b>", ""),
        ("9999-99-99", ""),
        ("0001-01-01T00:00:00+14:00", ""),
        ("2026-11-28T09:30:00.5+01:00", "2026-11-28T08:30:00+00:00"),
    ],
)
def test_what_is_no_date_says_nothing(said, date):
    assert measured_last([{"measured": said}]) == date
