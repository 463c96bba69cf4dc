"""Read and write the results folder: cells, requests, findings and experiment files.

RESULTS/
  tracker.json              the folder's format
  index/REQUEST.json        a request → its cell, found without loading anything
  studies/STUDY--FILE.json  findings of studies
  searches/NAME.json        results of searches
  experiments/NAME.yaml     the user's exact experiment files, each with its SHA-256 beside it
  checks/                   verdicts of checks of architectures and models
  places/PLACE.json         destinations of publishing, each used until its file is deleted
  cells/MODEL--BENCHMARK--KEY/
    cell.json               the model, the benchmark, and the provenance of the cell
    requests/VIEW.json      the requested runs, metric and documents of a view
    derived/VIEW*.json      records derived from all this, stored to save time
    shards/*.parquet        per-document outcomes, each file with its provenance
    texts/*.parquet         texts of documents, each file with its digest
    verified.json           shards that have been verified
    receipts/               published versions of the cell, by destination
    begun/                  searches that measure the cell
    locks/                  locks, one per block of documents
  slurm/                    the logs of SLURM jobs

All files whose contents appear in reports have digests. If a file does not match its digest,
tracker measures again or reports the file as damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from tracker.ledger import files
from tracker.ledger.cells import CellStore
from tracker.ledger.views import CellIdentity, RequestedView, cell_key, folder_name
from tracker.schema.distribution import LEDGER_FORMAT, version_problem
from tracker.schema.errors import ResultsError
from tracker.schema.findings import FindingRecord
from tracker.schema.identities import BenchmarkIdentity, ModelIdentity, Record
from tracker.schema.provenance import TOKENISATION_KEY
from tracker.schema.prune_records import PruneRecord
from tracker.schema.records import RecordKey

RecordType = TypeVar("RecordType", bound=Record)


def write_finding(root: Path, finding: FindingRecord) -> None:
    """Write the result of a study to a results folder, replacing a result with the same name."""
    path = root / "studies" / f"{quote(finding.name, safe='')}.json"
    files.write_note(path, finding.model_dump(mode="json"))


def write_search(root: Path, record: PruneRecord) -> Path:
    """Write the result of a search to a results folder, and return the path of the file."""
    path = root / "searches" / f"{record.name}.json"
    files.write_note(path, record.model_dump(mode="json"))
    return path


def read_records(folder: Path, kind: type[RecordType], damaged: dict[str, str]) -> list[RecordType]:
    """Read all JSON files in a folder as records of the type `kind`, sorted by file name.

    Unusable files are added to `damaged` as path → error message.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(kind.model_validate(files.parse_note(path.read_bytes(), path.name)))
        except (OSError, ValueError) as error:
            damaged[str(path)] = (
                f"{files.error_reason(error)}; {_repeat_command(path)}, or delete it"
            )
    return records


def _repeat_command(path: Path) -> str:
    """Return an instruction for the user to create a damaged file again.

    An example is "type `tracker prune FILE.yaml`".
    """
    if path.parent.name == "searches":
        return "type its `tracker prune` again"
    study, _, experiment = unquote(path.stem).partition("--")
    command = "prune" if study == "search" else f"study {study}"
    return f"type `tracker {command} {experiment or 'FILE'}.yaml`"


_WRITTEN_FOLDERS = ("cells", "experiments", "index", "locks")
"""Folders of the results folder that a measurement writes."""
_SHOWN_FOLDERS = ("cells", "experiments", "searches", "studies")
"""Folders of the results folder whose contents pages and commands show."""
UNFINISHED_CELL = (
    "the run is in progress or was stopped; to continue a stopped run, type its command again"
)
"""The message about an unfinished cell."""


@dataclass(frozen=True)
class Contents:
    """Contents of a results folder that commands and reports show.

    Attributes:
        views: Pairs of a cell and a request (runs, metric and documents), sorted by model and
            benchmark.
        unfinished: Pairs of an unfinished cell and a message, e.g. that a search was stopped.
        experiments: The stored experiment files: name → exact text.
        findings: The results of studies, sorted by name.
        searches: The results of searches, sorted by name.
        damaged: File or folder that cannot be used → message that says what to do.
    """

    views: list[tuple[CellStore, RequestedView]] = field(default_factory=list)
    unfinished: list[tuple[CellStore, str]] = field(default_factory=list)
    experiments: dict[str, str] = field(default_factory=dict)
    findings: list[FindingRecord] = field(default_factory=list)
    searches: list[PruneRecord] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def search_keys(self) -> set[RecordKey]:
        """Keys of the records of all ablation runs on which the stored searches are based."""
        return {record_key for record in self.searches for record_key in record.rests_on}


