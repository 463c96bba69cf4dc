"""A double of the Weights & Biases server: what the real client and CLI need, in memory.

It proves our side of the protocol, not the server's behaviour: what it answers was learnt from
the client's own code and from what wandb 0.31 sends, so a test against it shows that our calls
reach the wire as we mean them, never that the real service would take them. What it does not
know it refuses with 400 and remembers in `refused`.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import yaml

from tests.helpers.answering import AnsweringHandler

Json = dict[str, Any]
Answer = tuple[int, bytes]

ENTITY = "team"
KEY = "plantedwandbkey" + "0123456789" * 2 + "abcde"
CREATED = "2026-01-01T00:00:00Z"
DONE_STATES = ("finished", "failed", "crashed")
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
IGNORED_STREAMS, MANIFEST = ("wandb-events.jsonl", "output.log"), "wandb_manifest.json"
RUN_FIELDS = {"displayName": "name", "groupName": "group", "jobType": "job_type"}
RUN_FIELDS |= {"notes": "notes", "tags": "tags", "sweep": "sweep", "display_name": "name"}


RUN_LIMITS = {
    # The server: "invalid parameters: 128 limit exceeded for GroupName". Its documentation names no
    # limit; the message is found in the logs of several projects.
    "groupName": 128,
    # The server: "invalid parameters: 64 limit exceeded for JobType" (wandb/wandb issue 6402).
    "jobType": 64,
    # A job whose run name is longer fails (NVIDIA-NeMo/Skills issue 842).
    "displayName": 128,
}
"""What is too long elsewhere the client refuses itself: tags, projects, artifacts."""


class RefusedError(Exception):
    """A request that the double does not support, or that exceeds W&B's limits."""


class GoneError(Exception):
    """A run's id belongs to a deleted run; the real server answers with 409."""


class Request(NamedTuple):
    """A request as it came in; the operation is the GraphQL one, else empty."""

    method: str
    path: str
    operation: str
    body: str


class GraphqlQuery(NamedTuple):
    """A GraphQL request."""

    operation: str
    variables: Json
    document: str


@dataclass
class Run:
    """A run; `config` and the rows are decoded and otherwise as the client sent them."""

    id: str
    storage_id: str
    name: str
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    state: str = "running"
    exit_code: int | None = None
    sweep: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    used_artifacts: list[str] = field(default_factory=list)
    """Names of the artifacts that it used, each with its version."""

    @property
    def values(self) -> Json:
        """The configuration as the user wrote it."""
        return {k: v["value"] for k, v in self.config.items() if k != "_wandb"}


@dataclass
class Version:
    """A version of an artifact; it has no index and is in no list until it is committed."""

    id: str
    collection: Collection
    digest: str
    metadata: Json
    run: str | None
    sent_aliases: list[str]
    index: int | None = None
    aliases: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    own_files: dict[str, bytes] = field(default_factory=dict)

    @property
    def manifest(self) -> Json:
        decoded: Json = json.loads(self.own_files[MANIFEST])
        return decoded


@dataclass
class Collection:
    """An artifact: its committed versions in order."""

    name: str
    type: str
    project: Project
    versions: list[Version] = field(default_factory=list)

    def version(self, alias: str) -> Version | None:
        return next((v for v in self.versions if alias in (*v.aliases, f"v{v.index}")), None)

    def point(self, aliases: list[str], version: Version) -> None:
        """Move the aliases, and `latest`, to a version."""
        for alias in dict.fromkeys([*aliases, "latest"]):
            for listed in self.versions:
                listed.aliases = [name for name in listed.aliases if name != alias]
            version.aliases.append(alias)


@dataclass
class Sweep:
    """A grid sweep; `handed_out` are the ids of its runs, in the order of the grid."""

    id: str
    name: str
    project: Project
    text: str
    config: Json
    grid: list[Json]
    state: str = "PENDING"
    handed_out: list[str] = field(default_factory=list)


@dataclass
class Agent:
    """A sweep agent and the ids of the runs that it was given."""

    id: str
    sweep: Sweep
    runs: list[str] = field(default_factory=list)


