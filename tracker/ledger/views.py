"""Name cells, and store which runs and documents were requested.

A cell's key is the hash of everything that affects a document's outcome, and of nothing else.
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
from pathlib import Path
from urllib.parse import quote

from tracker.core.config import CellRequest
from tracker.core.distribution import FORMAT, other_format
from tracker.core.errors import ResultsError
from tracker.core.formats import counted
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, Record
from tracker.core.provenance import content_hash
from tracker.core.records import former_view_name, view_name
from tracker.core.views import Until, View
from tracker.ledger.files import closed, lock_file, reason, sealed, unsealed, write_note

_LATER = {
    *("include_path", "system_instruction", "fewshot_as_multiturn", "chat_template_args"),
    *("enable_thinking", "think_end_token", "gen_kwargs", "metadata", "model_args", "part"),
}


def cell_key(model: ModelIdentity, benchmark: BenchmarkIdentity) -> str:
    """Return a cell's key: the SHA-256, in hexadecimal, of what identifies its outcomes.

    The selected documents, the layers, the batch and the shown metric are not part of it, so that
    a cell can grow.
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
    """Return a request's key, as SHA-256 in hexadecimal, without loading anything.

    Equal keys lead to the same cell; so may different ones, for example after an update of lm-eval.
    The changes, the number of documents and the metric are not part of it.
    """
    documents = {"part": request.documents.part, "seed": request.documents.seed}
    settings = {**dict(request.model), **dict(request.benchmark), **documents}
    # Unused settings are left out, so that keys of former versions stay valid.
    said = {n: value for n, value in settings.items() if n not in _LATER or value not in (None, ())}
    return content_hash([said, model_stamp, data_stamp, dict(versions)])


def folder_name(model: str, benchmark: str, key: str) -> str:
    """Return the name of a cell's folder, readable and valid on every file system."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}--{benchmark}")[:80]
    return f"{readable}--{key[:12]}"


_READABLE = 80
"""Maximum number of characters of a long name in its file's name."""


class CellIdentity(Record):
    """Identity of a cell, as stored in `cell.json`."""

    key: str
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    provenance: dict[str, str]
    """Versions and machine with which the cell was created."""

    @classmethod
    def read(cls, text: str | bytes) -> CellIdentity:
        """Read the text of a `cell.json`; raise ValueError if it is damaged or its key is wrong."""
        identity = cls.model_validate(unsealed(text))
        if cell_key(identity.model, identity.benchmark) != identity.key:
            raise ValueError("its key is not that of what it describes")
        return identity

    def sealed(self) -> str:
        """Return the text of a `cell.json`."""
        return sealed(self.model_dump(mode="json"))


class RequestedView(Record):
    """A requested view of a cell, as stored in `requests/`."""

    format: int = FORMAT
    project: str
    view: View


