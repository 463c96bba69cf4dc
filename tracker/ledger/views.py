"""What a cell is, and what was asked of it: explicit sets of runs that add up one by one.

And what decides a document's outcome, and nothing else, as a key.
"""

from __future__ import annotations

import glob
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tracker.core.ablations import ablation_of, removals
from tracker.core.config import RUNS, CellRequest
from tracker.core.distribution import FORMAT, other_format
from tracker.core.errors import ResultsError
from tracker.core.extent import Extent
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, Record
from tracker.core.provenance import content_hash
from tracker.core.records import RunIdentity, view_name
from tracker.core.views import Until, View
from tracker.ledger.files import lock_file, reason, sealed, unsealed, write_note

GROWS = RUNS | {"removed", "limit", "sample", "until", "metric"}
"""Keys of a request by which a cell grows: no document's outcome hangs on them."""


_LATER = {
    *("include_path", "system_instruction", "fewshot_as_multiturn", "chat_template_args"),
    *("enable_thinking", "think_end_token", "gen_kwargs", "metadata", "model_args", "part"),
}


def cell_key(model: ModelIdentity, benchmark: BenchmarkIdentity) -> str:
    """Identify a cell by content, as SHA-256 in hexadecimal.

    Neither which documents, nor the layers, nor the batch, nor the shown metric is part of it: a
    cell grows.
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
    """Identify what was asked for without loading anything, as SHA-256 in hexadecimal.

    Equal keys lead to the same cell; different ones may (after an update of lm-eval, say). What is
    removed, which documents and the metric do not count.
    """
    asked = request.model_dump(exclude=GROWS).items()
    # A setting that is not used leaves the keys of before as they are.
    said = {name: value for name, value in asked if name not in _LATER or value not in (None, ())}
    return content_hash([said, model_stamp, data_stamp, dict(versions)])


def folder_name(model: str, benchmark: str, key: str) -> str:
    """Name a cell's folder so that a person finds it and every file system takes it."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}--{benchmark}")[:80]
    return f"{readable}--{key[:12]}"


_READABLE = 80
"""Characters of a long name that its file's name keeps."""


class CellIdentity(Record):
    """What a cell is, as it stands in `cell.json`."""

    key: str
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    provenance: dict[str, str]
    """Versions and machine of whoever made the cell."""

    @classmethod
    def read(cls, text: str | bytes) -> CellIdentity:
        """Read the text of a `cell.json`; ValueError if it is damaged, or its key is another's."""
        identity = cls.model_validate(unsealed(text))
        if cell_key(identity.model, identity.benchmark) != identity.key:
            raise ValueError("its key is not that of what it describes")
        return identity

    def sealed(self) -> str:
        """Write the text of a `cell.json`."""
        return sealed(self.model_dump(mode="json"))


class RequestedView(Record):
    """What was asked of one view of a cell, as it stands in `requests/`."""

    format: int = FORMAT
    project: str
    view: View


