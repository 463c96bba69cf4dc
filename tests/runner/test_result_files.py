"""lm-eval's result files of every ablated model, against those that lm-eval itself writes."""

from __future__ import annotations

import inspect
import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest
import yaml
from lm_eval.api.task import ConfigurableTask
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
from transformers import AutoTokenizer

import tracker
from tests.conftest import CHAT, golden, save_llama
from tests.helpers.lm_eval import folder_tasks, load_model_parts, write_rows
from tests.helpers.packages import fetch_every_eval_ever
from tests.helpers.runs import run_experiment as measure
from tests.helpers.runs import type_command, write_study
from tracker.benchmarks import factory, results
from tracker.ledger.store import Ledger
from tracker.ledger.views import RequestedView
from tracker.models.pruned import prune_model
from tracker.schema.changes import Ablation, Change
from tracker.schema.extent import random_order
from tracker.schema.views import View
from tracker.team.result_files import ablation_args

pytestmark = pytest.mark.usefixtures("one_thread")


TASKS = yaml.safe_load(Path(__file__).with_name("result_tasks.yaml").read_text())
"""Tasks of each kind, their numbers of documents, and groups of tasks."""
DEFAULT, FEW_RESAMPLINGS = results.BOOTSTRAP_ITERS, 1000
"""Resamplings: lm-eval's own number, and what the tests wait for."""
BENCHMARKS = ["facts", "sums", "words", "book"]


def make_row(number: int) -> dict[str, Any]:
    return {
        "question": f"Which organ pumps the blood through animal {number} of {number * 7}?",
        "choices": ["heart", f"the capital {number}", "muscle"][: 2 + number % 2],
        "answer": number % 2,
    }


def write_tasks(folder: Path, data: Path) -> tuple[Path, Path]:
    """Load the same tasks twice: on data that tracker finds, and by lm-eval alone."""
    for number, (name, (task, count)) in enumerate(TASKS["tasks"].items()):
        splits = {
            split: [make_row(100 * number + i) for i in range(rows)]
            for split, rows in (("train", 3), ("test", count))
        }
        data_folder = write_rows(data / "tiny" / name, **splits)
        files = {"data_files": {split: f"{data_folder}/{split}.jsonl" for split in splits}}
        for kind, source in (
            ("ours", {"dataset_path": "tiny", "dataset_name": name}),
            ("plain", {"dataset_path": "json", "dataset_kwargs": files}),
        ):
            content = {"task": name, "test_split": "test", **task, **source}
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for stem, stem_content in {name: content, **TASKS["groups"]}.items():
                (folder / kind / f"{stem}.yaml").write_text(yaml.safe_dump(stem_content))
    return folder / "ours", folder / "plain"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Build a model, measured on the four benchmarks; and lm-eval's tasks without tracker."""
    folder = tmp_path_factory.mktemp("study")
    ours, plain = write_tasks(folder / "tasks", folder / "DATA")
    shape = {"num_key_value_heads": 4, "max_position_embeddings": 64}
    save_llama(folder / "lab" / "tiny", layers=3, **shape)
    tokenizer = AutoTokenizer.from_pretrained(folder / "lab" / "tiny")
    tokenizer.chat_template = "{% if tone %}<{{ tone }}>{% endif %}" + CHAT
    tokenizer.save_pretrained(folder / "lab" / "tiny")
    (folder / "text.txt").write_text("The heart pumps the blood.\n\nThe lung does not.\n")
    with pytest.MonkeyPatch.context() as patch:
        index = folder_tasks(ours)
        patch.setattr(factory, "list_tasks", lambda: index.task_index)
        patch.setattr(results, "BOOTSTRAP_ITERS", FEW_RESAMPLINGS)
        # The versions of everything on this machine, which take seconds.
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
        patch.chdir(folder)
        run(folder, BENCHMARKS)
        yield folder, folder_tasks(plain)


def run(folder: Path, benchmarks: list[str], results: str = "results", **settings: Any) -> Path:
    """Measure by an experiment file; gives the results folder."""
    grid = {"model": "lab/tiny", "benchmark": benchmarks, "data": "DATA", "layer": [0, 1, 2]}
    file = write_study(folder / "study.yaml", **grid | settings)
    if (folder / "results/checks").exists():  # no attack twice
        shutil.copytree(folder / "results/checks", folder / results / "checks")
    assert not measure(file, folder / results).outcome.failed
    return folder / results


