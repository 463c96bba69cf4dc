"""One model whose texts are read as other tokens: nothing of it is mixed, in whatever folder.

Its files are the same ones and hold two tokenizers. That of transformers puts nothing before a
text, and the model's own code, which runs where it is trusted, puts a BOS token there.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import tracker
from tests.helpers.runs import (
    RecordingProgress,
    list_shards,
    run_experiment,
    type_command,
    write_arc,
)
from tracker.ledger.outcomes import DIGEST_COLUMN
from tracker.ledger.shards import read_shard, shard_file
from tracker.ledger.store import Ledger
from tracker.measuring.progress import Silent
from tracker.schema.provenance import TOKENISATION_KEY
from tracker.team.collect import collect_cells

CODE = """
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

class WithBos(PreTrainedTokenizerFast):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self._tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
"""
BOS = {"trust_remote_code": True}
"""What reads texts with a BOS token."""
READ = "is now tokenised differently"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_llama) -> Path:
    folder = tiny_llama()
    (folder / "with_bos.py").write_text(CODE)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": [None, "with_bos.WithBos"]}})
    )
    return folder


@pytest.fixture
def measured(model, experiment, tmp_path):
    """Measure arc_easy, and write files that ask for more."""

    def write(name: str = "study.yaml", **settings: object) -> Path:
        settings = {"layer": [0, 1], "sample": 8, "limit": None, **settings}
        return experiment(model, name, data=str(write_arc(tmp_path / "data")), **settings)

    results = run_experiment(write(), tmp_path / "results")
    assert not results.outcome.failed
    return write


def contents(results: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in list_shards(results)}


def test_the_two_tokenizers_are_of_one_model(model):
    from transformers import AutoTokenizer

    plain, bos = (
        AutoTokenizer.from_pretrained(model, trust_remote_code=trust)("A b")["input_ids"]
        for trust in (False, True)
    )
    assert bos[0] == 0
    assert 0 not in plain


@pytest.mark.parametrize(
    "more",
    [
        {"sample": 24},
        {"sample": None, "limit": 3},  # of which none may be measured
    ],
    ids=str,
)
def test_nothing_is_added_on_other_tokens(measured, tmp_path, more):
    old_contents, heard = contents(tmp_path / "results"), RecordingProgress()
    file = measured("more.yaml", benchmark=["arc_easy", "arc_challenge"], **more)
    results = run_experiment(file, tmp_path / "results", heard, **BOS)
    ((title, reason),) = results.outcome.failed.items()
    assert "arc_easy" in title
    assert re.search(READ + r" \(the same versions\) than in the stored results", reason)
    assert "--trust-remote-code" in reason
    assert "choose another results folder with --results" in reason
    assert results.outcome.exit_code == 1
    assert [cell.benchmark.name for cell in results.cells] == ["arc_challenge"]
    assert old_contents.items() <= contents(tmp_path / "results").items()
    assert len(Ledger(tmp_path / "results").cells()) == 2
    # Who reads as before goes on.
    repeated = run_experiment(measured(**more), tmp_path / "results")
    assert not repeated.outcome.failed


def test_what_is_measured_is_shown_whatever_reads_texts_now(measured, tmp_path):
    results = run_experiment(measured(), tmp_path / "results", **BOS)
    assert not results.outcome.failed
    assert results.cells == tracker.load(tmp_path / "results").cells


def test_a_study_adds_nothing(measured, tmp_path):
    """Of snowball nothing lacks but what it observes."""
    old_contents = contents(tmp_path / "results")
    command = ("study", "snowball", measured(), "--results", tmp_path / "results")
    code, output = type_command(*command, "--trust-remote-code")
    assert code == 1, output
    assert re.search(READ, " ".join(output.split()))
    assert contents(tmp_path / "results") == old_contents
    assert not [*tmp_path.glob("results/cells/*/observed")]


def mix_shards(target: Path, source: Path) -> list[Path]:
    """Copy the shards of the only cell of a folder into another's; the copies."""
    (cell,) = Ledger(target).cells()
    return [Path(shutil.copy(path, cell.folder / "shards")) for path in list_shards(source)]


def test_two_folders_are_not_mixed(measured, tmp_path):
    first, second = tmp_path / "results", tmp_path / "other"
    run_experiment(measured(layer=[2, 3]), second, **BOS)
    names = [{path.name for path in list_shards(folder)} for folder in (first, second)]
    assert not names[0] & names[1]
    collected = collect_cells([str(first), str(second)], Silent())
    cells = [cell for folder in (first, second) for cell in tracker.load(folder).cells]
    figures = [(cell.n, cell.baseline.value, cell.provenance[TOKENISATION_KEY]) for cell in cells]
    for cell in collected.cells:
        assert (cell.n, cell.baseline.value, cell.provenance[TOKENISATION_KEY]) in figures
        assert {run.n for run in cell.runs} == {cell.n}
    assert len(collected.cells) == len({cell.record_key for cell in cells})
    code, output = type_command("report", first, second, "--output", tmp_path / "page.html")
    assert code == 1, output
    assert "were tokenised by" in output