@dataclass
class Project:
    """Content of an entity's project: runs by id, artifacts by type and name, sweeps by name."""

    entity: str
    name: str
    number: int
    runs: dict[str, Run] = field(default_factory=dict)
    deleted_ids: set[str] = field(default_factory=set)
    artifacts: dict[tuple[str, str], Collection] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    views: list[Json] = field(default_factory=list)

    def version(self, reference: str) -> Version | None:
        """Find `name:alias`, whatever its type."""
        name, _, alias = reference.partition(":")
        collections = (c for c in self.artifacts.values() if c.name == name)
        return next(filter(None, (c.version(alias or "latest") for c in collections)), None)


Handler = Callable[["WandbDouble", GraphqlQuery], Json]
ProjectHandler = Callable[["WandbDouble", Project, GraphqlQuery], Json]
OPERATIONS: dict[str, Handler] = {}


def operation(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        OPERATIONS.update(dict.fromkeys(names, handler))
        return handler

    return register


def in_project(*names: str) -> Callable[[ProjectHandler], ProjectHandler]:
    """Register what answers for a project, which is null where it does not exist."""

    def register(handler: ProjectHandler) -> ProjectHandler:
        def answer(double: WandbDouble, ask: GraphqlQuery) -> Json:
            project = double.project(ask.variables)
            return {"project": None if project is None else handler(double, project, ask)}

        OPERATIONS.update(dict.fromkeys(names, answer))
        return handler

    return register


class WandbDouble:
    """The server; its state is plain and survives `stop()`, after which `start()` serves again."""

    def __init__(self, entity: str = ENTITY, key: str = KEY) -> None:
        self.entity, self.key = entity, key
        self.projects: dict[tuple[str, str], Project] = {}
        self.agents: dict[str, Agent] = {}
        self.versions: dict[str, Version] = {}
        self.requests: list[Request] = []
        self.refused: list[str] = []
        self.delay = 0.0
        self._status: int | None = None
        self._failing_text = b""
        self.dropped_text = b""
        """Requests that hold this get no answer: their connections are dropped."""
        self._lock = threading.RLock()
        self._stores: dict[str, dict[str, bytes]] = {}
        self._numbers = itertools.count(1)
        self._server: Server | None = None
        self._held_socket: socket.socket | None = None
        self._port = 0

    def __enter__(self) -> WandbDouble:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._release()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve, on the port of the first start."""
        self._release()
        self._server = Server(("127.0.0.1", self._port), http_handler(self))
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and answer no more on those that clients hold open."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        # A socket that does not listen refuses like a closed port, and keeps it from others.
        self._held_socket = socket.socket()
        self._held_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held_socket.bind(("127.0.0.1", self._port))
        self._held_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)

    def _release(self) -> None:
        if self._held_socket is not None:
            self._held_socket.close()
            self._held_socket = None

    @property
    def stopped(self) -> bool:
        return self._server is None

    def answer_with(self, status: int | None, holding: str = "") -> None:
        """Answer requests that hold a text with a status, until called with None."""
        self._status, self._failing_text = status, holding.encode()

    def run(self, run_id: str, project: str, entity: str | None = None) -> Run:
        """Find a run for a test."""
        return self.projects[entity or self.entity, project].runs[run_id]

    def add_sweep(self, project: str, parameters: Json) -> Sweep:
        """Add a sweep whose trials a test adds, or begins by `command`."""
        sweep_project = self.require_project({"project": project}, create=True)
        number, config = next(self._numbers), {"method": "grid", "parameters": parameters}
        name = f"sw{number:06d}"
        grid = expand_grid(config)
        sweep = Sweep(f"sweep-{number}", name, sweep_project, yaml.safe_dump(config), config, grid)
        sweep_project.sweeps[name] = sweep
        return sweep

    def add_trial(self, sweep: Sweep, run_id: str, state: str, values: Json) -> None:
        """Add what an agent's trial has left; a run without telemetry has not begun."""
        config = {name: {"value": value} for name, value in values.items()}
        config["_wandb"] = {"value": {"t": {}}}
        self._new_run(sweep.project, run_id, state=state, sweep=sweep.name, config=config)
        sweep.project.runs[run_id].name = run_id
        sweep.handed_out.append(run_id)

    def delete(self, run_id: str, project: str) -> None:
        """Delete a run as the page of W&B does: its id is never free again."""
        run_project = self.projects[self.entity, project]
        del run_project.runs[run_id]
        run_project.deleted_ids.add(run_id)

    def project(self, variables: Json, create: bool = False) -> Project | None:
        name = variables.get("project") or variables.get("projectName") or "uncategorized"
        entity = variables.get("entity") or variables.get("entityName") or self.entity
        if create and (entity, name) not in self.projects:
            self.projects[entity, name] = Project(entity, name, next(self._numbers))
        return self.projects.get((entity, name))

    def require_project(self, variables: Json, create: bool = False) -> Project:
        project = self.project(variables, create)
        if project is None:
            raise RefusedError("no such project")
        return project

    def answer(self, method: str, path: str, authorization: str, body: bytes) -> Answer:
        """Answer a request; never raises for what it carries."""
        time.sleep(self.delay)
        with self._lock:
            ask = parse_query(body) if (method, path) == ("POST", "/graphql") else None
            name = ask.operation if ask else ""
            self.requests.append(Request(method, path, name, body.decode(errors="replace")))
            if self._status is not None and self._failing_text in body:
                return failure_answer(self._status, f"the double answers {self._status}")
            is_storage = path.startswith("/storage/")  # like a signed address, it needs no key
            if not is_storage and authorization != basic_authorization(self.key):
                return failure_answer(401, "invalid API key")
            try:
                if ask and name in OPERATIONS:
                    return success_answer({"data": OPERATIONS[name](self, ask)})
                if is_storage:
                    return self._storage(method, path, body)
                if method == "POST" and path.endswith("/file_stream"):
                    return success_answer(self._file_stream(path, json.loads(body)))
                raise RefusedError("not known")
            except GoneError as error:
                return failure_answer(409, str(error))
            except (RefusedError, LookupError, TypeError, ValueError, AttributeError) as error:
                self.refused.append(f"{name or f'{method} {path}'}: {error!r}")
                return failure_answer(400, f"refused by the double: {self.refused[-1]}")

    def _storage(self, method: str, path: str, body: bytes) -> Answer:
        owner, name = path.removeprefix("/storage/").split("/", 1)
        files = self._stores[owner]
        if method == "GET":
            return 200, files[unquote(name)]
        files[unquote(name)] = body
        return 200, b""

    def _storage_url(self, owner: str, name: str) -> str:
        return f"{self.url}/storage/{owner}/{quote(name)}"

    def _file_stream(self, path: str, sent: Json) -> Json:
        entity, project, run_id = map(unquote, path.split("/")[2:5])
        run = self.projects[entity, project].runs[run_id]
        for name, chunk in sent.get("files", {}).items():
            offset, lines = chunk["offset"], chunk["content"]
            if name == HISTORY:
                if offset > len(run.history):
                    raise RefusedError(f"{name} has {len(run.history)} rows, not {offset}")
                run.history[offset : offset + len(lines)] = map(json.loads, lines)
            elif name == SUMMARY:
                run.summary = json.loads(lines[-1])
            elif name not in IGNORED_STREAMS:
                raise RefusedError(f"no such stream: {name}")
        if sent.get("files"):  # a run that is continued is running
            run.state, run.exit_code = "running", None
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
            run.state = "failed" if run.exit_code else "finished"
        return {"exitcode": run.exit_code, "limits": {}}

    @operation("Viewer", "GetDefaultEntity", "OrganizationCoreWeaveOrganizationID", "GetViewer")
    @operation("ServerFeaturesQuery")
    def _account(self, _ask: GraphqlQuery) -> Json:
        teams = {"edges": [{"node": {"name": self.entity}}]}
        viewer: Json = {"id": "viewer", "entity": self.entity, "username": "tester", "teams": teams}
        viewer |= {"email": "tester@localhost", "flags": "{}", "name": "Tester", "admin": False}
        viewer |= {"deletedAt": None, "apiKeys": None}
        server: Json = {"serverInfo": {"features": []}}
        return {"viewer": viewer, "entity": {"organization": None}, **server}

    @operation("UpsertBucket")
    def _upsert_run(self, ask: GraphqlQuery) -> Json:
        sent = {name: value for name, value in ask.variables.items() if value is not None}
        project, run = self._by_storage_id(sent["id"]) if "id" in sent else (None, None)
        refuse_long_fields(sent)
        project = project or self.require_project(sent, create=True)
        if sent.get("name") in project.deleted_ids:
            # "cannot be reused once a run is deleted" (wandb/sdk/wandb_init.py); the words are the
            # server's (wandb/wandb issues 1192, 4897).
            path = f"{project.entity}/{project.name}/{sent['name']}"
            raise GoneError(f"run {path} was previously created and deleted; try a new run name")
        run = run or project.runs.get(sent["name"])
        inserted = run is None
        run = run or self._new_run(project, sent["name"])
        for sent_name in sent.keys() & RUN_FIELDS.keys():
            setattr(run, RUN_FIELDS[sent_name], sent[sent_name])
        for sent_name, attribute in (("config", "config"), ("summaryMetrics", "summary")):
            if sent_name in sent:
                setattr(run, attribute, json.loads(sent[sent_name]))
        if "host" in sent:  # sent by an init, not by an update of its configuration
            run.state, run.exit_code = "running", None
        return {"upsertBucket": {"bucket": run_node(project, run, ask), "inserted": inserted}}

    def _by_storage_id(self, storage_id: str) -> tuple[Project, Run] | tuple[None, None]:
        all_runs = ((p, run) for p in self.projects.values() for run in p.runs.values())
        return next(((p, run) for p, run in all_runs if run.storage_id == storage_id), (None, None))

    def _new_run(self, project: Project, run_id: str, **attributes: Any) -> Run:
        number = next(self._numbers)
        run = Run(run_id, f"run-{number}", f"nameless-{number}", **attributes)
        project.runs[run_id], self._stores[run.storage_id] = run, run.files
        return run

    @operation("DeleteRun")
    def _delete_run(self, ask: GraphqlQuery) -> Json:
        project, run = self._by_storage_id(ask.variables["id"])
        if project is None or run is None:
            raise RefusedError(f"no run {ask.variables['id']}")
        del project.runs[run.id]
        project.deleted_ids.add(run.id)
        return {"deleteRun": {"clientMutationId": None}}

    @operation("RunResumeStatus")
    def _resume_status(self, ask: GraphqlQuery) -> Json:
        project = self.project(ask.variables)
        if project is None:
            return {"model": None}
        run = project.runs.get(ask.variables["name"])
        return {"model": {**project_node(project), "bucket": run and run_node(project, run, ask)}}

    @operation("CreateRunFiles")
    def _run_files(self, ask: GraphqlQuery) -> Json:
        run = self.require_project(ask.variables).runs[ask.variables["run"]]
        urls = {name: self._storage_url(run.storage_id, name) for name in ask.variables["files"]}
        files = [{"name": name, "uploadUrl": url} for name, url in urls.items()]
        return {"createRunFiles": {"runID": run.storage_id, "uploadHeaders": [], "files": files}}

    @in_project("HistoryPage", "Run", "RunFullHistory", "RunHistoryKeys", "RunParquetHistory")
    @in_project("RunSampledHistory", "RunState", "SampledHistoryPage")
    def _run(self, project: Project, ask: GraphqlQuery) -> Json:
        asked_for = [ask.variables.get(name) for name in ("run", "runName", "name")]
        run = project.runs.get(next(filter(None, asked_for)))
        return {"run": run and run_node(project, run, ask)}

    @operation("GetProjects")
    def _projects(self, ask: GraphqlQuery) -> Json:
        projects = [p for p in self.projects.values() if p.entity == ask.variables["entity"]]
        fields = {"createdAt": CREATED, "isBenchmark": False, "user": None}
        nodes = [{**project_node(p), "entityName": p.entity, **fields} for p in projects]
        return {"models": page_nodes(nodes, ask)}

    @operation("upsertView", "UpsertView2")
    def _upsert_view(self, ask: GraphqlQuery) -> Json:
        """Store a report or a saved view; without an id it is a new one, whatever its name."""
        sent = {name: ask.variables.get(name) for name in ("name", "displayName", "type", "spec")}
        json.loads(sent["spec"])
        project = self.require_project(ask.variables)
        view_id = ask.variables.get("id")
        view = next((v for v in project.views if v["id"] == view_id), None)
        if view_id and view is None:
            raise RefusedError(f"no view {view_id}")
        if view is None:
            view = {"id": f"Vmlldzo{next(self._numbers)}"}
            project.views.append(view)
        view.update(sent, description=ask.variables.get("description"))
        project_fields = {"id": "1", "name": project.name, "entityName": project.entity}
        node = {**view, "project": project_fields, "updatedAt": CREATED}
        return {"upsertView": {"view": node, "inserted": view_id is None}}

    @in_project("ProjectInternalId")
    def _internal_id(self, project: Project, _ask: GraphqlQuery) -> Json:
        return project_node(project)

    @in_project("ProjectViews", "View")
    def _views(self, project: Project, ask: GraphqlQuery) -> Json:
        name = ask.variables.get("viewName")
        kind = ask.variables.get("viewType", "runs")
        matching = [v for v in project.views if v["type"] == kind and name in (None, v["name"])]
        user = {"username": "tester", "photoUrl": "", "email": ""}
        fields = {"user": user, "createdAt": CREATED, "updatedAt": CREATED}
        return {"allViews": page_nodes([{**view, **fields} for view in matching], ask)}

    @in_project("Runs")
    def _runs(self, project: Project, ask: GraphqlQuery) -> Json:
        if (order := ask.variables.get("order")) not in (None, "+created_at"):
            raise RefusedError(f"order {order}")
        filters = json.loads(ask.variables.get("filters") or "{}")
        runs = [run for run in project.runs.values() if matches_filters(run, filters)]
        page = page_nodes([run_node(project, run, ask) for run in runs], ask)
        return {**project_node(project), "runCount": len(runs), "runs": page}

    @operation("CreateArtifact")
    def _create_artifact(self, ask: GraphqlQuery) -> Json:
        sent = ask.variables["input"]
        project = self.require_project(sent, create=True)
        name, kind = sent["artifactCollectionName"], sent["artifactTypeName"]
        collection = project.artifacts.setdefault((kind, name), Collection(name, kind, project))
        latest = collection.version("latest")
        aliases = [alias["alias"] for alias in sent.get("aliases") or []]
        version = next((v for v in collection.versions if v.digest == sent["digest"]), None)
        if version is None:
            metadata = json.loads(sent.get("metadata") or "{}")
            fields = (collection, sent["digest"], metadata, sent.get("runName"), aliases)
            version = Version(f"artifact-{next(self._numbers)}", *fields)
            self.versions[version.id] = version
            self._stores[version.id] = version.files
            self._stores[f"of-{version.id}"] = version.own_files
        else:
            collection.point(aliases, version)
        latest_node = {"latestArtifact": latest and {"id": latest.id, "versionIndex": latest.index}}
        node = version_node(version) | {"artifactSequence": latest_node}
        return {"createArtifact": {"artifact": node}}

    @operation("CreateArtifactManifest")
    def _create_manifest(self, ask: GraphqlQuery) -> Json:
        artifact = ask.variables["artifactID"]
        url = self._storage_url(f"of-{artifact}", MANIFEST)
        file = {"id": artifact, "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact, "file": file}}}

    @operation("FetchArtifactManifest")
    def _manifest(self, ask: GraphqlQuery) -> Json:
        file = {"directUrl": self._storage_url(f"of-{ask.variables['id']}", MANIFEST)}
        return {"artifact": {"currentManifest": {"file": file}}}

    @operation("CreateArtifactFiles")
    def _create_artifact_files(self, ask: GraphqlQuery) -> Json:
        edges = []
        for file in ask.variables["input"]["artifactFiles"]:
            url = self._storage_url(file["artifactID"], file["name"])
            node: Json = {"storagePath": url, "uploadUrl": url, "uploadHeaders": []}
            node |= {"uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    @operation("CommitArtifact")
    def _commit_artifact(self, ask: GraphqlQuery) -> Json:
        version = self.versions[ask.variables["artifactID"]]
        if version.index is None:
            version.index = len(version.collection.versions)
            version.collection.versions.append(version)
            version.collection.point(version.sent_aliases, version)
        return {"commitArtifact": {"artifact": version_node(version)}}

    @operation("UseArtifact")
    def _use_artifact(self, ask: GraphqlQuery) -> Json:
        version = self.versions[ask.variables["artifactID"]]
        project = ask.variables["entityName"], ask.variables["projectName"]
        run = self.projects[project].runs[ask.variables["runName"]]
        run.used_artifacts.append(f"{version.collection.name}:v{version.index}")
        return {"useArtifact": {"artifact": version_node(version)}}

    @operation("ArtifactByID")
    def _artifact(self, ask: GraphqlQuery) -> Json:
        return {"artifact": version_node(self.versions[ask.variables["id"]])}

    @in_project("ArtifactType")
    def _artifact_type(self, project: Project, ask: GraphqlQuery) -> Json:
        version = project.version(ask.variables["name"])
        return {"artifact": version and version_node(version)}

    @in_project("ArtifactMembershipByName")
    def _membership(self, project: Project, ask: GraphqlQuery) -> Json:
        version = project.version(ask.variables["name"])
        if version is None:
            return {"artifactCollectionMembership": None}
        node: Json = {"id": f"{version.id}-member", "versionIndex": version.index}
        node |= {"__typename": "ArtifactCollectionMembership", "artifact": version_node(version)}
        node |= {"createdAt": CREATED, "aliases": alias_nodes(version)}
        node |= {"artifactCollection": sequence_node(version)}
        return {"artifactCollectionMembership": node}

    @in_project("GetArtifactMembershipFileUrls")
    def _artifact_urls(self, project: Project, ask: GraphqlQuery) -> Json:
        version = project.version(f"{ask.variables['collection']}:{ask.variables['alias']}")
        if version is None:
            return {"artifactCollection": None}
        urls = {name: self._storage_url(version.id, name) for name in version.files}
        nodes = [{"__typename": "File", "name": x, "directUrl": url} for x, url in urls.items()]
        files = {"artifactMembership": {"files": page_nodes(nodes, ask)}}
        return {"artifactCollection": {**sequence_node(version), **files}}

    @in_project("ProjectArtifactCollection")
    def _collection(self, project: Project, ask: GraphqlQuery) -> Json:
        collection = project.artifacts.get((ask.variables["type"], ask.variables["name"]))
        if collection is None:
            return {"artifactType": {"artifactCollection": None}}
        node: Json = {"__typename": "ArtifactSequence", "id": collection.name}
        node |= {"name": collection.name, "project": project_node(project)}
        node |= {"description": None, "createdAt": CREATED, "updatedAt": CREATED}
        node |= {"type": {"name": collection.type}, "tags": {"edges": []}}
        return {"artifactType": {"artifactCollection": node}}

    @operation("UpsertSweep")
    def _upsert_sweep(self, ask: GraphqlQuery) -> Json:
        config = yaml.safe_load(text := ask.variables["config"])
        grid, number = expand_grid(config), next(self._numbers)
        project = self.require_project(ask.variables, create=True)
        sweep = Sweep(f"sweep-{number}", f"sw{number:06d}", project, text, config, grid)
        project.sweeps[sweep.name] = sweep
        node: Json = {"name": sweep.name, "project": project_node(sweep.project)}
        return {"upsertSweep": {"sweep": node, "configValidationWarnings": []}}

    @in_project("GetSweep", "GetSweepState", "SweepWithRuns")
    def _sweep(self, project: Project, ask: GraphqlQuery) -> Json:
        sweep = project.sweeps.get(ask.variables.get("sweep") or ask.variables["name"])
        return {"sweep": sweep and sweep_node(sweep, ask)}

    @operation("CreateAgent")
    def _create_agent(self, ask: GraphqlQuery) -> Json:
        sweep = self.require_project(ask.variables).sweeps[ask.variables["sweep"]]
        agent = Agent(f"agent-{next(self._numbers)}", sweep)
        self.agents[agent.id] = agent
        return {"createAgent": {"agent": {"id": agent.id}}}

    @operation("Heartbeat")
    def _heartbeat(self, ask: GraphqlQuery) -> Json:
        agent = self.agents[ask.variables["id"]]
        alive = json.loads(ask.variables["runState"])
        commands = json.dumps([self.command(agent)] if not alive else [])
        return {"agentHeartbeat": {"agent": {"id": agent.id}, "commands": commands}}

    def command(self, agent: Agent) -> Json:
        """Return the next command for an agent that has no live trial."""
        sweep, runs = agent.sweep, agent.sweep.project.runs
        for run_id in agent.runs:
            if runs[run_id].state not in DONE_STATES:  # its process is gone without a goodbye
                runs[run_id].state = "crashed"
        if len(sweep.handed_out) == len(sweep.grid):
            sweep.state = "FINISHED"
            return {"type": "exit"}
        point = sweep.grid[len(sweep.handed_out)]
        values = {name: {"value": value} for name, value in point.items()}
        run_id = f"trial{next(self._numbers):05d}"
        run_fields: Json = {"state": "pending", "sweep": sweep.name, "config": dict(values)}
        self._new_run(sweep.project, run_id, **run_fields)
        sweep.state = "RUNNING"
        sweep.handed_out.append(run_id)
        agent.runs.append(run_id)
        program = sweep.config.get("program")
        return {"type": "run", "run_id": run_id, "program": program, "args": values}


def expand_grid(config: Json) -> list[Json]:
    """List the points of a grid: names in alphabetical order, the last one changing fastest."""
    if config.get("method") != "grid":
        raise RefusedError(f"method {config.get('method')}")
    choices = []
    for name, parameter in sorted(config["parameters"].items()):
        if "values" in parameter:
            choices.append([(name, value) for value in parameter["values"]])
        elif "value" in parameter:
            choices.append([(name, parameter["value"])])
        elif isinstance(parameter.get("min"), int) and isinstance(parameter.get("max"), int):
            values = range(parameter["min"], parameter["max"] + 1)
            choices.append([(name, value) for value in values])
        else:
            raise RefusedError(f"parameter {name}: {parameter}")
    return [dict(point) for point in itertools.product(*choices)]


def matches_filters(run: Run, filters: Json) -> bool:
    return all(matches_filter(run, name, value) for name, value in filters.items())


def matches_filter(run: Run, name: str, value: Any) -> bool:
    if name == "$and":
        return all(matches_filters(run, subfilter) for subfilter in value)
    run_values = {"group": run.group, "jobType": run.job_type, "sweep": run.sweep}
    if name not in run_values or not isinstance(value, str):
        raise RefusedError(f"filter {name}: {value}")
    return run_values[name] == value


def refuse_long_fields(sent: Json) -> None:
    """Refuse what the server refuses of a run, in its words."""
    for name, limit in RUN_LIMITS.items():
        if len(sent.get(name, "")) > limit:
            raise RefusedError(f"invalid parameters: {limit} limit exceeded for {name}")


def project_node(project: Project) -> Json:
    entity = {"id": f"entity-{project.entity}", "name": project.entity}
    ids = {"id": f"project-{project.number}", "internalId": str(project.number)}
    return {**ids, "name": project.name, "entity": entity, "readOnly": False}


def run_node(project: Project, run: Run, ask: GraphqlQuery) -> Json:
    steps = [row["_step"] for row in run.history]
    keys: Json = {key: {} for row in run.history for key in row}
    telemetry = run.config.get("_wandb", {}).get("value", {}).get("t")
    # No row was exported to Parquet: all are live, so the client asks for pages.
    live = {"parquetUrls": [], "liveData": [{"_step": step} for step in steps]}
    low, high = ask.variables.get("minStep", 0), ask.variables.get("maxStep", float("inf"))
    node: Json = {"id": run.storage_id, "name": run.id, "displayName": run.name, "tags": run.tags}
    node |= {"description": run.notes, "notes": run.notes, "sweepName": run.sweep}
    node |= {"group": run.group, "jobType": run.job_type, "commit": None, "readOnly": False}
    node |= {"projectId": str(project.number), "project": project_node(project)}
    node |= {"state": run.state, "exitcode": run.exit_code, "failed": run.state == "failed"}
    node |= {"running": run.state == "running", "stopped": False, "shouldStop": False}
    node |= {"createdAt": CREATED, "heartbeatAt": CREATED}
    node |= {"user": {"name": "Tester", "username": "tester"}, "systemMetrics": "{}"}
    node |= {"config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary)}
    # The client takes a run without telemetry for one that has not begun.
    node |= {"wandbConfig": json.dumps({} if telemetry is None else {"t": telemetry})}
    node |= {"historyKeys": {"lastStep": max(steps), "keys": keys} if steps else None}
    node |= {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}
    node |= {"parquetHistory": live, "eventsTail": "[]", "events": []}
    node |= {"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]])}
    node |= {"history": [json.dumps(row) for row in run.history if low <= row["_step"] < high]}
    requested_fields = set(re.findall(r"\w+", ask.document))
    return {name: value for name, value in node.items() if name in requested_fields}


def sequence_node(version: Version) -> Json:
    project = project_node(version.collection.project)
    return {"__typename": "ArtifactSequence", "name": version.collection.name, "project": project}


def alias_nodes(version: Version) -> list[Json]:
    kind = {"__typename": "ArtifactAlias", "artifactCollection": sequence_node(version)}
    return [{**kind, "id": f"{version.id}-{alias}", "alias": alias} for alias in version.aliases]


def version_node(version: Version) -> Json:
    node: Json = {"__typename": "Artifact", "id": version.id}
    node |= {"artifactSequence": sequence_node(version)}
    node |= {"artifactType": {"name": version.collection.type}, "versionIndex": version.index}
    node |= {"state": "PENDING" if version.index is None else "COMMITTED"}
    node |= {"description": None, "metadata": json.dumps(version.metadata)}
    node |= {"digest": version.digest, "size": sum(map(len, version.files.values()))}
    node |= {"fileCount": len(version.files), "aliases": alias_nodes(version), "tags": []}
    node |= {"createdAt": CREATED, "updatedAt": CREATED, "commitHash": None}
    return node | {"historyStep": None, "ttlDurationSeconds": -1, "ttlIsInherited": True}


def sweep_node(sweep: Sweep, ask: GraphqlQuery) -> Json:
    runs = [run_node(sweep.project, sweep.project.runs[x], ask) for x in sweep.handed_out]
    node: Json = {"__typename": "Sweep", "id": sweep.id, "name": sweep.name, "state": sweep.state}
    node |= {"displayName": sweep.config.get("name"), "method": sweep.config["method"]}
    node |= {"description": sweep.config.get("description"), "config": sweep.text}
    node |= {"createdAt": CREATED, "updatedAt": CREATED, "heartbeatAt": CREATED}
    node |= {"bestLoss": None, "controller": None, "scheduler": None, "earlyStopJobRunning": False}
    node |= {"runCount": len(runs), "runCountExpected": len(sweep.grid)}
    return node | {"runs": {"edges": [{"node": run} for run in runs]}}


def page_nodes(nodes: list[Json], ask: GraphqlQuery) -> Json:
    start = int(ask.variables.get("cursor") or 0)
    end = min(start + (ask.variables.get("perPage") or 50), len(nodes))
    edges = [{"node": nodes[i], "cursor": str(i + 1)} for i in range(start, end)]
    info = {"__typename": "PageInfo", "endCursor": str(end), "hasNextPage": end < len(nodes)}
    return {"totalCount": len(nodes), "edges": edges, "pageInfo": info}


def parse_query(body: bytes) -> GraphqlQuery:
    try:
        sent = json.loads(body)
        match = re.search(r"\b(?:query|mutation)\s+(\w+)", sent["query"])
        name = match[1] if match else "unnamed"
        return GraphqlQuery(name, sent.get("variables") or {}, sent["query"])
    except (LookupError, TypeError, ValueError):
        return GraphqlQuery("malformed", {}, "")


def basic_authorization(key: str) -> str:
    return "Basic " + base64.b64encode(f"api:{key}".encode()).decode()


def success_answer(answer: Json) -> Answer:
    return 200, json.dumps(answer, allow_nan=False).encode()


def failure_answer(status: int, message: str) -> Answer:
    return status, json.dumps({"errors": [{"message": message}]}).encode()


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet when a client or a test hangs up."""


def http_handler(double: WandbDouble) -> type[AnsweringHandler]:
    class HttpHandler(AnsweringHandler):
        def _serve(self) -> None:
            body = self.read_body()
            authorization = self.headers.get("Authorization", "")
            dropped = double.dropped_text
            if double.stopped or (dropped and dropped in self.path.encode() + body):
                self.close_connection = True
                return
            status, answer = double.answer(self.command, self.path, authorization, body)
            self.answer(answer, status)

        do_GET = do_POST = do_PUT = _serve  # noqa: N815

    return HttpHandler
