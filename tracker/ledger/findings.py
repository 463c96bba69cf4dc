"""What studies found, beside the cells it was found in: `studies/STUDY--EXPERIMENT.json`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from tracker.findings import FindingRecord
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
            content, proved = unsealed(path.read_bytes())
            if not proved:
                raise ValueError("it states no digest: it was edited or damaged")
            found.append(FindingRecord.model_validate(content))
        except (OSError, ValueError) as error:
            damaged[str(path)] = f"{reason(error)}; run its study again, or delete it"
    return found
