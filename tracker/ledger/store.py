"""The results folder: cells, their shards of outcomes, and the locks that processes share.

RESULTS/
  tracker.json              the folder's format
  index/REQUEST.json        what was asked for → its cell, found without loading anything
  experiments/NAME.yaml     the user's exact experiment files
  cells/MODEL--BENCHMARK--KEY/
    cell.json               the model, the benchmark, and who made the cell
    requests/VIEW.json      every run that was asked of a view, its metric and limit: what to show
    derived/VIEW.json       the record that follows from all this, kept to save the time
    shards/*.parquet        per-document outcomes, each with who measured it
    locks/                  one a block of documents
  slurm/                    the logs of SLURM jobs
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
from filelock import FileLock
from pydantic import ValidationError

from tracker.ablations import removals
from tracker.config import CellRequest
from tracker.distribution import upgrade
from tracker.errors import ResultsError, WorkError
from tracker.ledger.files import write_atomically, write_text
from tracker.ledger.keys import cell_key, folder_name
from tracker.ledger.outcomes import PROVENANCE, outcome_table
from tracker.ledger.shards import read_shard, shard_file
from tracker.provenance import content_hash
from tracker.records import (
    BenchmarkIdentity,
    CellRecord,
    ModelIdentity,
    Record,
    View,
    view_name,
)

FORMAT = 2
"""Of a results folder and of each file in it."""
BLOCK = 32
"""Documents that are computed, locked and written together."""
log = logging.getLogger(__name__)


class CellIdentity(Record):
    """What a cell is, as it stands in `cell.json`."""

    key: str
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    provenance: dict[str, str]
    """Versions and machine of whoever made the cell: shards of format 1 do not say theirs."""


class Asked(Record):
    """What was asked of one view of a cell, as it stands in `requests/`."""

    format: int = FORMAT
    project: str
    view: View


class _Asked1(Record):
    """The same in format 1: a product of layers, components and spans."""

    project: str
    request: CellRequest


@dataclass(frozen=True, order=True)
class Block:
    """Up to `BLOCK` consecutive documents of one task.

    Attributes:
        task: The lm-eval task.
        number: Which block, 0-based.
    """

    task: str
    number: int

    @property
    def name(self) -> str:
        """The block's name in file names."""
        return f"{quote(self.task, safe='')}.{self.number:05d}"

    def documents(self, count: int) -> range:
        """Which documents of the task it holds, when `count` of them are wanted."""
        return range(self.number * BLOCK, min((self.number + 1) * BLOCK, count))


