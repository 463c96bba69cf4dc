"""Compute the keys of cells, and store which results of a cell were requested (views).

A cell's key is a hash of all inputs that affect a document's outcome, such as weights, task and
number of few-shot examples.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from urllib.parse import quote

from tracker.ledger.files import (
    access_problem,
    error_reason,
    lock_file,
    parse_note,
    seal_note,
    write_note,
)
from tracker.schema.config import CellRequest
from tracker.schema.distribution import LEDGER_FORMAT, version_problem
from tracker.schema.errors import ResultsError
from tracker.schema.formats import count_text
from tracker.schema.identities import BenchmarkIdentity, ModelIdentity, Record
from tracker.schema.provenance import content_hash
from tracker.schema.records import view_name
from tracker.schema.views import Until, View

_LATER_SETTINGS = {
    *("include_path", "system_instruction", "fewshot_as_multiturn", "chat_template_args"),
    *("enable_thinking", "think_end_token", "gen_kwargs", "metadata", "model_args", "part"),
    *("samples", "budgets"),
}


def cell_key(model: ModelIdentity, benchmark: BenchmarkIdentity) -> str:
    """Return a cell's key, a hexadecimal SHA-256 of its model, tasks and settings.

    The key does not depend on the selected documents, the ablated layers, the batch size or the
    shown metric.
    """
    return content_hash(
        {
            "model": model.fingerprint,
            "dtype": model.dtype,
            "benchmark": benchmark.name,
            "tasks": [[task.name, task.version, task.fingerprint] for task in benchmark.tasks],
            "num_fewshot": benchmark.num_fewshot,
            "seed": benchmark.seed,
            "apply_chat_template": benchmark.apply_chat_template,
            **({"settings": benchmark.settings} if benchmark.settings else {}),
        }
    )


def request_key(
    request: CellRequest, model_stamp: object, data_stamp: object, versions: Mapping[str, str]
) -> str:
    """Compute a hash of a request, to find its cell without loading the model or the data.

    `model_stamp` and `data_stamp` are values that change when the model or the data changes. The
    hash does not depend on the ablations, the number of documents or the metric.
    """
    documents = {"part": request.documents.part, "seed": request.documents.seed}
    settings = {**dict(request.model), **dict(request.benchmark), **documents}
    # Unused settings are left out, so that keys of former versions stay valid.
    for name in _LATER_SETTINGS:
        if settings.get(name) in (None, ()):
            settings.pop(name, None)
    return content_hash([settings, model_stamp, data_stamp, dict(versions)])


def folder_name(model: str, benchmark: str, key: str) -> str:
    """Return the name of a cell's folder, made of model, benchmark and the start of the key."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}--{benchmark}")[:80]
    return f"{readable}--{key[:12]}"


_MAX_READABLE_NAME = 80
"""Number of characters of a long name that the file's name keeps."""


class CellIdentity(Record):
    """Model, benchmark, key and provenance of a cell, as stored in `cell.json`."""

    key: str
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    provenance: dict[str, str]
    """Versions and machine with which the cell was created."""

    @classmethod
    def read(cls, text: str | bytes) -> CellIdentity:
        """Parse the text of a `cell.json`; raise ValueError if the text is damaged."""
        identity = cls.model_validate(parse_note(text))
        if cell_key(identity.model, identity.benchmark) != identity.key:
            raise ValueError("the cell's key does not fit the model and benchmark in cell.json")
        return identity

    def to_note(self) -> str:
        """Return the text of this cell's `cell.json`, with a digest."""
        return seal_note(self.model_dump(mode="json"))


class RequestedView(Record):
    """View and its project, as stored in a file in `requests/`."""

    format: int = LEDGER_FORMAT
    project: str
    view: View