def plain_results(
    folder: Path, manager: TaskManager, removed: list[int], **settings: Any
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Write lm-eval's files for the really pruned checkpoint, as its command line; read them."""
    arguments = settings.pop("arguments", {})
    model, tokenizer = load_model_parts(folder / "lab/tiny")
    checkpoint = folder / ("pruned" + "-".join(map(str, removed)))
    prune_model(model, removed).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    writer = EvaluationTracker(output_path=str(folder / "theirs"))
    evaluation = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(checkpoint), **arguments},
        device="cpu",
        task_manager=manager,
        evaluation_tracker=writer,
        bootstrap_iters=FEW_RESAMPLINGS,
        **settings,
    )
    samples = evaluation.pop("samples")
    writer.save_results_aggregated(results=evaluation, samples=samples)
    for task in evaluation["configs"]:
        writer.save_results_samples(task_name=task, samples=samples[task])
    return read_results(folder / "theirs" / writer.general_config_tracker.model_name_sanitized)


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Read a model's folder with lm-eval's own functions, as its tools do."""
    files = [path.as_posix() for path in folder.iterdir()]
    results = json.loads(Path(get_latest_filename(get_results_filenames(files))).read_text())
    samples: dict[str, list[str]] = {}
    for path in get_sample_results_filenames(files):
        samples.setdefault(get_file_task_name(Path(path).name), []).append(path)
    latest = {task: get_latest_filename(paths) for task, paths in samples.items()}
    return results, {task: read_lines(path) for task, path in latest.items()}


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_close(ours: Any, theirs: Any, where: str, **tolerance: float) -> None:
    """Equal, but for the rounding of a log-likelihood and of what is computed from some."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{where}.{key}", **tolerance)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (our_item, their_item) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(our_item, their_item, f"{where}[{number}]", **tolerance)
    elif ours != theirs:  # also a log-likelihood, which lm-eval writes as a text
        assert float(ours) == pytest.approx(float(theirs), **tolerance), where


def log_samples(*arguments: str) -> tuple[int, str]:
    return type_command("log-samples", *arguments)


def write_all(folder: Path) -> Path:
    """Return the files of all that the fixture measured, written once by the command."""
    if not (folder / "ours").exists():
        code, output = log_samples("--output", "ours")
        assert code == 0, output
        assert "4 models, 28 files: ours" in output
        assert "bootstrapping" not in output
    return folder / "ours"


def log_run(folder: Path, benchmarks: list[str], name: str, **settings: Any) -> Path:
    """Return the files of what is measured by other settings."""
    measured = run(folder, benchmarks, name, **settings)
    log = tracker.log_samples(folder / f"ours-{name}", results=measured)
    assert (log.failed, log.notes) == ({}, [])
    return folder / f"ours-{name}"


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


NAMES = {"baseline": ("lab__tiny", []), "layer:1": ("lab__tiny,removed_layers=1", [1])}


@pytest.mark.parametrize("ablation", NAMES)
def test_the_files_are_those_of_lm_eval_on_the_pruned_model(study, ablation):
    folder, manager = study
    name, removed = NAMES[ablation]
    write_all(folder)
    ours, our_samples = read_results(folder / "ours" / name)
    theirs, their_samples = plain_results(folder, manager, removed, tasks=BENCHMARKS)

    assert set(our_samples) == set(their_samples) == set(TASKS["tasks"])
    assert_close(our_samples, their_samples, "samples", abs=1e-4)
    for task, samples in their_samples.items():
        for our, their in zip(our_samples[task], samples, strict=True):
            for exact in ("doc_hash", "prompt_hash", "target_hash", "metrics", "filter"):
                assert our[exact] == their[exact]
            for metric in ("acc", "exact_match"):
                assert our.get(metric) == their.get(metric)
    exact_keys = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples")
    for key in (*exact_keys, "higher_is_better"):
        assert_close(ours[key], theirs[key], key, rel=1e-4)
    assert ours["task_hashes"] == theirs["task_hashes"]
    assert set(ours["results"]) == {*TASKS["tasks"], *TASKS["groups"]}
    for metric in ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"):
        assert ours["results"]["facts_body"][metric] == theirs["results"]["facts_body"][metric]
    assert float(ours["results"]["words"]["perplexity_stderr,none"]) > 0
    # lm-eval's own tables, and where its readers look for a model.
    for column in ("results", "groups"):
        assert make_table(ours, column).count("\n") == make_table(theirs, column).count("\n")
    assert "facts_heart" in make_table(ours)
    for task, config in theirs["configs"].items():
        locations = {"dataset_path", "dataset_name", "dataset_kwargs", "metadata"}
        assert {k: v for k, v in ours["configs"][task].items() if k not in locations} == {
            k: v for k, v in config.items() if k not in locations
        }
    args = simple_parse_args_string(ours["config"]["model_args"])
    assert args.pop("removed_layers", None) == (removed or [None])[0]
    assert args == {"base" if removed else "pretrained": "lab/tiny", "dtype": "float32"}
    assert ours["config"]["bootstrap_iters"] == theirs["config"]["bootstrap_iters"]
    assert ours["model_name_sanitized"] == name
    # What only a run of this one model would know.
    assert ours["total_evaluation_time_seconds"] is None
    assert ours["config"]["model_num_parameters"] == (
        None if removed else theirs["config"]["model_num_parameters"]
    )
    # Nothing that lm-eval's files say is not there at all.
    keys = {key for key in theirs if not key.startswith(("tokenizer", "eot", "max_length"))}
    assert keys <= set(ours)
    assert set(theirs["config"]) <= set(ours["config"])


