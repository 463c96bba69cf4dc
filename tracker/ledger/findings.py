"""What studies and searches found, beside the cells it was found in.

`studies/STUDY--EXPERIMENT.json` and `searches/NAME.json` in the results folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

from tracker.core.findings import FindingRecord
from tracker.core.identities import Record
from tracker.core.prune_records import PruneRecord
from tracker.ledger.notes import reason, unsealed, write_note

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


def findings(root: Path, damaged: dict[str, str]) -> list[FindingRecord]:
    """List what studies found, by name; `damaged` gets files that cannot be used → what to do."""

    def again(path: Path) -> str:
        """Say what finds it again, as far as a file's name tells it."""
        study, _, experiment = unquote(path.stem).partition("--")
        command = "prune" if study == "search" else f"study {study}"
        return f"type `tracker {command} {experiment or 'FILE'}.yaml`"

    return _listed(root, "studies", FindingRecord, damaged, again)


def searches(root: Path, damaged: dict[str, str]) -> list[PruneRecord]:
    """List what searches found, by name; `damaged` as in `findings`."""
    again = "type its `tracker prune` again"
    return _listed(root, "searches", PruneRecord, damaged, lambda path: again)


def _listed(
    root: Path,
    folder: str,
    kind: type[Found],
    damaged: dict[str, str],
    again: Callable[[Path], str],
) -> list[Found]:
    found = []
    for path in sorted(root.glob(f"{folder}/*.json")):
        try:
            found.append(kind.model_validate(unsealed(path.read_bytes())))
        except (OSError, ValueError) as error:
            damaged[str(path)] = f"{reason(error)}; {again(path)}, or delete it"
    return found