@dataclass(frozen=True)
class Views:
    """The views of one cell on disk."""

    folder: Path
    identity: CellIdentity

    def of(self, request: CellRequest) -> View:
        """Return the view of one request, regardless of other requests."""
        benchmark = self.identity.benchmark
        # A limit or sample of all documents is the whole benchmark, whatever its seed.
        every = max(task.documents for task in benchmark.tasks)
        limit, sample = (
            None if count is None or count >= every else count
            for count in (request.documents.limit, request.documents.sample)
        )
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
        )

    def ask(
        self, request: CellRequest, project: str, named: bool = False, explicit: bool = False
    ) -> View:
        """Record a request and the project of its runs, for reports and syncs.

        Args:
            request: The request, whose documents are measured.
            project: The tracking project.
            named: True if a larger view was requested with it, so that both are kept.
            explicit: True if a run requests it, and not only a study or a search.

        Returns:
            The view that shows it, as from `shown_in`.

        Raises:
            ResultsError: The view's file belongs to another user and is not readable.
        """
        with lock_file(self.folder / "locks" / "requests.lock"):
            view, superseded = self._placed(self.of(request), named, explicit)
            former = {self.path(self.name_of(v)) for v in (view, *superseded)}
            self.write(RequestedView(project=project, view=view))
            for path in former - {self.path(self.name_of(view))}:
                path.unlink(missing_ok=True)
        return view

    def shown_in(self, request: CellRequest, named: bool = False) -> View:
        """Return the view that will show a request once it is measured.

        A view is identified by metric, documents, removed layers and question. It shows the runs of
        all requests with these. A request whose runs are all in a view on more documents is shown
        there. A view replaces those on fewer documents if it shows all their runs, unless they are
        named.
        """
        return self._placed(self.of(request), named)[0]

    def known(self, request: CellRequest) -> list[View]:
        """Return the readable views of a request's metric, removed layers and seed."""
        return self._known(self.of(request))

    def _known(self, new: View) -> list[View]:
        # A search has thousands of views, each without other layers.
        start = glob.escape(quote(view_name(new.removed, "", "", ""))[:_READABLE])
        patterns = (f"{start}[-.][!0-9]*", f"{start}-*-doc*") if new.removed else (f"{start}*",)
        views = (s.view for pattern in patterns for s in self.asked({}, f"{pattern}.json"))
        return [view for view in views if view.order == new.order]

    def _placed(self, new: View, named: bool, explicit: bool = False) -> tuple[View, list[View]]:
        """Return the view that shows a new one, and the views that it replaces."""
        name, views = self.name_of(new), {self.name_of(view): view for view in self._known(new)}
        if why := closed(self.path(name)):
            raise ResultsError(f"{self.path(name)}: {why}")
        same = views.get(name, new)
        superseded: dict[str, View] = {}
        larger = next((view for view in views.values() if view.shows(new) and not named), None)
        if larger is not None:
            # It may be tracked under its own name from the time when it was measured.
            view, names = larger, {*larger.supersedes, *({name} - views.keys())}
        else:
            view = same.joined(new)
            superseded = {n: v for n, v in views.items() if view.shows(v) and not v.named}
            names = {*view.supersedes, *superseded}
            names.update(*(former.supersedes for former in superseded.values()))
        others = views.keys() - superseded.keys() - {self.name_of(view)}
        update = {
            "beside": self._label(view) if others else "",
            "named": view.named or named,
            "explicit": explicit or any(v.explicit for v in (view, *superseded.values())),
            "supersedes": tuple(sorted(names)),
        }
        return view.model_copy(update=update), list(superseded.values())

    def read(self, text: str | bytes, name: str | None = None) -> RequestedView:
        """Read a view of this cell from its file's text; `name` is the file's expected name.

        ValueError is raised if it is damaged, or a copy of another file.
        """
        content = unsealed(text, name)
        if why := other_format(content.get("format")):
            raise ValueError(f"it {why}")
        asked = RequestedView.model_validate_json(json.dumps(content))
        changed = (layer for change in asked.view.runs for layer in change.layers)
        layers = (*asked.view.removed, *changed)
        if max(layers, default=0) >= self.identity.model.layers:
            raise ValueError(f"the model has no layer {max(layers)}")
        if asked.view.metric not in self.identity.benchmark.tasks[0].metrics:
            raise ValueError(f"the benchmark has no metric {asked.view.metric!r}")
        return asked

    def write(self, asked: RequestedView) -> None:
        """Write a view's file."""
        write_note(self._path(self.name_of(asked.view)), asked.model_dump(mode="json"))

    def files(self) -> list[Path]:
        """List the files of requested views, damaged or not; none before the cell is finished."""
        return sorted(self.folder.glob("requests/*.json"))

    def asked(
        self, damaged: dict[str, str] | None = None, pattern: str = "*.json"
    ) -> list[RequestedView]:
        """Read the requested views, those of the intact model and the benchmark's metric first.

        Args:
            damaged: Receives each unusable file → what to do; None = raise an error.
            pattern: Pattern of the names of the files to read.

        Returns:
            The views; empty if the cell was never finished.

        Raises:
            ResultsError: A view is damaged.
        """
        stored: dict[str, RequestedView] = {}
        for path in sorted(self.folder.glob(f"requests/{pattern}")):
            try:
                requested = self.read(path.read_bytes(), path.name)
            except (OSError, ValueError) as error:
                problem = closed(path) or (
                    f"it is damaged ({reason(error)}); delete it and run its experiment again "
                    "(nothing is measured twice)"
                )
                if damaged is None:
                    raise ResultsError(f"{path}: {problem}") from None
                damaged[str(path)] = problem
            else:
                stored[self.name_of(requested.view)] = self._known_now(path, requested)
        count = Counter(requested.view.order for requested in stored.values())
        for name, requested in stored.items():
            if count[requested.view.order] > 1:
                view = requested.view.model_copy(update={"beside": self._label(requested.view)})
                stored[name] = requested.model_copy(update={"view": view})
        primary = self.identity.benchmark.primary_metric
        return sorted(
            stored.values(),
            key=lambda a: (a.view.removed, a.view.metric != primary, self.name_of(a.view)),
        )

    def _known_now(self, path: Path, stored: RequestedView) -> RequestedView:
        """Complete a stored view's superseded names from its file's name and the other files."""
        view, name = stored.view, self.name_of(stored.view)
        names = {*view.supersedes}
        if path != self._path(name):  # of a former version
            fields = (view.removed, view.metric, self.identity.benchmark, view.seed, view.beside)
            names.add(former_view_name(*fields))
        gone = sorted(n for n in names if self._path(n) == path or not self._path(n).exists())
        view = view.model_copy(update={"supersedes": tuple(gone), "beside": ""})
        return stored.model_copy(update={"view": view})

    def _label(self, view: View) -> str:
        """Return a view's distinction from others of its order, for display."""
        if view.until is not None:
            return f"until {view.until.question}, {counted(len(view.until.runs), 'run')}"
        per_task = " per task" if len(self.identity.benchmark.tasks) > 1 else ""
        return "all documents" if view.size == math.inf else f"{view.size} documents{per_task}"

    def superseding(self, name: str) -> View | None:
        """Return the view that has replaced another one; None if that still exists."""
        if self.path(name).exists():
            return None
        views = (stored.view for stored in self.asked({}))
        return next((view for view in views if name in view.supersedes), None)

    def name_of(self, view: View) -> str:
        """Return a view's identity within the cell."""
        return view.name(self.identity.benchmark.primary_metric)

    def path(self, name: str) -> Path:
        """Return the file of a view, also under the names of former versions."""
        if (path := self._path(name)).exists():
            return path
        for former in self.files():
            with suppress(OSError, ValueError):
                if self.name_of(self.read(former.read_bytes()).view) == name:
                    return former
        return path

    def _path(self, name: str) -> Path:
        return self.folder / "requests" / f"{view_file(name)}.json"


def view_file(name: str) -> str:
    """Return the name of a view's file, short enough for file systems (255 characters)."""
    name = quote(name, safe=",")
    return name if len(name) <= 100 else f"{name[:_READABLE]}--{content_hash(name)[:12]}"