def test_the_stderr_is_resampled_as_often_as_lm_evals():
    default = inspect.signature(lm_eval.simple_evaluate).parameters["bootstrap_iters"].default
    assert default == DEFAULT


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_a_part_is_what_lm_eval_says_of_just_its_documents(study, part):
    """`words` has no training split and is halved; those of `facts` are scored on it."""
    folder, manager = study
    our_folder = log_run(folder, ["words", "facts"], part, part=part, layer=[1])
    order = random_order(1234, "words", range(4))
    indices = sorted(order[:2] if part == "calibration" else order[2:])
    words = {"tasks": ["words"], "samples": {"words": indices}}
    _, their_samples = plain_results(folder, manager, [1], **words)
    if part == "calibration":
        shutil.copytree(folder / "tasks/plain", folder / "trained")
        for path in (folder / "trained").glob("facts_*.yaml"):
            path.write_text(path.read_text().replace("test_split: test", "test_split: train"))
        manager = folder_tasks(folder / "trained")
    their_samples |= plain_results(folder, manager, [1], tasks=["facts"])[1]
    _, samples = read_results(our_folder / "lab__tiny,removed_layers=1")
    assert samples.keys() == {"words", "facts_heart", "facts_lung", "facts_city"}
    for task, rows in samples.items():
        assert_close(rows, their_samples[task], task, abs=1e-4)
    cells = {store.identity.benchmark.name: store for store in Ledger(folder / part).cells()}
    # What is scored anyway is no other cell than without a part.
    titles = {"calibration": ("words (calibration half)", "facts (train)")}
    cell_titles = cells["words"].identity.benchmark.title, cells["facts"].identity.benchmark.title
    assert cell_titles == titles.get(part, ("words (test half)", "facts"))
    for name, task in (("facts", "facts_heart"), ("words", "words")):
        ours = cells[name].read()
        ours = ours[(ours["ablation"] == "layer:1") & (ours["task"] == task)]
        theirs = {row["doc_id"]: row["acc"] for row in their_samples[task]}
        assert dict(zip(ours["doc"], ours["metric/acc"], strict=True)) == theirs


def test_what_was_said_under_lm_evals_names_needs_the_tokenizer_alone(study):
    folder, manager = study
    options = {
        "apply_chat_template": True,
        "system_instruction": "You are a painter.",
        "fewshot_as_multiturn": False,
        "gen_kwargs": {"max_gen_toks": 2},
    }
    tone = {"chat_template_args": {"tone": "soft"}}
    measured = run(folder, ["facts", "sums"], "chat", layer=[1], **options, **tone)
    weights = folder / "lab/tiny/model.safetensors"
    weights.rename(folder / "away")
    try:
        log = tracker.log_samples(folder / "ours-chat", results=measured)
    finally:
        (folder / "away").rename(weights)
    assert not log.failed
    options |= {"tasks": ["facts", "sums"], "arguments": tone}
    theirs, their_samples = plain_results(folder, manager, [1], **options)
    our_folder = folder / "ours-chat" / "lab__tiny,removed_layers=1"
    results = [json.loads(path.read_text()) for path in sorted(our_folder.glob("results_*.json"))]
    _, our_samples = read_results(our_folder)
    for ours in results:  # a text's settings are none of the choices'
        for task in ours["configs"]:
            rows = our_samples[task]
            assert_close(rows, their_samples[task], task, abs=1e-4)
            assert rows[0]["arguments"]["gen_args_0"]["arg_0"].startswith("<soft><system>You are")
            assert ours["task_hashes"][task] == theirs["task_hashes"][task]
            assert ours["results"][task] == theirs["results"][task]
        for key in ("system_instruction", "chat_template"):
            assert (ours[key], ours[f"{key}_sha"]) == (theirs[key], theirs[f"{key}_sha"])
    assert {task for ours in results for task in ours["configs"]} == set(theirs["configs"])
    # Without few-shot examples there is nothing to take turns.
    assert [ours["fewshot_as_multiturn"] for ours in results] == [False, True]
    assert [ours["config"]["gen_kwargs"] for ours in results] == [None, {"max_gen_toks": 2}]


