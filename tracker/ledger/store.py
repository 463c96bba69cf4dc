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

Every file that is shown has a digest of its content. A file that does not match its digest is
derived or measured again if possible, and reported otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from tracker.core.distribution import FORMAT, other_format
from tracker.core.errors import ResultsError
from tracker.core.findings import FindingRecord
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, Record
from tracker.core.provenance import TOKENISATION
from tracker.core.prune_records import PruneRecord
from tracker.core.records import Place
from tracker.ledger.cells import CellStore
from tracker.ledger.files import (
    closed,
    lock_file,
    owner_of,
    read_note,
    reason,
    unsealed,
    write_note,
    write_text,
)
from tracker.ledger.views import CellIdentity, RequestedView, cell_key, folder_name

Found = TypeVar("Found", bound=Record)


def keep_finding(root: Path, finding: FindingRecord) -> None:
    """Write a finding to a results folder, replacing the study's former one of the same file."""
    path = root / "studies" / f"{quote(finding.name, safe='')}.json"
    write_note(path, finding.model_dump(mode="json"))


def keep_search(root: Path, record: PruneRecord) -> Path:
    """Write a search to a results folder, replacing its former result, and return the file."""
    path = root / "searches" / f"{record.name}.json"
    write_note(path, record.model_dump(mode="json"))
    return path


def listed(folder: Path, kind: type[Found], damaged: dict[str, str]) -> list[Found]:
    """List a folder's records by name; unusable files are added to `damaged` → what to do."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(kind.model_validate(unsealed(path.read_bytes(), path.name)))
        except (OSError, ValueError) as error:
            damaged[str(path)] = f"{reason(error)}; {_again(path)}, or delete it"
    return found


def _again(path: Path) -> str:
    """Return the command that recreates a record, as far as its file's name determines it."""
    if path.parent.name == "searches":
        return "type its `tracker prune` again"
    study, _, experiment = unquote(path.stem).partition("--")
    command = "prune" if study == "search" else f"study {study}"
    return f"type `tracker {command} {experiment or 'FILE'}.yaml`"


_WRITTEN = ("cells", "experiments", "index", "locks")
"""Folders that measuring writes."""
_READ = ("cells", "experiments", "searches", "studies")
"""Folders whose contents are shown."""
UNFINISHED = "its run goes on, or was stopped: then type its command again"
"""The message about an unfinished cell."""


@dataclass(frozen=True)
class Contents:
    """Contents of a results folder.

    Attributes:
        views: Each view with its cell, sorted by model and benchmark.
        unfinished: The cells with outcomes but no view, and those of searches that are running or
            were stopped, each with a message. Cells of finished searches are not among them.
        experiments: The stored experiment files: name → exact text.
        findings: The findings of studies, by name.
        searches: The results of searches, by name.
        damaged: File or folder that cannot be used → what to do.
    """

    views: list[tuple[CellStore, RequestedView]] = field(default_factory=list)
    unfinished: list[tuple[CellStore, str]] = field(default_factory=list)
    experiments: dict[str, str] = field(default_factory=dict)
    findings: list[FindingRecord] = field(default_factory=list)
    searches: list[PruneRecord] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def searched(self) -> set[Place]:
        """The cells of the steps of searches."""
        return {place for record in self.searches for place in record.rests_on}