@dataclass(frozen=True)
class Views:
    """Storage of a cell's views; a view is a request to show some runs, a metric and documents."""

    folder: Path
    identity: CellIdentity

    def view_of(self, request: CellRequest) -> View:
        """Build the view of a request: the runs, the metric and the documents."""
        benchmark = self.identity.benchmark
        # A limit or sample of all documents is the whole benchmark, whatever its seed.
        n_documents = max(task.documents for task in benchmark.tasks)
        counts = (request.documents.limit, request.documents.sample)
        limit, sample = (None if n is None or n >= n_documents else n for n in counts)
        runs = tuple(request.valid_changes(self.identity.model.layers))
        seed, until = request.documents.seed, None
        if request.until is not None:
            until = Until(question=str(request.until), seed=seed, runs=runs)
        return View(
            metric=request.metric or benchmark.primary_metric,
            removed=request.removed,
            limit=limit,
            sample=sample,
            seed=None if sample is None else seed,
            runs=runs,
            until=until,
            clusters=request.clusters,
        )

    def add_request(
        self, request: CellRequest, project: str, named: bool = False, explicit: bool = False
    ) -> View:
        """Store the runs, metric and documents of a request as a view of the cell.

        Args:
            request: The request, whose documents must already be measured.
            project: The project to which tracking backends publish the runs.
            named: True to store a separate view even if a larger stored view contains the same
                runs.
            explicit: True if an experiment requests the view; False if only a study or a search
                does.

        Returns:
            The stored view that shows the results of the request.

        Raises:
            ResultsError: The view's file belongs to another user and is not readable.
        """
        with lock_file(self.folder / "locks" / "requests.lock"):
            view, former_views = self._find_view_to_store(self.view_of(request), named, explicit)
            former_paths = {self.path(self.view_name(v)) for v in (view, *former_views)}
            self.write(RequestedView(project=project, view=view))
            for path in former_paths - {self.path(self.view_name(view))}:
                path.unlink(missing_ok=True)
        return view

    def display_view(self, request: CellRequest, named: bool = False) -> View:
        """Return the view that shows the results of a request.

        Requests with the same metric, documents, removed layers and `until` setting have one common
        view. If a stored view has more documents and contains all runs of `request`, the stored
        view is returned, unless `named` is true. Otherwise the view of `request` is returned.
        """
        return self._find_view_to_store(self.view_of(request), named)[0]

    def related_views(self, new: View) -> list[View]:
        """List stored views with the same metric, removed layers and document order as `new`."""
        # A search has thousands of views, each without other layers.
        start = glob.escape(quote(view_name(new.removed, "", "", ""))[:_MAX_READABLE_NAME])
        patterns = (f"{start}[-.][!0-9]*", f"{start}-*-doc*") if new.removed else (f"{start}*",)
        files = (self.read_requested({}, f"{pattern}.json") for pattern in patterns)
        views = (requested.view for requested in chain.from_iterable(files))
        return [view for view in views if view.order == new.order]

    def _find_view_to_store(
        self, new: View, named: bool, explicit: bool = False
    ) -> tuple[View, list[View]]:
        """Choose the view to store for a request: a larger stored view, or a merged new view.

        Args:
            new: The requested view.
            named: True to use a separate view even if a larger stored view contains the same runs.
            explicit: True if an experiment requests the view; False if only a study or a search
                does.

        Returns:
            The view to store, and the stored views that the view to store replaces.

        Raises:
            ResultsError: The view's file exists but is not readable.
        """
        name, views = self.view_name(new), {self.view_name(v): v for v in self.related_views(new)}
        if problem := access_problem(self.path(name)):
            raise ResultsError(f"{self.path(name)}: {problem}")
        superseded: dict[str, View] = {}
        larger = next((view for view in views.values() if view.shows(new) and not named), None)
        if larger is not None:
            # It may be tracked under its own name from the time when it was measured.
            view, names = larger, {*larger.supersedes, *({name} - views.keys())}
        else:
            view = views.get(name, new).merge(new)
            superseded = {n: v for n, v in views.items() if view.shows(v) and not v.named}
            names = {*view.supersedes, *superseded}
            names.update(*(former.supersedes for former in superseded.values()))
        other_names = views.keys() - superseded.keys() - {self.view_name(view)}
        update = {
            "beside": self._label(view) if other_names else "",
            "named": view.named or named,
            "explicit": explicit or any(v.explicit for v in (view, *superseded.values())),
            # The last run decides; studies and searches keep what it decided.
            "clusters": new.clusters if explicit else view.clusters,
            "supersedes": tuple(sorted(names)),
        }
        return view.model_copy(update=update), list(superseded.values())

    def read(self, text: str | bytes, name: str | None = None) -> RequestedView:
        """Parse the text of a view's file; `name` is the expected name of the file.

        ValueError is raised if the file is damaged or does not belong to the cell.
        """
        content = parse_note(text, name)
        if problem := version_problem(content.get("format")):
            raise ValueError(f"it {problem}")
        requested = RequestedView.model_validate_json(json.dumps(content))
        layers = {*requested.view.removed}.union(*(run.layers for run in requested.view.runs))
        if max(layers, default=0) >= self.identity.model.layers:
            raise ValueError(f"the model has no layer {max(layers)}")
        if requested.view.metric not in self.identity.benchmark.tasks[0].all_metrics:
            raise ValueError(f"the benchmark has no metric {requested.view.metric!r}")
        if requested.view.clusters is not None:
            requested.view.clusters.by_document(self.identity.benchmark.numbers)
        return requested

    def write(self, requested: RequestedView) -> None:
        """Write a requested view to its file in the cell's folder."""
        path = self._path(self.view_name(requested.view))
        write_note(path, requested.model_dump(mode="json"))

    def files(self) -> list[Path]:
        """List the files of stored views, including damaged files."""
        return sorted(self.folder.glob("requests/*.json"))

    def read_requested(
        self, damaged: dict[str, str] | None = None, pattern: str = "*.json"
    ) -> list[RequestedView]:
        """Read the stored views, sorted by removed layers and metric.

        Args:
            damaged: Dict that receives a message for each unusable file; None = raise an error
                instead.
            pattern: Glob pattern of the names of the files to read.

        Returns:
            The stored views. Views without removed layers come first.

        Raises:
            ResultsError: A view's file is unusable, and `damaged` is None.
        """
        projects: dict[str, str] = {}
        views: dict[str, View] = {}
        for path in sorted(self.folder.glob(f"requests/{pattern}")):
            try:
                requested = self.read(path.read_bytes(), path.name)
            except (OSError, ValueError) as error:
                damage = (
                    f"the file is damaged ({error_reason(error)}); delete the file and run the "
                    "experiment again; no outcome is lost"
                )
                problem = access_problem(path) or damage
                if damaged is None:
                    raise ResultsError(f"{path}: {problem}") from None
                damaged[str(path)] = problem
            else:
                name = self.view_name(requested.view)
                projects[name] = requested.project
                views[name] = self._complete_names(path, requested.view)
        # Views that differ in documents only are distinguished for display.
        counts = Counter(view.order for view in views.values())
        for name, view in views.items():
            if counts[view.order] > 1:
                views[name] = view.model_copy(update={"beside": self._label(view)})
        primary = self.identity.benchmark.primary_metric
        names = sorted(views, key=lambda n: (views[n].removed, views[n].metric != primary, n))
        return [RequestedView(project=projects[name], view=views[name]) for name in names]

    def _complete_names(self, path: Path, view: View) -> View:
        """Update the names of replaced views (`supersedes`) in a copy of a view."""
        gone = (n for n in view.supersedes if self._path(n) == path or not self._path(n).exists())
        return view.model_copy(update={"supersedes": tuple(sorted(gone)), "beside": ""})

    def _label(self, view: View) -> str:
        """Return a label that distinguishes a view from similar views, such as `100 documents`."""
        if view.until is not None:
            return f"until {view.until.question}, {count_text(len(view.until.runs), 'run')}"
        per_task = " per task" if len(self.identity.benchmark.tasks) > 1 else ""
        return "all documents" if view.size == math.inf else f"{view.size} documents{per_task}"

    def superseding_view(self, name: str) -> View | None:
        """Return the stored view that has replaced the view `name`; None if there is none."""
        if self.path(name).exists():
            return None
        views = (requested.view for requested in self.read_requested({}))
        return next((view for view in views if name in view.supersedes), None)

    def view_name(self, view: View) -> str:
        """Return the name that identifies a view within the cell."""
        return view.name(self.identity.benchmark.primary_metric)

    def path(self, name: str) -> Path:
        """Return the path of a view's file, which an older version of tracker may have named."""
        if (path := self._path(name)).exists():
            return path
        for former_path in self.files():
            with suppress(OSError, ValueError):
                if self.view_name(self.read(former_path.read_bytes()).view) == name:
                    return former_path
        return path

    def _path(self, name: str) -> Path:
        return self.folder / "requests" / f"{view_file_name(name)}.json"


def view_file_name(name: str) -> str:
    """Return the name of a view's file without suffix; long names are shortened."""
    name = quote(name, safe=",")
    return name if len(name) <= 100 else f"{name[:_MAX_READABLE_NAME]}--{content_hash(name)[:12]}"