def test_what_is_not_measured_yet_is_said_and_the_rest_is_written(study):
    folder, _ = study
    measured = run(folder, ["words"], "part", limit=3, layer=[1])
    (store,) = Ledger(measured).cells()
    (requested,) = store.views.read_requested()
    runs = (*requested.view.runs, Change(layers=(2,)))
    store.views.write(RequestedView(project="p", view=View(metric="acc", runs=runs)))
    lab = folder / "lab"
    lab.rename(folder / "away")  # what is written needs no model
    try:
        code, output = log_samples("--results", "part", "--output", "ours-part")
    finally:
        (folder / "away").rename(lab)
    assert code == 0
    assert (
        "tiny · words · 0-shot: 3 of 4 documents are measured for baseline, layer:1; the written "
        "files contain only the measured documents" in output
    )
    assert "0 of 4 documents are measured for layer:2; they have no files" in output
    assert file_names(folder / "ours-part") == {"lab__tiny", "lab__tiny,removed_layers=1"}
    ours, samples = read_results(folder / "ours-part" / "lab__tiny")
    assert ours["n-samples"] == {"words": {"original": 4, "effective": 3}}
    assert [sample["doc_id"] for sample in samples["words"]] == [0, 1, 2]


def test_what_lies_beneath_and_which_component_is_in_the_name(study):
    folder, _ = study
    options = {"removed": [[0]], "component": ["attention"], "layer": [1, 2]}
    measured = run(folder, ["words", "corpus:text.txt"], "deep", **options)
    log = tracker.log_samples(folder / "ours-deep", results=measured, layer=[2])
    assert log.notes == [
        "tiny · corpus:text.txt · 0-shot: no files are written, because lm-eval has no task for a "
        "corpus"
    ]
    deepest = "lab__tiny,removed_layers=0,removed_attention=2"
    assert file_names(folder / "ours-deep") == {"lab__tiny", "lab__tiny,removed_layers=0", deepest}
    args = read_results(folder / "ours-deep" / deepest)[0]["config"]["model_args"]
    assert args == "base=lab/tiny,dtype=float32,removed_layers=0,removed_attention=2"


def model_ids(folder: Path) -> dict[str, str]:
    """Return the id that every_eval_ever's converter gives each model, by the model's name."""
    fetch_every_eval_ever()
    from every_eval_ever.converters.lm_eval.adapter import LMEvalAdapter

    return {
        path.name.replace("__", "/"): record.model_info.id
        for path in folder.iterdir()
        for record in LMEvalAdapter().transform_from_directory(path, {})
    }


def test_no_ablated_model_passes_for_another(study):
    """Before: a stretch passed twice and three times shared a folder, and all ids were the base's.

    every_eval_ever made one model of the base model and of both repeats.
    """
    folder, _ = study
    options = {"intervention": ["repeat"], "repeats": [2, 3], "layer": [1]}
    measured = run(folder, ["words"], "again", **options)
    code, output = log_samples("--results", str(measured), "--output", "ours-again")
    assert (code, "3 models, 6 files" in output) == (0, True), output
    contents = {path.name: read_results(path)[0] for path in (folder / "ours-again").iterdir()}
    ids = model_ids(folder / "ours-again")
    assert ids == {name: name for name in ids} != {}
    assert set(ids) == {
        f"lab/tiny{end}" for end in ("", *(f",repeated_layers=1{n}" for n in ("", "x3")))
    }
    figures = {results["results"]["words"]["perplexity,none"] for results in contents.values()}
    assert len(figures) == 3