@dataclass(frozen=True)
class Views:
    """The views of one cell on disk."""

    folder: Path
    identity: CellIdentity
    is_complete: Callable[[Extent, Collection[str]], bool]

    def of(self, request: CellRequest) -> View:
        """Say what a request shows of this cell, whatever else was asked of it."""
        benchmark = self.identity.benchmark
        # What leaves nothing out is the whole benchmark, whatever its seed.
        every = max(task.documents for task in benchmark.tasks)
        limit, sample = (
            None if count is None or count >= every else count
            for count in (request.limit, request.sample)
        )
        runs = tuple(removals(request, self.identity.model.layers))
        asked = request.until
        until = Until(question=asked, seed=request.seed, runs=runs) if asked is not None else None
        return View(
            metric=request.metric or benchmark.primary_metric,
            removed=request.removed,
            limit=limit,
            sample=sample,
            seed=None if sample is None else request.seed,
            runs=runs,
            until=until,
        )

    def ask(self, request: CellRequest, project: str, named: bool = False) -> View:
        """Remember what was asked for, and for which project: what reports and syncs use.

        Args:
            request: What was asked for, and is measured.
            project: Whose it is.
            named: Whether it was asked for beside more documents of the same, and stays.

        Returns:
            The view that shows it: `shown_in`.
        """
        with lock_file(self.folder / "locks" / "requests.lock"):
            view, replaced = self._found(self.of(request), named)
            self.write(RequestedView(project=project, view=view))
            for name in {*map(self.name_of, replaced)} - {self.name_of(view)}:
                self.path(name).unlink(missing_ok=True)
        return view

    def shown_in(self, request: CellRequest, named: bool = False) -> View:
        """Say which view will show a request once that is measured.

        A cell has a view for each metric, each set of removed layers and each seed of a sample. A
        run that a view shows stays in it, on as many documents: a request adds its own runs, and
        takes nothing away. So fewer documents of runs that are shown add nothing, and more
        documents make a view grow that is then measured on them as a whole. What fits no view, more
        documents of some of its runs, fewer of other runs, or another question, is a view beside.
        """
        return self._found(self.of(request), named)[0]

    def named_of(self, request: CellRequest, named: bool = False) -> View:
        """Say what a request shows alone, under the name of the view that shows it."""
        beside = self.shown_in(request, named).beside
        return self.of(request).model_copy(update={"beside": beside})

    def known(self, request: CellRequest) -> list[View]:
        """Recall what was asked before of a request's metric, removed layers and seed.

        The view that was there first comes first; what is damaged is left out.
        """
        return self._known(self.of(request))

    def _known(self, new: View) -> list[View]:
        alike = ("metric", "removed", "seed")
        # A search has thousands of views, each over other layers beneath.
        benchmark = self.identity.benchmark
        name = view_name(new.removed, benchmark.primary_metric, benchmark, new.seed)
        pattern = f"{glob.escape(quote(name, safe=',')[:_READABLE])}*.json"
        found = [asked.view for asked in self.asked(damaged={}, pattern=pattern)]
        mine = [v for v in found if all(getattr(v, one) == getattr(new, one) for one in alike)]
        return sorted(mine, key=lambda view: (view.beside != "", view.beside))

    def _found(self, new: View, named: bool) -> tuple[View, list[View]]:
        """Find the view that shows what is new, and those that it makes superfluous."""
        known = self._known(new)
        if named:
            same = [view for view in known if view.beside and _alike(view, new)]
            return self._beside(new.joined(*same), known, named=True), same
        first = next((view for view in known if not view.beside), None)
        growing = [view for view in known if not view.named]
        grown = next((view.joined(new) for view in growing if _alike(view, new)), None)
        if grown is None:
            for view in known:
                # What a question decided, and all documents have settled, grows with others.
                if view.until is None and new.until is None and self._holds(view, new):
                    return view, []
                if view.named and _alike(view, new):
                    return view.joined(new), []
            grown = next(filter(None, (self._grown(view, new) for view in growing)), new)
        held = [view for view in known if not view.named and self._holds(grown, view)]
        if grown.until is None:
            asked = next((view.until for view in held if view.until), None)
            grown = grown.model_copy(update={"until": asked})
        if first is None or first in held:
            return grown.model_copy(update={"beside": ""}), held
        if grown is not new and any(_alike(grown, view) for view in known):
            return grown, held
        return self._beside(grown, known), held

    def _grown(self, view: View, new: View) -> View | None:
        """Join a view and what is new on the more documents of the two; None where some lack them.

        Documents that a question chose are not shown as if they had been drawn.
        """
        larger = view if view.size > new.size else new
        until = new.until or view.until
        grown = view.joined(new).model_copy(
            update={"limit": larger.limit, "sample": larger.sample, "until": until}
        )
        # What was asked for on all these documents is measured, or will be.
        rest = {*grown.runs} - ({*larger.runs} if larger.until is None else set())
        return grown if self._are_whole(grown, rest) else None

    def _holds(self, view: View, other: View) -> bool:
        """Whether a view shows all that another does."""
        if other.size > view.size or not {*other.runs} <= {*view.runs}:
            return False
        asked = view.until or other.until
        return asked is None or (view.size == math.inf and self.is_whole(view))

    def is_whole(self, view: View) -> bool:
        """Whether no question decided which documents a view shows, or all are measured."""
        return view.until is None or self._are_whole(view, view.runs)

    def _are_whole(self, view: View, runs: Collection[RunIdentity]) -> bool:
        names = [ablation_of(run, view.removed).name for run in runs]
        return not names or self.is_complete(view.extent, names)

    def _beside(self, view: View, known: Collection[View], named: bool = False) -> View:
        """Tell a view from those that were there before."""
        several = " a task" if len(self.identity.benchmark.tasks) > 1 else ""
        text = "all documents" if view.size == math.inf else f"{view.size} documents{several}"
        if view.until is not None:
            count = len(view.until.runs)
            text = f"until {view.until.question}, {count} run{'s' if count > 1 else ''}"
        taken = {each.beside for each in known if not _alike(each, view)}
        names = (text if n == 1 else f"{text} ({n})" for n in itertools.count(1))
        beside = next(name for name in names if name not in taken)
        return view.model_copy(update={"beside": beside, "named": named or view.named})

    def read(self, text: str | bytes) -> RequestedView:
        """Read a view of this cell from its file's text; ValueError if it is damaged."""
        content = unsealed(text)
        if why := other_format(content.get("format")):
            raise ValueError(f"it {why}")
        asked = RequestedView.model_validate_json(json.dumps(content))
        changed = (layer for run in asked.view.runs for layer in run.changed)
        layers = (*asked.view.removed, *changed)
        if max(layers, default=0) >= self.identity.model.layers:
            raise ValueError(f"the model has no layer {max(layers)}")
        if asked.view.metric not in self.identity.benchmark.tasks[0].metrics:
            raise ValueError(f"the benchmark has no metric {asked.view.metric!r}")
        return asked

    def write(self, asked: RequestedView) -> None:
        """Keep a view in its place."""
        write_note(self.path(self.name_of(asked.view)), asked.model_dump(mode="json"))

    def files(self) -> list[Path]:
        """List the files of what was asked, be they damaged; none before the cell is finished."""
        return sorted(self.folder.glob("requests/*.json"))

    def asked(
        self, damaged: dict[str, str] | None = None, pattern: str = "*.json"
    ) -> list[RequestedView]:
        """Recall what was asked for, one entry a view; the intact model and its own metric first.

        Args:
            damaged: Gets each file that cannot be used → what to do; None = raise an error.
            pattern: Which files are read, by name.

        Returns:
            The views; none when the cell was never finished.

        Raises:
            ResultsError: A view is damaged.
        """
        found: dict[str, RequestedView] = {}
        for path in sorted(self.folder.glob(f"requests/{pattern}")):
            try:
                asked = self.read(path.read_bytes())
            except (OSError, ValueError) as error:
                what = (
                    f"it is damaged ({reason(error)}); delete it and run its experiment again "
                    "(nothing is measured twice)"
                )
                if damaged is None:
                    raise ResultsError(f"{path}: {what}") from None
                damaged[str(path)] = what
            else:
                found[self.name_of(asked.view)] = asked
        primary = self.identity.benchmark.primary_metric
        return sorted(
            found.values(),
            key=lambda a: (a.view.removed, a.view.metric != primary, self.name_of(a.view)),
        )

    def name_of(self, view: View) -> str:
        """Name a view by what tells it from the others of the cell."""
        benchmark = self.identity.benchmark
        return view_name(view.removed, view.metric, benchmark, view.seed, view.beside)

    def path(self, name: str) -> Path:
        """Say where it stands what was asked of a view."""
        return self.folder / "requests" / f"{view_file(name)}.json"


def _alike(view: View, other: View) -> bool:
    """Whether two views are on the same documents, for the same reason."""
    return (view.extent, view.until) == (other.extent, other.until)


def view_file(name: str) -> str:
    """Name a view's file; file systems take no more than 255 characters."""
    name = quote(name, safe=",")
    return name if len(name) <= 100 else f"{name[:_READABLE]}--{content_hash(name)[:12]}"
