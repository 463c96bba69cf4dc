"""What a cell is, and what was asked of it: explicit sets of runs that add up one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock
from pydantic import ValidationError

from tracker.ablations import ablation_of, removals
from tracker.config import CellRequest
from tracker.errors import ResultsError
from tracker.extent import Extent
from tracker.identities import BenchmarkIdentity, ModelIdentity, Record
from tracker.ledger.files import lock_file
from tracker.ledger.keys import cell_key
from tracker.ledger.notes import reason, sealed, unsealed, write_note
from tracker.provenance import content_hash
from tracker.records import RunIdentity, view_name
from tracker.views import Until, View

FORMAT = 3
"""Of a results folder and of each file in it. Format 2 knew no random order: a tracker of then
would take a block of drawn documents for a damaged one, and set it aside."""


class CellIdentity(Record):
    """What a cell is, as it stands in `cell.json`."""

    key: str
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    provenance: dict[str, str]
    """Versions and machine of whoever made the cell: shards of format 1 do not say theirs."""

    @classmethod
    def read(cls, text: str | bytes) -> tuple[CellIdentity, bool]:
        """Read the text of a `cell.json`, and whether a digest proves it besides its key.

        ValueError if it is damaged, or its key is another's.
        """
        content, proved = unsealed(text)
        identity = cls.model_validate(content)
        if cell_key(identity.model, identity.benchmark) != identity.key:
            raise ValueError("its key is not that of what it describes")
        return identity, proved

    def sealed(self) -> str:
        """Write the text of a `cell.json`."""
        return sealed(self.model_dump(mode="json"))


class AskedView(Record):
    """What was asked of one view of a cell, as it stands in `requests/`."""

    format: int = FORMAT
    project: str
    view: View


class _Asked1(Record):
    """The same in format 1: a product of layers, components and spans."""

    project: str
    request: CellRequest


class Views:
    """The views of one cell on disk."""

    def __init__(
        self,
        folder: Path,
        identity: CellIdentity,
        is_complete: Callable[[Extent, Collection[str]], bool],
    ) -> None:
        self.folder = folder
        self.identity = identity
        self._is_complete = is_complete

    def of(self, request: CellRequest) -> View:
        """Say what a request shows of this cell, whatever else was asked of it."""
        benchmark = self.identity.benchmark
        # A sample that leaves nothing out is the whole benchmark, whatever its seed.
        every = max(task.documents for task in benchmark.tasks)
        sample = None if request.sample is None or request.sample >= every else request.sample
        runs = tuple(removals(request, self.identity.model.layers))
        until = None
        if request.until is not None:
            until = Until(question=request.until, seed=request.seed, runs=runs)
        return View(
            metric=request.metric or benchmark.primary_metric,
            removed=request.removed,
            limit=request.limit,
            sample=sample,
            seed=None if sample is None else request.seed,
            runs=runs,
            until=until,
        )

    def ask(self, request: CellRequest, project: str) -> View:
        """Remember what was asked for, and for which project: what reports and syncs use.

        A cell has a view for each metric, each set of removed layers and each seed of a sample. The
        runs that were asked of the same view before stay (`with_former`), and none but these and
        the new ones is added; how many documents, and until what, is what was asked last.
        """
        with self._asking():
            view = self.with_former(request)
            self.write(AskedView(project=project, view=view))
        return view

    def with_former(self, request: CellRequest) -> View:
        """Say what a request shows together with the runs that were asked of its view before.

        Where a question decided what was measured of these, and none does now, only those stay that
        have all documents: the others would show what their outcomes chose as if it were drawn.
        """
        view, before = self.of(request), self.former(request)
        if before is None:
            return view
        if before.until is not None and view.until is None:
            whole = [run for run in before.runs if self._is_whole(view, run)]
            before = before.model_copy(update={"runs": tuple(whole)})
        return view.joined(before)

    def _is_whole(self, view: View, run: RunIdentity) -> bool:
        return self._is_complete(view.extent, [ablation_of(run, view.removed).name])

    def former(self, request: CellRequest) -> View | None:
        """Recall what was asked before of the view that a request shows; None where it is new."""
        path = self.path(self.name_of(self.of(request)))
        with suppress(OSError, ValueError):  # damaged: what is asked now replaces it
            return self.read(path.read_bytes()).view
        return None

    def read(self, text: str | bytes) -> AskedView:
        """Read a view of this cell from its file's text, also as tracker wrote it in format 1.

        ValueError if it is damaged.
        """
        said = json.dumps(unsealed(text)[0])
        try:
            before = _Asked1.model_validate_json(said)
        except ValidationError:
            asked = AskedView.model_validate_json(said)
        else:
            asked = AskedView(project=before.project, view=self.of(before.request))
        layers = (*asked.view.removed, *(run.layer + run.span - 1 for run in asked.view.runs))
        if max(layers, default=0) >= self.identity.model.layers:
            raise ValueError(f"the model has no layer {max(layers)}")
        if asked.view.metric not in self.identity.benchmark.tasks[0].metrics:
            raise ValueError(f"the benchmark has no metric {asked.view.metric!r}")
        return asked

    def write(self, asked: AskedView) -> None:
        """Keep a view in its place."""
        write_note(self.path(self.name_of(asked.view)), asked.model_dump(mode="json"))

    def upgrade(self) -> None:
        """Write as today what older trackers wrote, with digests; what is damaged stays."""
        with self._asking():
            for path in self.files():
                with suppress(OSError, ValueError):
                    text = path.read_bytes()
                    asked = self.read(text)
                    if not unsealed(text)[1]:
                        self.write(asked)
                    # Format 1 did not name the metric.
                    if path != self.path(self.name_of(asked.view)):
                        path.unlink()

    def _asking(self) -> FileLock:
        return lock_file(self.folder / "locks" / "requests.lock")

    def files(self) -> list[Path]:
        """List the files of what was asked, be they damaged; none before the cell is finished."""
        return sorted(self.folder.glob("requests/*.json"))

    def asked(self, damaged: dict[str, str] | None = None) -> list[AskedView]:
        """Recall what was asked for, one entry a view; the intact model and its own metric first.

        Args:
            damaged: Gets each file that cannot be used → what to do; None = raise an error.

        Returns:
            The views; none when the cell was never finished.

        Raises:
            ResultsError: A view is damaged.
        """
        found: dict[str, AskedView] = {}
        for path in self.files():
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
        return view_name(view.removed, view.metric, self.identity.benchmark, view.seed)

    def path(self, name: str) -> Path:
        """Say where it stands what was asked of a view."""
        return self.folder / "requests" / f"{view_file(name)}.json"


def view_file(name: str) -> str:
    """Name a view's file; file systems take no more than 255 characters."""
    name = quote(name, safe=",")
    return name if len(name) <= 100 else f"{name[:80]}--{content_hash(name)[:12]}"