def test_what_cannot_stand_in_one_file(study):
    """A task of two benchmarks has a file of each; a benchmark that has changed has none."""
    folder, _ = study
    shutil.copytree(folder / "DATA", folder / "DATA2")
    run(folder, ["facts", "facts_city", "words"], "changed", data="DATA2", layer=[1])
    with (folder / "DATA2/tiny/words/test.jsonl").open("a") as file:
        file.write(json.dumps(make_row(9)) + "\n")
    code, output = log_samples("--results", "changed", "--output", "ours-changed")
    assert code == 1
    assert "failed: tiny · words · 0-shot: words has changed since it was measured" in output
    task_sets = [
        set(json.loads(path.read_text())["configs"])
        for path in sorted((folder / "ours-changed/lab__tiny").glob("results_*.json"))
    ]
    assert task_sets == [{"facts_heart", "facts_lung", "facts_city"}, {"facts_city"}]


def test_an_lm_eval_that_judges_otherwise_is_not_believed(study, monkeypatch):
    folder, _ = study
    original = ConfigurableTask.process_results

    def judge_wrongly(self: Any, doc: Any, results: Any) -> Any:
        metrics = original(self, doc, results)
        return {**metrics, "acc": 1.0 - metrics["acc"]} if "acc" in metrics else metrics

    monkeypatch.setattr(ConfigurableTask, "process_results", judge_wrongly)
    log = tracker.log_samples(folder / "ours-other", benchmark=["words"])
    (reason,) = log.failed.values()
    assert "document 0 of words: the stored acc is" in reason
    assert "the installed lm-eval computes" in reason
    assert not log.files


# Was: readers, who take the latest, went on reading what a clock that is ahead had written.
def test_what_is_written_last_has_the_latest_date(study):
    folder, _ = study
    log = tracker.log_samples(folder / "later", benchmark=["words"], layer=[1])
    for path in log.files:
        kind, _, end = path.name.rpartition("_")
        path.rename(path.with_name(f"{kind}_2999-12-31T23-59-59.5{end[end.rindex('.') :]}"))
    repeated = tracker.log_samples(folder / "later", benchmark=["words"], layer=[1])
    assert not repeated.failed
    for model_folder in (folder / "later").iterdir():
        for kind in ("results_*.json", "samples_words_*.jsonl"):
            (_, latest) = sorted(model_folder.glob(kind))
            assert latest.name.rpartition("_")[2].startswith("3000-01-01T00-00-00.5")
            assert latest in repeated.files


@pytest.mark.parametrize(("arguments", "why"), golden("log_samples"))
def test_a_wrong_request_writes_nothing(study, arguments, why):
    folder, _ = study
    code, output = log_samples("--output", "none", *arguments.split())
    assert code == 2
    assert why in output
    assert not (folder / "none").exists()


PARTS = [Change.parse(f"head:{name}") for name in ("3.0", "3.1", "4.0")]
MAPS = [Change.parse(f"int4:{layer}.{of}") for layer in (3, 4) for of in ("mlp", "mlp.up_proj")]
ABLATIONS = """
    baseline layer:3 layer:1+mean:3 mean:3 mean:4 scale:3 scale:4 linear:3 linear:4 int4:3 int4:4
    int4:3.mlp int4:4.mlp int4:3.mlp.up_proj int4:4.mlp.up_proj int8:3 repeat:3 repeat:4 repeat3:3
    repeat4:3 repeat3:3-4 repeat:1-2+repeat:3 repeat3:1-2+repeat:3 mean:3+mean:4 int4:embedding
    expert:3.0 expert:3.0+head:3.0
"""


def test_no_two_models_have_the_same_arguments():
    """Was: a model with a replaced layer was written as the intact one."""
    ablations = [Ablation.parse(name) for name in ABLATIONS.split()]
    ablations += [
        Ablation.from_changes(*parts) for n in (1, 2, 3) for parts in combinations(PARTS, n)
    ]
    ablations += [Ablation.from_changes(*maps) for n in (2, 3) for maps in combinations(MAPS, n)]
    names = {tuple(ablation_args(ablation).items()) for ablation in ablations}
    assert len(names) == len({ablation.name for ablation in ablations}) == len(ablations)
    assert not any("," in value for arguments in names for _, value in arguments)
    assert ablation_args(ablations[2]) == {"removed_layers": "1", "mean_layers": "3"}


def test_a_name_that_no_file_system_takes_is_cut():
    arguments = ablation_args(Ablation.parse("layers:3,17+mlp:5"))
    assert arguments == {"removed_layers": "3+17", "removed_mlp": "5"}
    named = (f"m,removed_layers={'+'.join(map(str, range(n)))}" for n in (90, 91))
    long = [results.model_folder(name) for name in named]
    assert len(set(long)) == 2
    assert all(len(name) < 255 for name in long)