class Ledger:
    """A results folder; nothing is written to `root` before `create`.

    ResultsError is raised if it is a file, is damaged, or has another format.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            if root.exists() and not root.is_dir():
                raise ResultsError(f"{root} is a file, not a results folder")
            self._is_there()
        except OSError as error:  # too long a name, or an unreadable folder above
            raise ResultsError(f"{root} cannot be used: {error.strerror}") from None

    @classmethod
    def existing(cls, root: Path) -> Ledger:
        """Open an existing results folder.

        ResultsError is raised if it is no results folder, or has another format.
        """
        ledger = cls(root)
        if not (root / "tracker.json").is_file():
            raise ResultsError(
                f"{root} is not a results folder. `tracker run EXPERIMENT.yaml --results {root}` "
                "makes one."
            )
        return ledger

    def refuse_unwritable(self) -> None:
        """Raise ResultsError if it cannot be created or written, before anything is measured."""
        there = next(
            place for place in (self.root, *self.root.absolute().parents) if place.exists()
        )
        if not there.is_dir():
            raise ResultsError(f"{self.root} cannot be made: {there} is a file")
        for place in (there, *(self.root / name for name in _WRITTEN)):
            if place.exists() and not os.access(place, os.W_OK | os.X_OK):
                raise ResultsError(
                    f"{self.root} cannot be written: {place} is {owner_of(place)}'s, and you may "
                    "not write it"
                )
        try:  # permissions are not enough: the disk may be full or take no files
            with tempfile.TemporaryDirectory(dir=there, prefix=".tracker-"):
                pass
        except OSError as error:
            raise ResultsError(
                f"{self.root} cannot be written: {there}: {error.strerror}. Choose another folder "
                "with --results"
            ) from None

    def create(self) -> None:
        """Create the results folder, or do nothing if it exists."""
        if not self._is_there():
            write_text(self.root / "tracker.json", json.dumps({"format": FORMAT}))

    def cells(self, damaged: dict[str, str] | None = None) -> list[CellStore]:
        """List the usable cells, sorted by model and benchmark.

        Folders of unusable cells are added to `damaged` → what to do.
        """
        found = []
        for folder in sorted(self.root.glob("cells/*")):
            try:
                for inside in (folder, folder / "requests", folder / "shards"):
                    if why := closed(inside):
                        raise ResultsError(why)
                found.append(self._open(folder))
            except ResultsError as error:
                if damaged is not None:
                    damaged[str(folder)] = str(error)
        return sorted(
            found, key=lambda c: (c.identity.model.name, c.identity.benchmark.name, c.identity.key)
        )

    def contents(self) -> Contents:
        """Return everything that can be shown; damaged files do not hide other contents."""
        unreadable = {str(self.root / name): closed(self.root / name) for name in _READ}
        found = Contents(damaged={path: why for path, why in unreadable.items() if why})
        found.findings.extend(listed(self.root / "studies", FindingRecord, found.damaged))
        found.searches.extend(listed(self.root / "searches", PruneRecord, found.damaged))
        searched = {each.key for record in found.searches for each in record.calibration}
        searched |= {cell_key(record.model, record.benchmark) for record in found.searches}
        searched |= {key for finding in found.findings for key, _, _ in finding.rests_on}
        for cell in self.cells(found.damaged):
            found.views.extend((cell, asked) for asked in cell.views.asked(found.damaged))
            begun = cell.begun_searches()
            found.unfinished.extend((cell, self._stopped(command)) for command in begun)
            alone = not begun and cell.identity.key not in searched
            # The views first: a finished cell may have thousands of shards.
            if alone and not cell.views.files() and cell.shards():
                found.unfinished.append((cell, UNFINISHED))
        for path in sorted(self.root.glob("experiments/*.yaml")):
            try:
                content = path.read_bytes()
                proof = _proof_of(path)
                if proof.exists() and proof.read_text().split()[:1] != [_digest(content)]:
                    raise ValueError("it is not the text that was run: edited, or damaged")
                found.experiments[path.name] = content.decode()
            except (OSError, ValueError) as error:
                found.damaged[str(path)] = f"{reason(error)}; run it again, or delete it"
        return found

    def _stopped(self, command: Sequence[str]) -> str:
        """Return the message about an unfinished search, with its command if there is one."""
        said = UNFINISHED.replace("run", "search", 1)
        return f"{said}: {shlex.join([*command, '--results', str(self.root)])}" if command else said

    def cell(
        self, model: ModelIdentity, benchmark: BenchmarkIdentity, provenance: dict[str, str]
    ) -> CellStore:
        """Open a cell, or create it with this provenance.

        If the same weights have several names, the cell keeps the first one.
        """
        self.create()
        key = cell_key(model, benchmark)
        folder = self.root / "cells" / folder_name(model.name, benchmark.name, key)
        with lock_file(self.root / "locks" / f"{key[:12]}.lock"):
            if not folder.is_dir():
                folder = min(folder.parent.glob(f"*--{key[:12]}"), default=folder)
            path = folder / "cell.json"
            try:
                held = CellIdentity.read(path.read_bytes())
                stated, now = (each.get(TOKENISATION) for each in (held.provenance, provenance))
                is_empty = not any(folder.glob("shards/*.parquet"))
                if stated != now and (is_empty or stated is None):
                    more = provenance if is_empty else {TOKENISATION: now}
                    changes = {"provenance": {**held.provenance, **more}}
                    write_text(path, held.model_copy(update=changes).sealed())
            except (OSError, ValueError):  # new, or damaged; its shards are its own
                made = {"model": model, "benchmark": benchmark, "provenance": provenance}
                write_text(path, CellIdentity(key=key, **made).sealed())
        return self._open(folder)

    def find(self, request_key: str) -> CellStore | None:
        """Return the cell of an earlier equal request; None if there is none."""
        name = read_note(self._index(request_key)).get("cell")
        if name is None or Path(name).name != name:
            return None
        try:
            return self._open(self.root / "cells" / name)
        except ResultsError:  # created again by `cell`
            return None

    def remember(self, request_key: str, cell: CellStore) -> None:
        """Record a request's cell, so that `find` finds it."""
        write_note(self._index(request_key), {"cell": cell.folder.name})

    def keep_notes(self, notes: Mapping[Path, Mapping[str, Any]]) -> None:
        """Write notes into the folder, which is made for them."""
        for path, note in notes.items():
            self.create()
            write_note(path, note)

    def keep_experiment(self, name: str, text: str) -> None:
        """Write the exact text of an experiment file, and its digest in the form of `sha256sum`."""
        self.create()
        path = self.root / "experiments" / name
        write_text(path, text)
        write_text(_proof_of(path), f"{_digest(path.read_bytes())}  {name}\n")

    def _index(self, request_key: str) -> Path:
        return self.root / "index" / f"{request_key[:32]}.json"

    def _open(self, folder: Path) -> CellStore:
        path = folder / "cell.json"
        try:
            identity = CellIdentity.read(path.read_bytes())
            # The rest of the folder's name is for people.
            if folder.name[-12:] != identity.key[:12]:
                raise ValueError("it belongs to another folder")
        except PermissionError:
            raise ResultsError(closed(path)) from None
        except (OSError, ValueError) as error:
            raise ResultsError(
                f"its cell.json cannot be used ({reason(error)}); run its experiment again, which "
                "writes it anew and measures nothing twice, or move the folder away"
            ) from None
        return CellStore(folder, identity)

    def _is_there(self) -> bool:
        """Check whether the folder is a results folder; raise ResultsError if it is unusable."""
        path = self.root / "tracker.json"
        if not path.is_file():
            return False
        if why := closed(path):
            raise ResultsError(f"{path}: {why}")
        try:
            found = int(json.loads(path.read_bytes())["format"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
            said = f"{path} is damaged; it should hold {{'format': {FORMAT}}}"
            raise ResultsError(said) from None
        if why := other_format(found):
            raise ResultsError(f"{self.root} {why}, or choose another --results.")
        return True


def _proof_of(experiment: Path) -> Path:
    return experiment.with_name(f"{experiment.name}.sha256")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