class CellStore:
    """One cell on disk.

    Args:
        folder: Where it is.
        identity: What its numbers depend on.
        others: The same cell in other folders, whose outcomes are read too.

    Attributes:
        folder: Where it is.
        identity: What its numbers depend on.
    """

    def __init__(
        self, folder: Path, identity: CellIdentity, others: Sequence[CellStore] = ()
    ) -> None:
        self.folder = folder
        self.identity = identity
        self._others = others
        self._shards = folder / "shards"

    def counts(self, limit: int | None) -> dict[str, int]:
        """Say how many documents of each task a limit means."""
        tasks = self.identity.benchmark.tasks
        return {t.name: min(t.documents, limit or t.documents) for t in tasks}

    def blocks(self, limit: int | None) -> list[Block]:
        """List the blocks that hold the wanted documents, in order."""
        return [
            Block(task, number)
            for task, count in self.counts(limit).items()
            for number in range(-(-count // BLOCK))
        ]

    def lock(self, block: Block) -> FileLock:
        """Make the lock under which one process computes a block."""
        folder = self.folder / "locks"
        folder.mkdir(exist_ok=True)
        return FileLock(folder / f"{block.name}.lock")

    def missing(
        self, block: Block, limit: int | None, ablations: Collection[str]
    ) -> dict[tuple[str, ...], list[int]]:
        """Say what of a block is not measured yet.

        Args:
            block: The block.
            limit: Documents per task that are wanted.
            ablations: Names of the ablations that are wanted.

        Returns:
            Missing ablations, in the given order → the documents that lack just these.
        """
        frame = self.read([block], columns=["doc", "ablation"])
        present = set(zip(frame["doc"], frame["ablation"], strict=True)) if len(frame) else set()
        work: dict[tuple[str, ...], list[int]] = {}
        for document in block.documents(self.counts(limit)[block.task]):
            absent = tuple(name for name in ablations if (document, name) not in present)
            if absent:
                work.setdefault(absent, []).append(document)
        return work

    def is_complete(self, limit: int | None, ablations: Collection[str]) -> bool:
        """Say whether every wanted document is measured under every wanted ablation."""
        frame = self.read(self.blocks(limit), columns=["task", "doc", "ablation"])
        if not len(frame):
            return False
        counts = frame["task"].map(self.counts(limit))
        wanted = frame[frame["ablation"].isin(ablations) & (frame["doc"] < counts)]
        return len(wanted) == sum(self.counts(limit).values()) * len(set(ablations))

    def write(
        self, block: Block, rows: Sequence[Mapping[str, object]], metadata: Mapping[str, object]
    ) -> None:
        """Add a shard of outcomes.

        Args:
            block: The block that the documents belong to.
            rows: One mapping a (document, ablation), as `outcomes.outcome_row` lays them out.
            metadata: How they were measured, and by which versions, machine and device
                (`provenance`).
        """
        about = {"format": FORMAT, "key": self.identity.key, "task": block.task, **metadata}
        content = shard_file(outcome_table(rows), about)
        path = self._shard_path(block, ((row["doc"], row["ablation"]) for row in rows))
        write_atomically(path, lambda temporary: _write(temporary, content))

    def adopt(self, path: Path) -> None:
        """Move a shard from elsewhere to its place; its name counts for nothing.

        Args:
            path: The file.

        Raises:
            ValueError: It is no shard of this cell.
        """
        try:
            table, about = read_shard(path.read_bytes(), ["task", "doc", "ablation"])
            if about.get("key", self.identity.key) != self.identity.key:
                raise ValueError("its key is another")
            found = table.to_pydict()
            (task,) = set(found["task"])
            (number,) = {doc // BLOCK for doc in found["doc"]}
            if min(found["doc"]) < 0 or max(found["doc"]) >= self.counts(None)[task]:
                raise ValueError("no such document")
        except (ValueError, TypeError, KeyError, OSError, pa.ArrowException) as error:
            raise ValueError(f"{path.name} is no shard of this cell: {error}") from None
        place = self._shard_path(
            Block(task, number), zip(found["doc"], found["ablation"], strict=True)
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)

    def _shard_path(self, block: Block, held: Iterable[tuple[object, object]]) -> Path:
        """Name a shard by the documents and ablations in it."""
        content = content_hash(sorted({(str(doc), str(ablation)) for doc, ablation in held}))
        return self._shards / f"{block.name}.{content[:12]}.parquet"

    def read(
        self, blocks: Sequence[Block] | None = None, columns: list[str] | None = None
    ) -> pd.DataFrame:
        """Read outcomes.

        A shard that cannot be read is set aside with a warning, so that it is computed again.

        Args:
            blocks: Only these blocks; None = all.
            columns: Only these columns; None = all.

        Returns:
            One row a (task, document, ablation), in no particular order, none twice; where all
            columns are read, with who measured it besides.
        """
        if blocks is None:
            paths = self.shards()
        elif len(blocks) == 1:
            paths = sorted(self._shards.glob(f"{_literal(blocks[0].name)}.*.parquet"))
        else:
            wanted = {block.name for block in blocks}
            paths = [path for path in self.shards() if path.name.rsplit(".", 2)[0] in wanted]
        frames = [frame for path in paths if (frame := self._read_shard(path, columns)) is not None]
        frames += [found for other in self._others if len(found := other.read(blocks, columns))]
        if not frames:
            return pd.DataFrame(columns=columns)
        frame = pd.concat(frames, ignore_index=True)
        identity = [name for name in ("task", "doc", "ablation") if name in frame]
        return frame.drop_duplicates(identity, ignore_index=True)

    def _read_shard(self, path: Path, columns: list[str] | None) -> pd.DataFrame | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            # The system, not the shard, is in trouble.
            raise WorkError(f"{path} cannot be read now: {error}") from None
        try:
            table, about = read_shard(content, columns)
            frame: pd.DataFrame = table.to_pandas()
        except (OSError, ValueError, pa.ArrowException) as error:
            aside = path.with_suffix(".unreadable")
            with suppress(OSError):  # another process was first, or the folder is a colleague's
                path.replace(aside)
            log.warning(
                "the shard %s cannot be read (%s); it is set aside as %s and computed again",
                path.name,
                str(error).splitlines()[0],
                aside.name,
            )
            return None
        if columns is None:
            frame[PROVENANCE] = json.dumps(self._provenance(about))
        return frame

    def _provenance(self, about: Mapping[str, Any]) -> dict[str, str]:
        """Say who measured a shard; those of format 1 know the device alone."""
        device = {"device": about["device"]} if "device" in about else {}
        found: dict[str, str] = about.get(PROVENANCE, {**self.identity.provenance, **device})
        return found

    def view(self, request: CellRequest) -> View:
        """Say what a request shows of this cell, whatever else was asked of it."""
        return View(
            metric=request.metric or self.identity.benchmark.primary_metric,
            removed=request.removed,
            limit=request.limit,
            runs=tuple(removals(request, self.identity.model.layers)),
        )

    def ask(self, request: CellRequest, project: str) -> View:
        """Remember what was asked for, and for which project: what reports and syncs use.

        A cell has a view for each metric and each set of removed layers. The runs that were asked
        of the same view before stay, and none but these and the new ones is added; the limit is
        the newest.

        Args:
            request: What was asked for.
            project: For which project of the tracking backends.

        Returns:
            What the view shows from now on.
        """
        view = self.view(request)
        path = self.view_path(self.name_of(view))
        with self._asking():
            # New, or damaged: what is asked now replaces it.
            with suppress(FileNotFoundError, ValueError):
                view = view.joined(self.read_asked(path.read_text(encoding="utf-8")).view)
            self.write_asked(Asked(project=project, view=view))
        return view

    def read_asked(self, text: str) -> Asked:
        """Read a view of this cell from its file's text, also as tracker wrote it in format 1.

        Args:
            text: The text.

        Returns:
            The view.

        Raises:
            ValueError: It is damaged.
        """
        try:
            before = _Asked1.model_validate_json(text)
        except ValidationError:
            asked = Asked.model_validate_json(text)
        else:
            asked = Asked(project=before.project, view=self.view(before.request))
        layers = (*asked.view.removed, *(run.layer + run.span - 1 for run in asked.view.runs))
        if max(layers, default=0) >= self.identity.model.layers:
            raise ValueError(f"the model has no layer {max(layers)}")
        if asked.view.metric not in self.identity.benchmark.tasks[0].metrics:
            raise ValueError(f"the benchmark has no metric {asked.view.metric!r}")
        return asked

    def write_asked(self, asked: Asked) -> None:
        """Keep a view in its place."""
        write_text(self.view_path(self.name_of(asked.view)), asked.model_dump_json(indent=2))

    def upgrade(self) -> None:
        """Write views of format 1 as those of today; what is damaged stays for `asked` to say."""
        with self._asking():
            for path in list(self.folder.glob("requests/*.json")):
                with suppress(ValueError):
                    asked = self.read_asked(path.read_text(encoding="utf-8"))
                    self.write_asked(asked)
                    # Format 1 did not name the metric.
                    if path != self.view_path(self.name_of(asked.view)):
                        path.unlink()

    def _asking(self) -> FileLock:
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        return FileLock(locks / "requests.lock")

    def asked(self) -> list[Asked]:
        """Recall what was asked for, one entry a view; the intact model and its own metric first.

        Returns:
            The views; none when the cell was never finished.

        Raises:
            ResultsError: A view is damaged.
        """
        found: dict[str, Asked] = {}
        for path in self.folder.glob("requests/*.json"):
            try:
                asked = self.read_asked(path.read_text(encoding="utf-8"))
            except ValueError:
                raise ResultsError(
                    f"{path} is damaged; delete it and run the experiment again (nothing is "
                    "measured twice)"
                ) from None
            found[self.name_of(asked.view)] = asked
        primary = self.identity.benchmark.primary_metric
        return sorted(
            found.values(),
            key=lambda a: (a.view.removed, a.view.metric != primary, a.view.metric),
        )

    def name_of(self, view: View) -> str:
        """Name a view by what tells it from the others of the cell."""
        return view_name(view.removed, view.metric, self.identity.benchmark)

    def view_path(self, name: str) -> Path:
        """Say where it stands what was asked of a view."""
        return self.folder / "requests" / f"{_view_file(name)}.json"

    def shards(self) -> list[Path]:
        """List the files of outcomes."""
        return sorted(self._shards.glob("*.parquet"))

    def sizes(self) -> list[tuple[str, int]]:
        """Say cheaply which outcomes there are: every file that `read` reads, and its size."""
        mine = [(path.name, path.stat().st_size) for path in self.shards()]
        return mine + [each for other in self._others for each in other.sizes()]

    def derived(self, state: str, name: str) -> CellRecord | None:
        """Recall the record of a view.

        Args:
            state: A hash of all that the record follows from.
            name: The view's.

        Returns:
            The record; None when none is kept for this state.
        """
        kept = _read_note(self._derived(name))
        if kept.get("state") != state:
            return None
        try:
            return CellRecord.model_validate(kept.get("record"))
        except ValidationError:
            return None

    def keep(self, state: str, record: CellRecord) -> None:
        """Keep the record of a view for `derived`, where the folder can be written."""
        note = json.dumps({"state": state, "record": record.model_dump(mode="json")})
        with suppress(WorkError):
            write_text(self._derived(record.view), note)

    def _derived(self, name: str) -> Path:
        return self.folder / "derived" / f"{_view_file(name)}.json"

    def receipt(self, destination: str) -> dict[str, str]:
        """Recall what a backend got last: `digest` of the record and `location` of the runs."""
        found = _read_note(self.folder / "receipts" / f"{destination[:32]}.json")
        return found if {"digest", "location"} <= set(found) else {}

    def add_receipt(self, destination: str, digest: str, location: str) -> None:
        """Remember what a backend has."""
        receipt = json.dumps({"digest": digest, "location": location}, indent=2)
        write_text(self.folder / "receipts" / f"{destination[:32]}.json", receipt)


class Ledger:
    """A results folder.

    Args:
        root: Where it is; nothing is made there before `create`.

    Attributes:
        root: Where it is.

    Raises:
        ResultsError: It is a file, is damaged, or was written by a newer tracker.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if self.root.exists() and not self.root.is_dir():
            raise ResultsError(f"{self.root} is a file, not a results folder")
        self._format()

    @classmethod
    def existing(cls, root: Path) -> Ledger:
        """Open a results folder that must be there.

        Args:
            root: The folder.

        Returns:
            The ledger.

        Raises:
            ResultsError: The folder holds no results, or is of a newer version.
        """
        if not (root / "tracker.json").is_file():
            raise ResultsError(
                f"{root} is not a results folder. `tracker run EXPERIMENT.yaml --results {root}` "
                "makes one."
            )
        return cls(root)

    def create(self) -> None:
        """Make the folder a results folder of today's format, or do nothing where it is one."""
        if self._format() == FORMAT:
            return
        with self._lock("format"):
            for folder in self.root.glob("cells/*/"):
                with suppress(OSError, ResultsError):  # a damaged cell keeps nobody from the others
                    self._open(folder).upgrade()
            write_text(self.root / "tracker.json", json.dumps({"format": FORMAT}))

    def cells(self) -> list[CellStore]:
        """List the cells, sorted by model and benchmark."""
        found = (self._open(path.parent) for path in self.root.glob("cells/*/cell.json"))
        return sorted(
            found, key=lambda c: (c.identity.model.name, c.identity.benchmark.name, c.identity.key)
        )

    def cell(
        self, model: ModelIdentity, benchmark: BenchmarkIdentity, provenance: dict[str, str]
    ) -> CellStore:
        """Open a cell, or make it.

        Args:
            model: Which weights.
            benchmark: Which documents.
            provenance: Versions and machine, kept for a new cell.

        Returns:
            The cell.
        """
        self.create()
        key = cell_key(model, benchmark)
        folder = self.root / "cells" / folder_name(model.name, benchmark.name, key)
        path = folder / "cell.json"
        with self._lock(folder.name):
            if not path.is_file():
                identity = CellIdentity(
                    key=key, model=model, benchmark=benchmark, provenance=provenance
                )
                write_text(path, identity.model_dump_json(indent=2))
        return self._open(folder)

    def find(self, request_key: str) -> CellStore | None:
        """Find the cell that a request led to before; None when it is new."""
        name = _read_note(self.root / "index" / f"{request_key[:32]}.json").get("cell")
        if name is None:
            return None
        folder = self.root / "cells" / name
        return self._open(folder) if (folder / "cell.json").is_file() else None

    def remember(self, request_key: str, cell: CellStore) -> None:
        """Let `find` find a cell by a request."""
        path = self.root / "index" / f"{request_key[:32]}.json"
        write_text(path, json.dumps({"cell": cell.folder.name}))

    def keep_experiment(self, name: str, text: str) -> None:
        """Keep the exact text of an experiment file."""
        self.create()
        write_text(self.root / "experiments" / name, text)

    def experiments(self) -> Iterator[tuple[str, str]]:
        """Read the kept experiment files: name and exact text."""
        for path in sorted(self.root.glob("experiments/*.yaml")):
            yield path.name, path.read_text(encoding="utf-8")

    def _lock(self, name: str) -> AbstractContextManager[object]:
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def _open(self, folder: Path) -> CellStore:
        text = (folder / "cell.json").read_text(encoding="utf-8")
        try:
            return CellStore(folder, CellIdentity.model_validate_json(text))
        except ValidationError:
            raise ResultsError(
                f"{folder / 'cell.json'} is damaged; move the folder {folder} away and run again"
            ) from None

    def _format(self) -> int | None:
        """Say in which format the folder was written last; None where it is new."""
        path = self.root / "tracker.json"
        if not path.is_file():
            return None
        try:
            found = int(json.loads(path.read_text(encoding="utf-8"))["format"])
        except (ValueError, KeyError, TypeError):
            raise ResultsError(
                f"{path} is damaged; it should hold {{'format': {FORMAT}}}"
            ) from None
        if found > FORMAT:
            raise ResultsError(
                f"{self.root} was written by a newer tracker (format {found}; this one knows "
                f"{FORMAT}). Upgrade ({upgrade()}), or choose another --results."
            )
        return found


def _view_file(name: str) -> str:
    """Name a view's file; file systems take no more than 255 characters."""
    name = quote(name, safe=",")
    return name if len(name) <= 100 else f"{name[:80]}--{content_hash(name)[:12]}"


def _read_note(path: Path) -> dict[str, Any]:
    """Read a small file that can be made again; empty when it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _literal(name: str) -> str:
    """Escape a file name for `glob`."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
