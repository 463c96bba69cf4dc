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
from tracker.measuring.observing import open_observed_cell
from tracker.measuring.progress import Silent
from tracker.models.rounding import round_weight
from tracker.studies.base import open_study
from tracker.studies.precision import ERROR_LABELS

from .conftest import SmallStudy, conduct_small, plain_values, study_context, table_column

FALL = "drop of gold log-probability"
MAPS = ["mlp.down_proj", "self_attn.q_proj", "embedding", "lm_head"]
FORMATS = ["int8", "int4_row"]
SETTINGS = {"map": MAPS, "intervention": FORMATS, "layer": [1, 2]}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SmallStudy:
    folder = tmp_path_factory.mktemp("precision")
    return conduct_small("precision", folder, ["openbookqa"], 8, **SETTINGS)


@pytest.fixture(scope="module")
def opened(study):
    """Return the cell, its model and its documents."""
    (store,) = Ledger(study.results).cells()
    context = study_context(study.returned.experiment, study.results)
    (request,) = open_study("precision").requests(context)
    engine, documents = open_observed_cell(request, store, context.ledger, Options(), Silent())
    return store.read(), engine.loaded, documents


def _document_tokens(documents):
    """Return the tokens of each document's context and right answer; all of them count."""
    for document in documents.values():
        request = document.requests[document.gold]
        yield torch.tensor([[*request.context, *request.continuation]])


def _find_module(model, layer, path):
    if path in ("embedding", "lm_head"):
        assert layer is None
        return model.model.embed_tokens if path == "embedding" else model.lm_head
    return model.model.layers[layer].get_submodule(path)


def _change_name(weight_format, layer, path):
    return f"{weight_format}:{path}" if layer is None else f"{weight_format}:{layer}.{path}"


def _changed_model(model, layer, path, weight_format):
    twin = copy.deepcopy(model)
    module = _find_module(twin, layer, path)
    module.weight.data = round_weight(module.weight.data, weight_format)
    return twin


@torch.inference_mode()
def _plain_errors(model, layer, path, weight_format, documents):
    """Return the four errors of a map by plain passes of two models."""
    twin = _changed_model(model, layer, path, weight_format)
    tensors: list[torch.Tensor] = []
    intact, changed = (_find_module(m, layer, path) for m in (model, twin))
    hook = intact.register_forward_hook(lambda _, args, output: tensors.extend((args[0], output)))
    distance = size = angle = kl = 0.0
    tokens = 0
    for ids in _document_tokens(documents):
        tensors.clear()
        p, q = (m(ids).logits[0].log_softmax(-1).double() for m in (model, twin))
        kl += float((p.exp() * (p - q)).sum())
        x, y = tensors
        z = changed(x)
        distance += float(((z - y) ** 2).sum())
        size += float((y**2).sum())
        angle += float((1 - torch.cosine_similarity(z, y, dim=-1)).sum())
        tokens += ids.shape[1]
    hook.remove()
    weights = ((changed.weight - intact.weight) ** 2).sum() / (intact.weight**2).sum()
    return float(weights), distance / size, angle / tokens, kl / tokens


def test_errors_are_those_of_plain_passes(study, opened):
    _, loaded, documents = opened
    for name, table in zip(FORMATS, study.finding.tables[1::3], strict=True):
        labels = ("layer (0-based)", "linear map", *ERROR_LABELS.values())
        columns = [plain_values(table_column(table, label)) for label in labels]
        assert len(columns[0]) == 2 * 2 + 2
        for layer, path, *measured in zip(*columns, strict=True):
            expected = _plain_errors(loaded.model, layer, path, name, documents)
            assert measured == pytest.approx(expected, rel=2e-3, abs=2e-6)


def test_orders_are_scipys(study, opened):
    frame, *_ = opened
    gold = _mean_gold(frame.itertuples())
    for index, name in enumerate(FORMATS):
        names, table, orders = study.finding.tables[3 * index : 3 * index + 3]
        maps, falls = _read_falls(table, gold, name)
        assert falls == sorted(falls, reverse=True)
        assert plain_values(table_column(table, FALL)) == pytest.approx(falls)
        entries = table_column(orders, orders.headings[1].label)
        for error, entry in zip(ERROR_LABELS.values(), entries, strict=True):
            errors = plain_values(table_column(table, error))
            assert entry.value == pytest.approx(stats.spearmanr(errors, falls).statistic)
            assert entry.low <= entry.value <= entry.high
        pairs = [*zip(falls, maps, strict=True)]
        means = {name: np.mean([fall for fall, path in pairs if path == name]) for name in MAPS}
        columns = (plain_values(table_column(names, label)) for label in ("linear map", FALL))
        assert dict(zip(*columns, strict=True)) == pytest.approx(means)


