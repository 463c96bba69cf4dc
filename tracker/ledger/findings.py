"""What studies found, beside the cells it was found in: `studies/STUDY--EXPERIMENT.json`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from tracker.core.findings import FindingRecord
from tracker.ledger.notes import reason, unsealed, write_note


def keep_finding(root: Path, finding: FindingRecord) -> None:
    """Keep a finding in a results folder, in place of what the study said of the file before."""
    path = root / "studies" / f"{quote(finding.name, safe='')}.json"
    write_note(path, finding.model_dump(mode="json"))


def findings(root: Path, damaged: dict[str, str]) -> list[FindingRecord]:
    """List what is kept, by name; `damaged` gets each file that cannot be used → what to do."""
    found = []
    for path in sorted(root.glob("studies/*.json")):
        try:
            found.append(FindingRecord.model_validate(unsealed(path.read_bytes())))
        except (OSError, ValueError) as error:
            again = _again(*unquote(path.stem).split("--", 1))
            damaged[str(path)] = f"{reason(error)}; type {again}, or delete it"
    return found


def _again(study: str, experiment: str = "FILE") -> str:
    """Say what finds it again, as far as a file's name tells it."""
    command = "prune" if study == "search" else f"study {study}"
    return f"`tracker {command} {experiment}.yaml`"