class Ledger:
    """A results folder; the constructor does not create the folder.

    ResultsError is raised if `root` is a file, is damaged, or has the format of another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            if root.exists() and not root.is_dir():
                raise ResultsError(f"{root} is a file, not a results folder")
            self._is_initialised()
        except OSError as error:  # too long a name, or an unreadable folder above
            raise ResultsError(f"{root} cannot be used: {error.strerror}") from None

    @classmethod
    def open_existing(cls, root: Path) -> Ledger:
        """Open an existing results folder.

        ResultsError is raised if the folder is not a results folder, or has the format of another
        version.
        """
        ledger = cls(root)
        if not (root / "tracker.json").is_file():
            command = f"tracker run EXPERIMENT.yaml --results {root}"
            raise ResultsError(f"{root} is not a results folder; to create one, type: {command}")
        return ledger

    def refuse_unwritable(self) -> None:
        """Raise ResultsError if the results folder cannot be created or written."""
        problem = f"{self.root} cannot be written"
        folder = next(p for p in (self.root, *self.root.absolute().parents) if p.exists())
        if not folder.is_dir():
            raise ResultsError(f"{self.root} cannot be created, because {folder} is a file")
        for path in (folder, *(self.root / name for name in _WRITTEN_FOLDERS)):
            if path.exists() and not os.access(path, os.W_OK | os.X_OK):
                raise ResultsError(f"{problem}: {files.write_problem(path)}")
        try:  # permissions are not enough: the disk may be full or take no files
            with tempfile.TemporaryDirectory(dir=folder, prefix=".tracker-"):
                pass
        except OSError as error:
            reason = f"{folder}: {error.strerror}. Choose another folder with --results"
            raise ResultsError(f"{problem}: {reason}") from None

    def create(self) -> None:
        """Create the results folder, or do nothing if it exists."""
        if not self._is_initialised():
            files.write_text(self.root / "tracker.json", json.dumps({"format": LEDGER_FORMAT}))

    def cells(self, damaged: dict[str, str] | None = None) -> list[CellStore]:
        """List the usable cells, sorted by model and benchmark.

        Unusable cells are added to `damaged` as folder → message that says what to do.
        """
        stores = []
        for folder in sorted(self.root.glob("cells/*")):
            try:
                for subfolder in (folder, folder / "requests", folder / "shards"):
                    if problem := files.access_problem(subfolder):
                        raise ResultsError(problem)
                stores.append(self._read_cell(folder))
            except ResultsError as error:
                if damaged is not None:
                    damaged[str(folder)] = str(error)
        names = attrgetter("identity.model.name", "identity.benchmark.name", "identity.key")
        return sorted(stores, key=names)

    def contents(self) -> Contents:
        """Read all contents that reports show; damaged files are listed in `Contents.damaged`."""
        problems = {str(self.root / n): files.access_problem(self.root / n) for n in _SHOWN_FOLDERS}
        damaged = {path: problem for path, problem in problems.items() if problem}
        findings = read_records(self.root / "studies", FindingRecord, damaged)
        searches = read_records(self.root / "searches", PruneRecord, damaged)
        contents = Contents(findings=findings, searches=searches, damaged=damaged)
        # Cells that finished searches and studies have measured; they need no views.
        keys = {part.key for record in searches for part in record.calibration}
        keys |= {cell_key(record.model, record.benchmark) for record in searches}
        keys |= {key for finding in findings for key, _, _ in finding.rests_on}
        for cell in self.cells(damaged):
            contents.views.extend((cell, view) for view in cell.views.read_requested(damaged))
            commands = cell.running_searches()
            contents.unfinished.extend((cell, self._search_message(c)) for c in commands)
            # The views first: a finished cell may have thousands of shards.
            if not (commands or cell.identity.key in keys or cell.views.files()) and cell.shards():
                contents.unfinished.append((cell, UNFINISHED_CELL))
        for path in sorted(self.root.glob("experiments/*.yaml")):
            try:
                contents.experiments[path.name] = _read_experiment(path)
            except (OSError, ValueError) as error:
                damaged[str(path)] = (
                    f"the experiment file is damaged ({files.error_reason(error)}); run the "
                    "experiment again, or delete the file"
                )
        return contents

    def _search_message(self, command: Sequence[str]) -> str:
        """Return the message about an unfinished search."""
        words = [*command, "--results", str(self.root)] if command else []
        message = UNFINISHED_CELL.replace("run", "search")
        return f"{message}: {shlex.join(words)}" if words else message

    def open_cell(
        self, model: ModelIdentity, benchmark: BenchmarkIdentity, provenance: dict[str, str]
    ) -> CellStore:
        """Open the cell of a model and a benchmark, or create it.

        Models with equal weights have one common cell, even if their names differ.
        """
        self.create()
        digest = cell_key(model, benchmark)
        folder = self.root / "cells" / folder_name(model.name, benchmark.name, digest)
        with files.lock_file(self.root / "locks" / f"{digest[:12]}.lock"):
            if not folder.is_dir():
                folder = min(folder.parent.glob(f"*--{digest[:12]}"), default=folder)
            path = folder / "cell.json"
            try:
                identity = CellIdentity.read(path.read_bytes())
                key, stored = TOKENISATION_KEY, identity.provenance
                is_empty = not any(folder.glob("shards/*.parquet"))
                if stored.get(key) != provenance.get(key) and (is_empty or key not in stored):
                    stored |= provenance if is_empty else {key: provenance[key]}
                    files.write_text(path, identity.to_note())
            except (OSError, ValueError):  # new, or damaged; its shards are its own
                fields = {"model": model, "benchmark": benchmark, "provenance": provenance}
                files.write_text(path, CellIdentity(key=digest, **fields).to_note())
        return self._read_cell(folder)

    def find(self, request_key: str) -> CellStore | None:
        """Return the cell that `index_cell` stored for a request; None if no cell is stored."""
        name = files.read_note(self._index_path(request_key)).get("cell")
        if name is None or Path(name).name != name:
            return None
        try:
            return self._read_cell(self.root / "cells" / name)
        except ResultsError:  # created again by `open_cell`
            return None

    def index_cell(self, request_key: str, cell: CellStore) -> None:
        """Store the cell of a request, so that `find` returns this cell."""
        files.write_note(self._index_path(request_key), {"cell": cell.folder.name})

    def write_notes(self, notes: Mapping[Path, Mapping[str, Any]]) -> None:
        """Write notes (path → content) into the results folder."""
        for path, note in notes.items():
            self.create()
            files.write_note(path, note)

    def write_experiment(self, name: str, text: str) -> None:
        """Store the exact text of an experiment file, and its SHA-256 in a second file."""
        self.create()
        path = self.root / "experiments" / name
        files.write_text(path, text)
        files.write_text(_digest_path(path), f"{_hash_content(path.read_bytes())}  {name}\n")

    def _index_path(self, request_key: str) -> Path:
        return self.root / "index" / f"{request_key[:32]}.json"

    def _read_cell(self, folder: Path) -> CellStore:
        path = folder / "cell.json"
        try:
            identity = CellIdentity.read(path.read_bytes())
            # The rest of the folder's name is for people.
            if folder.name[-12:] != identity.key[:12]:
                raise ValueError("it belongs to another folder")
        except PermissionError:
            raise ResultsError(files.access_problem(path)) from None
        except (OSError, ValueError) as error:
            raise ResultsError(
                f"cell.json cannot be used ({files.error_reason(error)}); move the folder away, or "
                "run its experiment again to write a new cell.json; nothing is measured twice"
            ) from None
        return CellStore(folder, identity)

    def _is_initialised(self) -> bool:
        """Return whether the folder is a results folder; raise ResultsError on damage."""
        path = self.root / "tracker.json"
        if not path.is_file():
            return False
        if problem := files.access_problem(path):
            raise ResultsError(f"{path}: {problem}")
        try:
            number = int(json.loads(path.read_bytes())["format"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            message = f"{path} is damaged; it should hold {{'format': {LEDGER_FORMAT}}}"
            raise ResultsError(message) from None
        if problem := version_problem(number):
            raise ResultsError(
                f"tracker cannot use the results folder {self.root}: it {problem}. "
                "With --results you can choose another results folder."
            )
        return True


def _read_experiment(path: Path) -> str:
    """Return the text of a stored experiment file; raise ValueError if the text was changed."""
    content, digest_path = path.read_bytes(), _digest_path(path)
    if digest_path.exists() and digest_path.read_text().split()[:1] != [_hash_content(content)]:
        raise ValueError(
            "the file differs from the experiment that was run; it was edited or damaged"
        )
    return content.decode()


def _digest_path(experiment: Path) -> Path:
    return experiment.with_name(f"{experiment.name}.sha256")


def _hash_content(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
