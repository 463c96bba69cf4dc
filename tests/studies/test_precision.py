"""Test findings on rounded maps against plain passes of really changed models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import stats

import tracker
from tracker import api
from tracker.ledger.shards import read_observations
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.observing import open_observed
from tracker.measuring.progress import Silent
from tracker.models.rounding import in_format
from tracker.studies.base import open_study
from tracker.studies.precision import ERRORS

from .conftest import Small, asked_for, column, plain, small

MAPS = ["mlp.down_proj", "self_attn.q_proj", "embedding", "lm_head"]
ASKED = {"map": MAPS, "intervention": ["int8", "int4_row"], "layer": [1, 2]}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Small:
    return small("precision", tmp_path_factory.mktemp("precision"), ["openbookqa"], 8, **ASKED)


@pytest.fixture(scope="module")
def opened(found):
    """Return the cell, its model and its documents."""
    (store,) = Ledger(found.results).cells()
    (request,) = open_study("precision").requests(asked_for(found.done.experiment, found.results))
    how = (Ledger(found.results), Options(), Silent())
    engine, documents = open_observed(request, store, *how)
    return store.read(), engine.loaded, documents


def _texts(documents):
    """Return the tokens of each document's context and right answer; all of them count."""
    for document in documents.values():
        request = document.requests[document.gold]
        yield torch.tensor([[*request.context, *request.continuation]])


def _module(model, layer, path):
    if path in ("embedding", "lm_head"):
        assert layer is None
        return model.model.embed_tokens if path == "embedding" else model.lm_head
    return model.model.layers[layer].get_submodule(path)


def _name(form, layer, path):
    return f"{form}:{path}" if layer is None else f"{form}:{layer}.{path}"


def _changed(model, layer, path, form):
    twin = copy.deepcopy(model)
    module = _module(twin, layer, path)
    module.weight.data = in_format(module.weight.data, form)
    return twin


@torch.inference_mode()
def _errors(model, layer, path, form, documents):
    """Return the four errors of a map by plain passes of two models."""
    twin = _changed(model, layer, path, form)
    made: list[torch.Tensor] = []
    before, after = (_module(m, layer, path) for m in (model, twin))
    hook = before.register_forward_hook(lambda module, args, out: made.extend((args[0], out)))
    apart = size = angle = kl = 0.0
    tokens = 0
    for ids in _texts(documents):
        made.clear()
        intact, other = (m(ids).logits[0].log_softmax(-1).double() for m in (model, twin))
        kl += float((intact.exp() * (intact - other)).sum())
        given, old = made
        new = after(given)
        apart += float(((new - old) ** 2).sum())
        size += float((old**2).sum())
        angle += float((1 - torch.cosine_similarity(new, old, dim=-1)).sum())
        tokens += ids.shape[1]
    hook.remove()
    weights = float(((after.weight - before.weight) ** 2).sum() / (before.weight**2).sum())
    return weights, apart / size, angle / tokens, kl / tokens


def test_errors_are_those_of_plain_passes(found, opened):
    _, loaded, documents = opened
    for form, table in zip(ASKED["intervention"], found.finding.tables[1::3], strict=True):
        names = plain(column(table, "linear map"))
        assert len(names) == 2 * 2 + 2
        for place, path in enumerate(names):
            layer = plain(column(table, "layer (0-based)"))[place]
            right = _errors(loaded.model, layer, path, form, documents)
            ours = [plain(column(table, label))[place] for label in ERRORS.values()]
            assert ours == pytest.approx(right, rel=2e-3, abs=2e-6)


def test_orders_are_scipys(found, opened):
    frame, *_ = opened
    gold = {
        name: np.mean(
            [float(each[int(of)]) for each, of in zip(f["loglikelihoods"], f["gold"], strict=True)]
        )
        for name, f in frame.groupby("ablation")
    }
    label = "fall of gold log-probability"
    for number, form in enumerate(ASKED["intervention"]):
        names, most, orders = found.finding.tables[3 * number : 3 * number + 3]
        layers, maps = (plain(column(most, head)) for head in ("layer (0-based)", "linear map"))
        places = [*zip(layers, maps, strict=True)]
        falls = [gold["baseline"] - gold[_name(form, *place)] for place in places]
        assert falls == sorted(falls, reverse=True)
        assert plain(column(most, label)) == pytest.approx(falls)
        entries = column(orders, orders.headings[1].label)
        for error, entry in zip(ERRORS.values(), entries, strict=True):
            right = stats.spearmanr(plain(column(most, error)), falls).statistic
            assert entry.value == pytest.approx(right)
            assert entry.low <= entry.value <= entry.high
        pairs = [*zip(falls, maps, strict=True)]
        means = {name: np.mean([fall for fall, path in pairs if path == name]) for name in MAPS}
        rows = zip(plain(column(names, "linear map")), plain(column(names, label)), strict=True)
        assert dict(rows) == pytest.approx(means)


