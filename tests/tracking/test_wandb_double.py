"""The double serves the real W&B client and CLI; nothing of ours is in these tests.

They run with all others until they have passed for this double and this wandb, which
`python -m tests.tracking.test_wandb_double` finds out and writes down; then when they are named.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import PROVED, double_state
from .wandb_client import Client
from .wandb_double import RefusedError, Run, WandbDouble, expand

QUIET = "settings=wandb.Settings(x_disable_stats=True, console='off')"

ONLINE = f"""
import wandb
run = wandb.init(project="layers", id="abc", name="shown", group="a · group", job_type="cell",
                 tags=["a", "b"], config={{"x": 1, "deep": {{"y": [1, 2]}}}}, {QUIET})
run.define_metric("layer")
run.define_metric("drop", step_metric="layer")
for layer in range(3):
    run.log({{"layer": layer, "drop": layer / 2}})
run.log({{"table": wandb.Table(columns=["layer"], data=[[0], [1]])}})
run.summary["accuracy"] = 0.25
run.finish()
"""

RESUMED = f"""
import json, wandb
run = wandb.init(project="layers", id="abc", resume="allow", config={{"x": 2}}, {QUIET})
print(json.dumps([run.resumed, run.config["deep"], run.summary["accuracy"]]))
run.log({{"layer": 3, "drop": 1.5}})
run.summary["accuracy"] = 0.75
run.finish()
"""

ARTIFACT = f"""
import pathlib, wandb
run = wandb.init(project="layers", id="abc", {QUIET})
for text in ("one", "two"):
    pathlib.Path("outcomes.txt").write_text(text)
    artifact = wandb.Artifact("outcomes", type="outcomes", metadata={{"text": text}})
    artifact.add_file("outcomes.txt", "deep/out comes.txt")
    run.log_artifact(artifact, aliases=["complete"]).wait()
run.finish()
"""

OFFLINE = f"""
import wandb
run = wandb.init(project="layers", id="abc", mode="offline", config={{"x": 1}}, {QUIET})
run.log({{"layer": 0}})
run.finish()
"""

PATIENT = """
import sys, wandb
waits = {f"x_{kind}_retry_wait_{end}_seconds": 0.2
         for kind in ("graphql", "file_stream", "file_transfer") for end in ("min", "max")}
settings = wandb.Settings(x_disable_stats=True, console="off", **waits)
run = wandb.init(project="layers", id="abc", settings=settings)
print("begun", flush=True)
sys.stdin.readline()
run.log({"layer": 0})
run.finish()
"""

TRIAL = f"""
import sys, wandb
run = wandb.init({QUIET})
score = 10 * run.config["a"] + run.config["b"]
run.log({{"score": score}})
sys.exit(int(score == 41))
"""

SWEEP = """
program: trial.py
method: grid
entity: team
project: layers
parameters:
  b: {values: [1, 2]}
  a: {min: 3, max: 4}
