"""lm-eval's result files of every ablated model, against those that lm-eval itself writes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import torch
from click.testing import CliRunner
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_file_task_name,
    get_latest_filename,
    get_results_filenames,
    get_sample_results_filenames,
    make_table,
    simple_parse_args_string,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tracker
from tests.conftest import save_tokenizer
from tracker.benchmarks import factory, results
from tracker.cli import main
from tracker.errors import RequestError
from tracker.ledger.store import Ledger
from tracker.models.pruned import pruned

FACTS = """\
task: facts_{name}
dataset_path: {path}
dataset_name: {config}
{files}training_split: train
fewshot_split: train
test_split: test
output_type: multiple_choice
num_fewshot: 1
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""
SUMS = """\
task: sums
dataset_path: {path}
dataset_name: {config}
{files}test_split: test
output_type: generate_until
num_fewshot: 0
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["th", "!"], max_gen_toks: 6, do_sample: false}}
filter_list:
  - name: first
    filter: [{{function: regex, regex_pattern: "(.)"}}, {{function: take_first}}]
  - name: whole
    filter: [{{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
WORDS = """\
task: words
dataset_path: {path}
dataset_name: {config}
{files}test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
BOOK = """\
task: book
dataset_path: {path}
dataset_name: {config}
{files}test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
GROUPS = {
    "facts": "[facts_body, facts_city]\naggregate_metric_list:\n"
    "  - {metric: acc, weight_by_size: true}\n",
    "facts_body": "[facts_heart, facts_lung]\naggregate_metric_list:\n"
    "  - {metric: acc, weight_by_size: false}\n  - {metric: acc_norm}\n",
}
TASKS = {
    "facts_heart": (FACTS, 5),
    "facts_lung": (FACTS, 3),
    "facts_city": (FACTS, 4),
    "sums": (SUMS, 4),
    "words": (WORDS, 4),
    "book": (BOOK, 3),
}
BENCHMARKS = ["facts", "sums", "words", "book"]


def row(number: int) -> dict[str, Any]:
    return {
        "question": f"Which organ pumps the blood through animal {number} of {number * 7}?",
        "choices": ["heart", f"the capital {number}", "muscle"][: 2 + number % 2],
        "answer": number % 2,
    }


def write_tasks(folder: Path, data: Path) -> tuple[Path, Path]:
    """The same tasks twice: on data that tracker finds, and with lm-eval's own means alone."""
    for number, (name, (text, count)) in enumerate(TASKS.items()):
        place = data / "tiny" / name
        place.mkdir(parents=True)
        for split, rows in (("train", 3), ("test", count)):
            lines = (json.dumps(row(100 * number + i)) + "\n" for i in range(rows))
            (place / f"{split}.jsonl").write_text("".join(lines))
        files = f"dataset_kwargs:\n  data_files:\n    train: {place}/train.jsonl\n"
        files += f"    test: {place}/test.jsonl\n"
        for kind, path, config, more in (
            ("ours", "tiny", name, ""),
            ("plain", "json", "null", files),
        ):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            filled = text.format(
                name=name.removeprefix("facts_"), path=path, config=config, files=more
            )
            (folder / kind / f"{name}.yaml").write_text(filled)
            for group, tasks in GROUPS.items():
                (folder / kind / f"{group}.yaml").write_text(f"group: {group}\ntask: {tasks}")
    return folder / "ours", folder / "plain"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A model, measured on the four benchmarks; and lm-eval's tasks without tracker."""
    folder = tmp_path_factory.mktemp("study")
    ours, plain = write_tasks(folder / "tasks", folder / "DATA")
    shape = {
        "vocab_size": save_tokenizer(folder / "lab" / "tiny", bos=False),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "lab" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        index = TaskManager(include_path=str(ours), include_defaults=False)
        patch.setattr(factory, "_index", lambda: index)
        # The versions of everything on this machine, which take seconds.
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
        patch.chdir(folder)
        run(folder, BENCHMARKS)
        yield folder, TaskManager(include_path=str(plain), include_defaults=False)


def run(folder: Path, benchmarks: list[str], results: str = "results", **settings: Any) -> None:
    """Measure by an experiment file."""
    grid = {"model": "lab/tiny", "benchmark": benchmarks, "data": "DATA", "layer": [0, 1, 2]}
    file = folder / "study.yaml"
    lines = (
        f"  {name}: {{{'values' if isinstance(value, list) else 'value'}: {value}}}\n"
        for name, value in (grid | settings).items()
    )
    file.write_text("method: grid\nparameters:\n" + "".join(lines))
    done = tracker.run(file, results=folder / results, track=[])
    assert not done.outcome.failed


def plainly(folder: Path, manager: TaskManager, removed: list[int], **settings: Any) -> Path:
    """What lm-eval writes of the really pruned checkpoint; as its command line does it."""
    model = pruned(AutoModelForCausalLM.from_pretrained(folder / "lab/tiny"), removed)
    place = folder / ("pruned" + "-".join(map(str, removed)))
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder / "lab/tiny").save_pretrained(place)
    writer = EvaluationTracker(output_path=str(folder / "theirs"))
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={place}",
        device="cpu",
        task_manager=manager,
        evaluation_tracker=writer,
        **settings,
    )
    samples = found.pop("samples")
    writer.save_results_aggregated(results=found, samples=samples)
    for task in found["configs"]:
        writer.save_results_samples(task_name=task, samples=samples[task])
    return folder / "theirs" / writer.general_config_tracker.model_name_sanitized


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Read a model's folder with lm-eval's own functions, as its tools do."""
    files = [path.as_posix() for path in folder.iterdir()]
    results = json.loads(Path(get_latest_filename(get_results_filenames(files))).read_text())
    samples = {}
    for task in results["configs"]:
        mine = [
            path
            for path in get_sample_results_filenames(files)
            if get_file_task_name(Path(path).name) == task
        ]
        lines = Path(get_latest_filename(mine)).read_text().splitlines()
        samples[task] = [json.loads(line) for line in lines]
    return results, samples


def assert_close(ours: Any, theirs: Any, place: str, **within: float) -> None:
    """Equal, but for the rounding of a log-likelihood and of what is computed from some."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), place
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{place}.{key}", **within)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), place
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{place}[{number}]", **within)
    elif ours != theirs:  # also a log-likelihood, which lm-eval writes as a text
        assert float(ours) == pytest.approx(float(theirs), **within), place


