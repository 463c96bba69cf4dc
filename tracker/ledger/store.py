"""The results folder: cells, what led to them, and the experiment files.

RESULTS/
  tracker.json              the folder's format
  index/REQUEST.json        what was asked for → its cell, found without loading anything
  studies/STUDY--FILE.json  what studies found
  searches/NAME.json        what searches for what to prune found
  experiments/NAME.yaml     the user's exact experiment files, each with its SHA-256 beside it
  checks/                   what was found out of architectures
  places/PLACE.json         where cells were published to: each is kept until its file is deleted
  cells/MODEL--BENCHMARK--KEY/
    cell.json               the model, the benchmark, and who made the cell
    requests/VIEW.json      every run that was asked of a view, its metric and documents: to show
    derived/VIEW*.json      the records that follow from all this, kept to save the time
    shards/*.parquet        per-document outcomes, each with who measured it
    texts/*.parquet         what the documents say, each with its digest
    verified.json           which shards were found to be what was written
    receipts/               what a place has, or should have
    begun/                  which searches are at it
    locks/                  one a block of documents
  slurm/                    the logs of SLURM jobs

Whatever is shown from it states a digest of itself. What does not fit its digest is derived or
measured again where that is possible, and said where it is not.

And what studies and searches found, beside the cells it was found in.
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
    """Keep a finding in a results folder, in place of what the study said of the file before."""
    path = root / "studies" / f"{quote(finding.name, safe='')}.json"
    write_note(path, finding.model_dump(mode="json"))


def keep_search(root: Path, record: PruneRecord) -> Path:
    """Keep a search in a results folder, in place of what it found before; its file."""
    path = root / "searches" / f"{record.name}.json"
    write_note(path, record.model_dump(mode="json"))
    return path


def listed(folder: Path, kind: type[Found], damaged: dict[str, str]) -> list[Found]:
    """List what was found, by name; `damaged` gets files that cannot be used → what to do."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(kind.model_validate(unsealed(path.read_bytes(), path.name)))
        except (OSError, ValueError) as error:
            damaged[str(path)] = f"{reason(error)}; {_again(path)}, or delete it"
    return found


def _again(path: Path) -> str:
    """Say what finds it again, as far as a file's name tells it."""
    if path.parent.name == "searches":
        return "type its `tracker prune` again"
    study, _, experiment = unquote(path.stem).partition("--")
    command = "prune" if study == "search" else f"study {study}"
    return f"type `tracker {command} {experiment or 'FILE'}.yaml`"


_WRITTEN = ("cells", "experiments", "index", "locks")
"""Folders that a measurement writes."""
_READ = ("cells", "experiments", "searches", "studies")
"""Folders that are shown."""
UNFINISHED = "its run goes on, or was stopped: then type its command again"
"""What is said of a cell that is begun."""


@dataclass(frozen=True)
class Contents:
    """What a results folder holds.

    Attributes:
        views: Each view with its cell, sorted by model and benchmark.
        unfinished: The cells with outcomes and without a view, and those that a search is at: it
            was stopped, or goes on; each with what to type. What a search that is over measured is
            shown by what it found.
        experiments: The kept experiment files: name → exact text.
        findings: What studies found, by name.
        searches: What searches for what to prune found, by name.
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
        """The cells that searches took their steps in."""
        return {place for record in self.searches for place in record.rests_on}


class Ledger:
    """A results folder; nothing is made at `root` before `create`.

    ResultsError if it is a file, is damaged, or is of another format.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            if root.exists() and not root.is_dir():
                raise ResultsError(f"{root} is a file, not a results folder")
            self._is_there()
        except OSError as error:  # too long a name, a folder above that may not be looked into
            raise ResultsError(f"{root} cannot be used: {error.strerror}") from None

    @classmethod
    def existing(cls, root: Path) -> Ledger:
        """Open a results folder that must be there.

        ResultsError if it holds no results, or is of another format.
        """
        ledger = cls(root)
        if not (root / "tracker.json").is_file():
            raise ResultsError(
                f"{root} is not a results folder. `tracker run EXPERIMENT.yaml --results {root}` "
                "makes one."
            )
        return ledger

    def refuse_unwritable(self) -> None:
        """Raise ResultsError if it cannot be made or written, before a night is spent for it."""
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
        try:  # what the system says before may not hold: a disk is full, or takes no files
            with tempfile.TemporaryDirectory(dir=there, prefix=".tracker-"):
                pass
        except OSError as error:
            raise ResultsError(
                f"{self.root} cannot be written: {there}: {error.strerror}. Choose another folder "
                "with --results"
            ) from None

    def create(self) -> None:
        """Make the folder a results folder, or do nothing where it is one."""
        if not self._is_there():
            write_text(self.root / "tracker.json", json.dumps({"format": FORMAT}))

    def cells(self, damaged: dict[str, str] | None = None) -> list[CellStore]:
        """List the cells that can be used, sorted by model and benchmark.

        `damaged` gets each cell's folder that cannot be used → what to do.
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
        """List everything that can be shown; what is damaged keeps nothing else away."""
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
        """Say what to do about a search; a trial's command is its sweep's."""
        said = UNFINISHED.replace("run", "search", 1)
        return f"{said}: {shlex.join([*command, '--results', str(self.root)])}" if command else said

    def cell(
        self, model: ModelIdentity, benchmark: BenchmarkIdentity, provenance: dict[str, str]
    ) -> CellStore:
        """Open a cell, or make it; versions and machine are kept for a new one.

        The same weights may have several names: what is measured keeps the first.
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
        """Find the cell that a request led to before; None when it is new."""
        name = read_note(self._index(request_key)).get("cell")
        if name is None or Path(name).name != name:
            return None
        try:
            return self._open(self.root / "cells" / name)
        except ResultsError:  # made again by `cell`
            return None

    def remember(self, request_key: str, cell: CellStore) -> None:
        """Let `find` find a cell by a request."""
        write_note(self._index(request_key), {"cell": cell.folder.name})

    def keep_notes(self, notes: Mapping[Path, Mapping[str, Any]]) -> None:
        """Write notes into the folder, which is made for them."""
        for path, note in notes.items():
            self.create()
            write_note(path, note)

    def keep_experiment(self, name: str, text: str) -> None:
        """Keep the exact text of an experiment file, and its digest as `sha256sum -c` reads it."""
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
            # What stands before it in the folder's name is for people.
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
        """Say whether the folder is a results folder; ResultsError where it cannot be used."""
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
