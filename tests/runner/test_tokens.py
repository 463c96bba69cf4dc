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
from tests.helpers.runs import Heard, arc, run, shards, typed
from tracker.core.provenance import TOKENISATION
from tracker.ledger.outcomes import TOKENS_DIGEST
from tracker.ledger.shards import read_shard, shard_file
from tracker.ledger.store import Ledger
from tracker.measuring.progress import Silent
from tracker.team.collect import collect

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
READ = "(is read as other tokens|texts are read otherwise)"

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
        asked = {"data": str(arc(tmp_path / "data")), "layer": [0, 1], "sample": 8, "limit": None}
        return experiment(model, name, **{**asked, **settings})

    done = run(write(), tmp_path / "results")
    assert not done.outcome.failed
    return write


def contents(results: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in shards(results)}


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
    before, heard = contents(tmp_path / "results"), Heard()
    file = measured("more.yaml", benchmark=["arc_easy", "arc_challenge"], **more)
    done = run(file, tmp_path / "results", heard, **BOS)
    ((title, why),) = done.outcome.failed.items()
    assert "arc_easy" in title
    assert re.search(READ + r" now \(the same versions\) than when this was measured", why)
    assert "--trust-remote-code" in why
    assert "choose another --results" in why
    assert done.outcome.exit_code == 1
    assert [cell.benchmark.name for cell in done.cells] == ["arc_challenge"]
    assert before.items() <= contents(tmp_path / "results").items()
    assert len(Ledger(tmp_path / "results").cells()) == 2
    # Who reads as before goes on.
    again = run(measured(**more), tmp_path / "results")
    assert not again.outcome.failed


def test_what_is_measured_is_shown_whatever_reads_texts_now(measured, tmp_path):
    done = run(measured(), tmp_path / "results", **BOS)
    assert not done.outcome.failed
    assert done.cells == tracker.load(tmp_path / "results").cells


def test_a_study_adds_nothing(measured, tmp_path):
    """Of snowball nothing lacks but what it observes."""
    before = contents(tmp_path / "results")
    command = ("study", "snowball", measured(), "--results", tmp_path / "results")
    code, said = typed(*command, "--trust-remote-code")
    assert code == 1, said
    assert re.search(f"{READ} now", " ".join(said.split()))
    assert contents(tmp_path / "results") == before
    assert not [*tmp_path.glob("results/cells/*/observed")]


def mixed(one: Path, other: Path) -> list[Path]:
    """Copy the shards of the only cell of a folder into another's; the copies."""
    (cell,) = Ledger(one).cells()
    return [Path(shutil.copy(path, cell.folder / "shards" / path.name)) for path in shards(other)]


def test_two_folders_are_not_mixed(measured, tmp_path):
    one, other = tmp_path / "results", tmp_path / "other"
    run(measured(layer=[2, 3]), other, **BOS)
    assert {key.name for key in shards(one)}.isdisjoint(key.name for key in shards(other))
    both = collect([str(one), str(other)], Silent())
    records = {cell.place: cell for folder in (one, other) for cell in tracker.load(folder).cells}
    for cell in both.cells:
        figures = (cell.n, cell.baseline.value, cell.provenance[TOKENISATION])
        of_one = [tracker.load(folder).cells[0] for folder in (one, other)]
        assert figures in [
            (each.n, each.baseline.value, each.provenance[TOKENISATION]) for each in of_one
        ]
        assert {run.n for run in cell.runs} == {cell.n}
    assert len(both.cells) == len(records)
    code, said = typed("report", one, other, "--output", tmp_path / "page.html")
    assert code == 1, said
    assert "read otherwise" in said


def test_a_folder_that_holds_both_is_named_and_shows_one(measured, tmp_path):
    one, other = tmp_path / "results", tmp_path / "other"
    alone = tracker.load(one).cells
    run(measured(layer=[0, 1, 2]), other, **BOS)
    copies = mixed(one, other)
    assert len(copies) == 1
    for command in ("check", "report"):
        code, said = typed(command, "--results", one)
        assert code == 1, said
        assert copies[0].name in said
        assert "its documents were read otherwise" in " ".join(said.split())
    assert tracker.load(one).cells == alone
    again = run(measured(layer=[0, 1, 2]), one)  # the third layer is not measured on these tokens
    assert not again.outcome.failed
    assert again.cells[0].n == 8
    rows = Ledger(one).cells()[0].read()
    assert rows.groupby("doc")[TOKENS_DIGEST].nunique().max() == 1


def rewrite(path: Path, change, without: str = "") -> None:
    """Write a shard anew with other metadata, and without a column."""
    shard = read_shard(path.read_bytes())
    about = {name: value for name, value in shard.about.items() if name != "digest"}
    change(about)
    table = shard.table.drop_columns([without]) if without else shard.table
    path.write_bytes(shard_file(table, about))


@pytest.mark.parametrize("version", ["5.0.0", None], ids=["another", "the same"])
def test_what_was_measured_before_digests_were_kept_goes_by_versions(measured, tmp_path, version):
    def of_before(about) -> None:
        about["provenance"].pop(TOKENISATION)
        about["provenance"].pop("tokenizers")
        about["provenance"] |= {"transformers": version} if version else {}

    for path in shards(tmp_path / "results"):
        rewrite(path, of_before, TOKENS_DIGEST)
    (cell,) = Ledger(tmp_path / "results").cells()
    stack = {n: v for n, v in cell.identity.provenance.items() if n != TOKENISATION}
    (cell.folder / "cell.json").write_text(
        cell.identity.model_copy(update={"provenance": stack}).sealed()
    )
    heard = Heard()
    done = run(measured(layer=[2, 3]), tmp_path / "results", heard)
    assert not done.outcome.failed
    warnings = [line for line in heard.lines if "does not state its tokens" in line]
    assert len(warnings) == (version is not None)
    assert all("transformers 5.0.0" in line for line in warnings)
    # What is measured now states them, and holds for what comes.
    later = run(measured(layer=[0, 1, 2, 3], sample=12), tmp_path / "results", **BOS)
    assert len(later.outcome.failed) == 1


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
    folder, data = tiny_llama(), str(arc(tmp_path / "data"))
    (folder / "negated.py").write_text(OWN)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "negated.Negated"}
    (folder / "config.json").write_text(json.dumps(config))
    asked = {"data": data, "sample": 8, "limit": None}
    assert not run(experiment(folder, layer=[0], **asked), tmp_path / "one").outcome.failed
    done = run(experiment(folder, layer=[1], **asked), tmp_path / "one", **BOS)
    (why,) = done.outcome.failed.values()
    assert "texts are read otherwise now" in why
    assert "the model's own code runs only with --trust-remote-code" in why


DATED = "{{ strftime_now('%f') if date_string is not defined else date_string }} "
"""What a template says of the time, here to the microsecond."""


def test_a_chat_template_that_states_the_date_is_measured_in_one_go(
    tiny_llama, experiment, tmp_path
):
    folder, data = tiny_llama(), str(arc(tmp_path / "data"))
    template = folder / "chat_template.jinja"
    template.write_text(DATED + template.read_text())
    asked = {"data": data, "sample": 8, "limit": None, "apply_chat_template": "true"}
    for settings, lacking in ({}, 1), ({"chat_template_args": "date_string=today"}, 0):
        for layer in ([0], [1]):
            file = experiment(folder, layer=layer, **asked, **settings)
            done = run(file, tmp_path / "results")
            assert len(done.outcome.failed) == lacking * layer[0], done.outcome.failed
            assert all("chat_template_args can fix" in why for why in done.outcome.failed.values())