NAMES = {"baseline": ("lab__tiny", []), "layer:1": ("lab__tiny,removed_layers=1", [1])}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("ablation", NAMES)
def test_the_files_are_those_of_lm_eval_on_the_pruned_model(study, ablation):
    folder, manager = study
    name, removed = NAMES[ablation]
    if not (folder / "ours").exists():
        said = CliRunner().invoke(
            main,
            ["log-samples", "--results", "results", "--output", "ours"],
            catch_exceptions=False,
        )
        assert said.exit_code == 0, said.output
        assert "4 models, 28 files: ours" in said.output
        assert "bootstrapping" not in said.output
    ours, our_samples = read(folder / "ours" / name)
    theirs, their_samples = read(plainly(folder, manager, removed, tasks=BENCHMARKS))

    assert set(our_samples) == set(their_samples) == set(TASKS)
    assert_close(our_samples, their_samples, "samples", abs=1e-4)
    for task, samples in their_samples.items():
        for our, their in zip(our_samples[task], samples, strict=True):
            for exact in ("doc_hash", "prompt_hash", "target_hash", "metrics", "filter"):
                assert our[exact] == their[exact]
            assert our.get("acc") == their.get("acc")
            assert our.get("exact_match") == their.get("exact_match")
    same = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples")
    for key in (*same, "higher_is_better"):
        assert_close(ours[key], theirs[key], key, rel=1e-4)
    assert ours["task_hashes"] == theirs["task_hashes"]
    assert set(ours["results"]) == {*TASKS, *GROUPS}
    for metric in ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"):
        assert ours["results"]["facts_body"][metric] == theirs["results"]["facts_body"][metric]
    assert float(ours["results"]["words"]["perplexity_stderr,none"]) > 0
    # lm-eval's own tables, and where its readers look for a model.
    for column in ("results", "groups"):
        assert make_table(ours, column).count("\n") == make_table(theirs, column).count("\n")
    assert "facts_heart" in make_table(ours)
    for task, config in theirs["configs"].items():
        where = {"dataset_path", "dataset_name", "dataset_kwargs", "metadata"}
        assert {k: v for k, v in ours["configs"][task].items() if k not in where} == {
            k: v for k, v in config.items() if k not in where
        }
    args = simple_parse_args_string(ours["config"]["model_args"])
    assert args.pop("removed_layers", None) == (removed or [None])[0]
    assert args == {"pretrained": "lab/tiny", "dtype": "float32"}
    assert ours["config"]["bootstrap_iters"] == theirs["config"]["bootstrap_iters"]
    assert ours["model_name_sanitized"] == name
    # What only a run of this one model would know.
    assert ours["total_evaluation_time_seconds"] is None
    assert ours["config"]["model_num_parameters"] == (
        None if removed else theirs["config"]["model_num_parameters"]
    )
    # Nothing that lm-eval's files say is not there at all.
    there = {key for key in theirs if not key.startswith(("tokenizer", "eot", "max_length"))}
    assert there <= set(ours)
    assert set(theirs["config"]) <= set(ours["config"])


def test_the_stderr_is_resampled_as_often_as_lm_evals():
    default = inspect.signature(lm_eval.simple_evaluate).parameters["bootstrap_iters"].default
    assert default == results.BOOTSTRAP_ITERS