def test_a_name_is_called_costliest_only_where_its_interval_shows_it(found, tmp_path):
    """A single name was, whatever its interval."""
    alone = small(
        "precision", tmp_path, ["openbookqa"], 8, map=["mlp.down_proj"], intervention=["int8"]
    )
    for finding, formats in ((found.finding, 2), (alone.finding, 1)):
        assert len(finding.tables) == 3 * formats
        for names, sentence in zip(finding.tables[::3], finding.answers[1:], strict=False):
            first, *others = column(names, "fall of gold log-probability")
            shown = first.low > max(0, *(other.high for other in others), 0)
            assert shown == ("is open" not in sentence and "not shown" not in sentence)
    (names, *_), (_, sentence, *_) = alone.finding.tables, alone.finding.answers
    (fall,) = column(names, "fall of gold log-probability")
    assert fall.low <= 0 <= fall.high  # int8 changes next to nothing
    assert "down_proj is not shown to change the log-probability of the right answer" in sentence


def test_it_is_asked_again_for_nothing_and_names_what_is_wrong(found, refused):
    again = api.study("precision", found.path, results=found.results, track=[], **ASKED)
    assert again.outcome.models_loaded == 0
    assert again.finding == found.finding
    for words, said in (
        ("--map=attention", "is several maps"),
        ("--map=mlp.down", "has no linear map 'mlp.down'. Did you mean"),
        ("--set=removed=[1]", "leave 'removed' out"),
    ):
        assert said in refused("precision", found.path, words)


def test_what_stops_at_an_answer_is_of_the_documents_that_all_maps_share(tmp_path):
    """Errors are observed of no others, and what would hold for one look is not said."""
    asked = {"map": ["mlp.down_proj", "embedding"], "intervention": ["int4_row"]}
    asked |= {"until": "drop within 10 pp"}
    raced = small("precision", tmp_path, ["openbookqa"], None, **asked)
    (record,) = tracker.ls(raced.results)
    assert record.is_stopped
    assert len({run.n for run in record.answer.runs}) > 1  # some are looked at longer
    (store,) = Ledger(raced.results).cells()
    frame = store.read()
    counts = frame.groupby(["task", "doc"])["ablation"].nunique()
    shared = {place for place, count in counts.items() if count == 1 + 4 + 1}
    (kind,) = (store.folder / "observed").iterdir()
    (request,) = open_study("precision").requests(asked_for(raced.done.experiment, raced.results))
    blocks = store.blocks(request.extent)
    seen = {(b.task, n) for b in blocks for n in read_observations(store.folder, kind.name, b)}
    assert seen == shared
    assert len(seen) == record.n
    names, most, orders = raced.finding.tables
    of_one_look = (names, "fall of gold log-probability"), (orders, orders.headings[1].label)
    for entry in (entry for table, label in of_one_look for entry in column(table, label)):
        assert entry.value is not None
        assert entry.low is None
    rows = [each for each in frame.itertuples() if (each.task, each.doc) in shared]
    said: dict[str, list[float]] = {}
    for each in rows:
        said.setdefault(each.ablation, []).append(float(each.loglikelihoods[int(each.gold)]))
    gold = {name: np.mean(values) for name, values in said.items()}
    layers, maps = (plain(column(most, head)) for head in ("layer (0-based)", "linear map"))
    names_of = [_name("int4_row", *place) for place in zip(layers, maps, strict=True)]
    falls = [gold["baseline"] - gold[name] for name in names_of]
    assert plain(column(most, "fall of gold log-probability")) == pytest.approx(falls, abs=1e-6)
    drops = column(most, "accuracy drop")
    assert all(entry.low < entry.value < entry.high for entry in drops)
    assert "drop within 10 pp" in raced.finding.answers[0]
    assert f"of {record.n} documents that all maps share" in names.notes[0]