"""


@pytest.fixture
def double() -> Iterator[WandbDouble]:
    with WandbDouble() as served:
        yield served


@pytest.fixture
def client(double: WandbDouble, tmp_path: Path) -> Client:
    return Client(double, tmp_path)


def test_an_online_run_is_read_back(double: WandbDouble, client: Client) -> None:
    client.python(ONLINE)
    run = double.run("abc", "layers")
    assert (run.name, run.group, run.job_type) == ("shown", "a · group", "cell")
    assert (run.tags, run.state) == (["a", "b"], "finished")
    assert [row["drop"] for row in run.history[:3]] == [0, 0.5, 1]
    assert any(name.startswith("media/table/table") for name in run.files)
    wanted = '{"$and": [{"group": "a · group"}, {"config.x.value": 1}, {"jobType": "cell"}]}'
    listed, absent, scanned, sampled, keyed = client.read(
        f"[[r.id, r.config, r.summary['accuracy'], r.tags, r.state]"
        f" for r in api.runs('team/layers', filters={wanted}, lazy=False)]",
        "len(api.runs('team/layers', filters={'config.x.value': 2}))",
        "list(api.run('team/layers/abc').scan_history())",
        "api.run('team/layers/abc').history(pandas=False)",
        "list(api.run('team/layers/abc').scan_history(keys=['drop']))",
    )
    assert listed == [["abc", {"x": 1, "deep": {"y": [1, 2]}}, 0.25, ["a", "b"], "finished"]]
    assert absent == 0
    assert scanned == sampled == run.history
    assert keyed == [{"_step": step, "drop": step / 2} for step in range(3)]
    assert double.refused == []


def test_runs_come_in_pages(double: WandbDouble, client: Client) -> None:
    project = double.existing({"project": "layers"}, create=True)
    for number in range(5):
        project.runs[f"run{number}"] = Run(f"run{number}", f"id-{number}", "alike")
    pages = "[r.id for r in api.runs('team/layers', per_page=2, lazy=False)]"
    assert client.read(pages)[0] == [f"run{number}" for number in range(5)]
    assert sum(request.operation == "Runs" for request in double.requests) == 3


def test_a_resumed_run_goes_on_where_it_was(double: WandbDouble, client: Client) -> None:
    client.python(ONLINE)
    assert json.loads(client.python(RESUMED)) == [True, {"y": [1, 2]}, 0.25]
    run = double.run("abc", "layers")
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4]
    assert run.history[-1]["drop"] == 1.5
    assert run.summary["accuracy"] == 0.75
    assert run.values == {"x": 2, "deep": {"y": [1, 2]}}
    assert (run.name, run.tags) == ("shown", ["a", "b"])
    assert len(double.projects["team", "layers"].runs) == 1
    assert double.refused == []


def test_an_artifact_comes_back(double: WandbDouble, client: Client) -> None:
    client.python(ARTIFACT)
    versions = double.projects["team", "layers"].artifacts["outcomes", "outcomes"].versions
    assert [sorted(version.aliases) for version in versions] == [[], ["complete", "latest"]]
    assert versions[1].files == {"deep/out comes.txt": b"two"}
    assert list(versions[1].manifest["contents"]) == ["deep/out comes.txt"]
    new, old = (
        "api.artifact('team/layers/outcomes:complete')",
        "api.artifact('team/layers/outcomes:v0')",
    )
    metadata, folders, every, logged = client.read(
        f"[{new}.metadata, {old}.metadata]",
        f"[{new}.download(), {old}.download()]",
        "[[a.version, sorted(a.aliases)]"
        " for a in api.artifacts('outcomes', 'team/layers/outcomes')]",
        "[a.name for a in api.run('team/layers/abc').logged_artifacts()]",
    )
    assert metadata == [{"text": "two"}, {"text": "one"}]
    files = [client.folder / folder / "deep" / "out comes.txt" for folder in folders]
    assert [file.read_text() for file in files] == ["two", "one"]
    assert every == [["v1", ["complete", "latest"]], ["v0", []]]
    assert sorted(logged) == ["outcomes:v0", "outcomes:v1"]
    assert double.refused == []


def test_an_agent_runs_the_grid(double: WandbDouble, client: Client) -> None:
    (client.folder / "trial.py").write_text(TRIAL)
    (client.folder / "sweep.yaml").write_text(SWEEP)
    client.cli("sweep", "sweep.yaml")
    project = double.projects["team", "layers"]
    (sweep,) = project.sweeps.values()
    client.agent(f"team/layers/{sweep.name}")
    runs = [project.runs[run_id] for run_id in sweep.handed_out]
    assert [run.history[0]["score"] for run in runs] == [31, 32, 41, 42]
    assert [run.state for run in runs] == ["finished", "finished", "failed", "finished"]
    assert (sweep.state, len(double.agents)) == ("FINISHED", 1)
    (found,) = client.read(
        f"[[s.state, s.expected_run_count, [r.config for r in s.runs]]"
        f" for s in [api.sweep('team/layers/{sweep.name}')]]"
    )
    assert found == [["FINISHED", 4, [{"a": a, "b": b} for a in (3, 4) for b in (1, 2)]]]
    assert double.refused == []


def test_only_a_plain_grid_is_expanded() -> None:
    parameters: dict[str, Any] = {"b": {"min": 3, "max": 4}, "a": {"values": [True, None]}}
    points = expand({"method": "grid", "parameters": parameters | {"c": {"value": "x"}}})
    assert [tuple(point) for point in points] == [("a", "b", "c")] * 4
    assert [(point["a"], point["b"]) for point in points] == [
        (True, 3),
        (True, 4),
        (None, 3),
        (None, 4),
    ]
    with pytest.raises(RefusedError):
        expand({"method": "random", "parameters": parameters})
    with pytest.raises(RefusedError):
        expand({"method": "grid", "parameters": {"a": {"min": 0.5, "max": 1.5}}})


def test_an_offline_run_is_synced(double: WandbDouble, client: Client) -> None:
    client.python(OFFLINE)
    assert double.requests == []
    (folder,) = (client.folder / "dir" / "wandb").glob("offline-run-*")
    client.cli("sync", str(folder))
    run = double.run("abc", "layers")
    assert (run.values, run.state) == ({"x": 1}, "finished")
    assert [row["layer"] for row in run.history] == [0]
    assert double.refused == []


def test_what_is_absent_is_absent(double: WandbDouble, client: Client) -> None:
    with pytest.raises(AssertionError, match="Could not find project nowhere"):
        client.read("[r.id for r in api.runs('team/nowhere')]")
    with pytest.raises(AssertionError, match="Could not find run"):
        client.read("api.run('team/nowhere/abc').id")
    with pytest.raises(AssertionError, match="not found"):
        client.read("api.artifact('team/nowhere/outcomes:latest').name")
    assert double.refused == []


def test_what_is_too_long_is_refused(double: WandbDouble, client: Client) -> None:
    started = f"wandb.init(project='layers', id='abc', %s={{!r}}, {QUIET}).finish()"
    for name, limit in (("group", 128), ("job_type", 64), ("name", 128)):
        program = f"import wandb\n{started % name}"
        client.python(program.format("x" * limit))
        too_long = client.call(sys.executable, "-c", program.format("x" * (limit + 1)))
        assert too_long.returncode != 0
        assert f"{limit} limit exceeded" in double.refused.pop()
    # These the client itself refuses.
    for name, value in (("tags", ["x" * 65]), ("project", "x" * 129)):
        program = f"import wandb\nwandb.init({name}={value!r}, {QUIET})"
        assert client.call(sys.executable, "-c", program).returncode != 0
    program = f"import wandb\nwandb.Artifact({'x' * 129!r}, type='outcomes')"
    assert "128 characters" in client.call(sys.executable, "-c", program).stderr
    assert double.refused == []


def test_the_id_of_a_deleted_run_is_never_free_again(double: WandbDouble, client: Client) -> None:
    client.python(ONLINE)
    double.delete("abc", "layers")
    for program in (ONLINE, RESUMED):
        # The client tries again, as after an outage.
        done = client.call(sys.executable, "-c", program, WANDB__GRAPHQL_RETRY_MAX="1")
        assert done.returncode != 0
        assert "was previously created and deleted" in done.stderr
    assert not double.projects["team", "layers"].runs
    assert double.refused == []


def post(double: WandbDouble, query: str, key: str | None = None) -> tuple[int, str]:
    handler = urllib.request.HTTPPasswordMgrWithPriorAuth()
    handler.add_password(None, double.url, "api", key or double.key, is_authenticated=True)
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(handler))
    request = urllib.request.Request(f"{double.url}/graphql", json.dumps({"query": query}).encode())
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_what_it_does_not_know_is_refused(double: WandbDouble, client: Client) -> None:
    status, answer = post(double, "mutation LaunchRockets { launch { id } }")
    assert status == 400
    assert "LaunchRockets" in answer
    assert "LaunchRockets" in double.refused[0]
    client.python(ONLINE)
    with pytest.raises(AssertionError, match="filter displayName"):
        client.read("len(api.runs('team/layers', filters={'displayName': 'shown'}))")


def test_a_wrong_key_is_refused(double: WandbDouble, client: Client) -> None:
    assert post(double, "query Viewer { viewer { id } }", "x" * 40)[0] == 401
    done = client.call(sys.executable, "-c", ONLINE, WANDB_API_KEY="x" * 40)
    assert done.returncode != 0
    assert "401" in done.stderr or "API key" in done.stderr
    assert double.projects == {}


def test_faults_pass_and_the_state_stays(double: WandbDouble, client: Client) -> None:
    client.python(ONLINE)
    double.fail_with(507)
    assert post(double, "query Viewer { viewer { id } }")[0] == 507
    double.fail_with(None)
    address = double.url
    double.stop()
    with pytest.raises(urllib.error.URLError):
        post(double, "query Viewer { viewer { id } }")
    double.start()
    assert double.url == address
    assert client.read("api.run('team/layers/abc').state") == ["finished"]
    assert double.refused == []


def test_a_run_outlives_an_outage(double: WandbDouble, client: Client) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT],
        cwd=client.folder,
        env=client.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        double.stop()
        before = len(double.requests)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate("go on\n", timeout=1)
        assert len(double.requests) == before
        double.start()
        process.communicate(timeout=300)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait(timeout=20)
    run = double.run("abc", "layers")
    assert ([row["layer"] for row in run.history], run.state) == ([0], "finished")
    assert double.refused == []


if __name__ == "__main__":
    if not (failed := pytest.main(["-q", __file__])):
        PROVED.write_text(f"{double_state()}\n")
    sys.exit(failed)