def _mean_gold(rows):
    """Average the gold answer's log-probability over documents, by ablation."""
    gold = {}
    for row in rows:
        gold.setdefault(row.ablation, []).append(float(row.loglikelihoods[int(row.gold)]))
    return {name: np.mean(values) for name, values in gold.items()}


def _read_falls(table, gold, weight_format):
    """Read the maps of a table, and compute the fall of each by the ledger."""
    labels = ("layer (0-based)", "linear map")
    layers, maps = (plain_values(table_column(table, label)) for label in labels)
    names = [_change_name(weight_format, *pair) for pair in zip(layers, maps, strict=True)]
    return maps, [gold["baseline"] - gold[name] for name in names]


def test_a_name_is_called_costliest_only_where_its_interval_shows_it(study, tmp_path):
    """A single name was, whatever its interval."""
    settings = {"map": ["mlp.down_proj"], "intervention": ["int8"]}
    single = conduct_small("precision", tmp_path, ["openbookqa"], 8, **settings).finding
    for finding, formats in ((study.finding, 2), (single, 1)):
        assert len(finding.tables) == 3 * formats
        for names, sentence in zip(finding.tables[::3], finding.answers[1:], strict=False):
            largest, *others = table_column(names, FALL)
            is_shown = largest.low > max(0, *(fall.high for fall in others), 0)
            assert is_shown == ("not known" not in sentence and "not shown" not in sentence)
    (names, *_), (_, sentence, *_) = single.tables, single.answers
    (fall,) = table_column(names, FALL)
    assert fall.low <= 0 <= fall.high  # int8 changes next to nothing
    assert "down_proj is not shown to change the log-probability of the right answer" in sentence


def test_it_is_asked_again_for_nothing_and_names_what_is_wrong(study, refused):
    repeated = api.study("precision", study.path, results=study.results, track=[], **SETTINGS)
    assert repeated.outcome.models_loaded == 0
    assert repeated.finding == study.finding
    for option, message in (
        ("--map=attention", "consists of several maps"),
        ("--map=mlp.down", "has no linear map 'mlp.down'. Did you mean"),
        ("--set=removed=[1]", "leave 'removed' out"),
    ):
        assert message in refused("precision", study.path, option)


def test_what_stops_at_an_answer_is_of_the_documents_that_all_maps_share(tmp_path):
    """Errors are observed of no others, and what would hold for one look is not said."""
    settings = {"map": ["mlp.down_proj", "embedding"], "intervention": ["int4_row"]}
    settings |= {"until": "drop within 10 pp"}
    study = conduct_small("precision", tmp_path, ["openbookqa"], None, **settings)
    (record,) = tracker.ls(study.results)
    assert record.is_stopped
    assert len({run.n for run in record.answer.runs}) > 1  # some are looked at longer
    (store,) = Ledger(study.results).cells()
    frame = store.read()
    counts = frame.groupby(["task", "doc"])["ablation"].nunique()
    shared = {document for document, count in counts.items() if count == 1 + 4 + 1}
    (kind,) = (store.folder / "observed").iterdir()
    context = study_context(study.returned.experiment, study.results)
    (request,) = open_study("precision").requests(context)
    blocks = store.blocks(request.extent)
    observed = {(b.task, n) for b in blocks for n in read_observations(store.folder, kind.name, b)}
    assert observed == shared
    assert len(observed) == record.n
    names, table, orders = study.finding.tables
    one_look = [*table_column(names, FALL), *table_column(orders, orders.headings[1].label)]
    for entry in one_look:
        assert entry.value is not None
        assert entry.low is None
    gold = _mean_gold(row for row in frame.itertuples() if (row.task, row.doc) in shared)
    _, falls = _read_falls(table, gold, "int4_row")
    assert plain_values(table_column(table, FALL)) == pytest.approx(falls, abs=1e-6)
    drops = table_column(table, "accuracy drop")
    assert all(entry.low < entry.value < entry.high for entry in drops)
    assert "drop within 10 pp" in study.finding.answers[0]
    assert f"on {record.n} documents that all maps share" in names.notes[0]