def test_a_folder_that_holds_both_is_named_and_shows_one(measured, tmp_path):
    first, second = tmp_path / "results", tmp_path / "other"
    cells = tracker.load(first).cells
    run_experiment(measured(layer=[0, 1, 2]), second, **BOS)
    copies = mix_shards(first, second)
    assert len(copies) == 1
    for command in ("check", "report"):
        code, output = type_command(command, "--results", first)
        assert code == 1, output
        assert copies[0].name in output
        assert "this file is ignored, because its texts were tokenised by" in " ".join(
            output.split()
        )
    assert tracker.load(first).cells == cells
    # The third layer is not measured on these tokens.
    repeated = run_experiment(measured(layer=[0, 1, 2]), first)
    assert not repeated.outcome.failed
    assert repeated.cells[0].n == 8
    rows = Ledger(first).cells()[0].read()
    assert rows.groupby("doc")[DIGEST_COLUMN].nunique().max() == 1


def rewrite_shard(path: Path, change, column: str = "") -> None:
    """Write a shard anew with other metadata, and without a column."""
    shard = read_shard(path.read_bytes())
    metadata = {name: value for name, value in shard.metadata.items() if name != "digest"}
    change(metadata)
    table = shard.table.drop_columns([column]) if column else shard.table
    path.write_bytes(shard_file(table, metadata))


@pytest.mark.parametrize("version", ["5.0.0", None], ids=["another", "the same"])
def test_what_was_measured_before_digests_were_kept_goes_by_versions(measured, tmp_path, version):
    def remove_versions(metadata) -> None:
        metadata["provenance"].pop(TOKENISATION_KEY)
        metadata["provenance"].pop("tokenizers")
        metadata["provenance"] |= {"transformers": version} if version else {}

    for path in list_shards(tmp_path / "results"):
        rewrite_shard(path, remove_versions, DIGEST_COLUMN)
    (cell,) = Ledger(tmp_path / "results").cells()
    provenance = {n: v for n, v in cell.identity.provenance.items() if n != TOKENISATION_KEY}
    (cell.folder / "cell.json").write_text(
        cell.identity.model_copy(update={"provenance": provenance}).to_note()
    )
    heard = RecordingProgress()
    results = run_experiment(measured(layer=[2, 3]), tmp_path / "results", heard)
    assert not results.outcome.failed
    warnings = [line for line in heard.lines if "do not record how texts were tokenised" in line]
    assert len(warnings) == (version is not None)
    assert all("transformers 5.0.0" in line for line in warnings)
    # What is measured now states them, and holds for what comes.
    file = measured(layer=[0, 1, 2, 3], sample=12)
    assert len(run_experiment(file, tmp_path / "results", **BOS).outcome.failed) == 1


OWN = """
from transformers import LlamaForCausalLM

class Negated(LlamaForCausalLM):
    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = -output.logits
        return output
"""


def test_the_models_own_code_is_not_mixed_with_that_of_transformers(
    tiny_llama, experiment, tmp_path
):
    """Both load the same files; which of them does is in no key."""
    folder, data = tiny_llama(), str(write_arc(tmp_path / "data"))
    (folder / "negated.py").write_text(OWN)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "negated.Negated"}
    (folder / "config.json").write_text(json.dumps(config))
    options = {"data": data, "sample": 8, "limit": None}
    file = experiment(folder, layer=[0], **options)
    assert not run_experiment(file, tmp_path / "one").outcome.failed
    results = run_experiment(experiment(folder, layer=[1], **options), tmp_path / "one", **BOS)
    (reason,) = results.outcome.failed.values()
    assert "the benchmark is now tokenised differently" in reason
    assert "model code that was not run; to run the code, add --trust-remote-code" in reason


DATED = "{{ strftime_now('%f') if date_string is not defined else date_string }} "
"""What a template says of the time, here to the microsecond."""


def test_a_chat_template_that_states_the_date_is_measured_in_one_go(
    tiny_llama, experiment, tmp_path
):
    folder, data = tiny_llama(), str(write_arc(tmp_path / "data"))
    template = folder / "chat_template.jinja"
    template.write_text(DATED + template.read_text())
    options = {"data": data, "sample": 8, "limit": None, "apply_chat_template": "true"}
    for settings, n_failed in ({}, 1), ({"chat_template_args": "date_string=today"}, 0):
        for layer in ([0], [1]):
            file = experiment(folder, layer=layer, **options, **settings)
            failed = run_experiment(file, tmp_path / "results").outcome.failed
            assert len(failed) == n_failed * layer[0], failed
            assert all("set the date in chat_template_args" in reason for reason in failed.values())
