"""A study from its file to its section: measure what it lacks, ask it, keep what it says."""

from __future__ import annotations

from dataclasses import dataclass

from tracker.core.errors import CellError, ExperimentError
from tracker.core.findings import FindingRecord
from tracker.ledger.findings import keep_finding
from tracker.measuring.derive import record_of
from tracker.measuring.prepare import look_up
from tracker.runner import Finished, run_cells
from tracker.studies.base import Study, StudyContext, Subject


@dataclass(frozen=True)
class Conducted:
    """What became of a study.

    Attributes:
        finding: What it says.
        outcome: What became of the cells that it needs, and of those that it ran itself.
    """

    finding: FindingRecord
    outcome: Finished


def conduct(study: Study, asked: StudyContext) -> Conducted:
    """Measure and publish the cells of a study as `run_cells` does, and keep what it finds.

    RequestError if the file is not enough for it, CellError where no cell could be measured.
    """
    requests = study.requests(asked)
    if any(request.until is not None for request in requests):
        raise ExperimentError(
            "'until' stops at the answer to another question than a study's; leave it out of the "
            "file, or write 'sample' for fewer documents"
        )
    study.prepare(asked)
    outcome = run_cells(requests, asked.ledger, asked.publisher, asked.options, asked.progress)
    subjects = []
    for request in requests:
        found = look_up(request, asked.ledger)
        if (store := found.store) is not None and found.complete:
            record = record_of(store, store.views.named_of(request))
            subjects.append(Subject(request, store, record))
    if not subjects:
        raise CellError("\n".join(f"{title}: {why}" for title, why in outcome.failed.items()))
    said = study.say(asked, subjects)
    outcome = outcome.joined(said.ran)
    lacking = (*said.lacking, *(f"{title}: {why}" for title, why in outcome.failed.items()))
    finding = said.recorded(study, asked, subjects).model_copy(update={"lacking": lacking})
    keep_finding(asked.ledger.root, finding)
    return Conducted(finding, outcome)
