"""A study from its file to its section: measure what it lacks, ask it, keep what it says."""

from __future__ import annotations

from tracker.core.errors import CellError, ExperimentError
from tracker.core.findings import FindingRecord
from tracker.ledger.findings import keep_finding
from tracker.measuring.derive import record_of
from tracker.measuring.prepare import look_up
from tracker.runner import Finished, run_cells
from tracker.studies.base import Study, StudyContext, Subject


def conduct(study: Study, asked: StudyContext) -> tuple[FindingRecord, Finished]:
    """Measure and publish the cells of a study as `run_cells` does, and keep what it finds.

    Returns what it says, and what became of the cells that it needs and of those that it ran
    itself. RequestError if the file is not enough, CellError where no cell could be measured.
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
        known = look_up(request, asked.ledger)
        if (store := known.store) is not None and known.complete:
            record = record_of(store, store.views.named_of(request))
            subjects.append(Subject(request, store, record))
    if not subjects:
        raise CellError("\n".join(f"{title}: {why}" for title, why in outcome.failed.items()))
    result = study.say(asked, subjects)
    outcome = outcome.joined(result.ran)
    failed = (f"{title}: {why}" for title, why in outcome.failed.items())
    places = (*(subject.record.place for subject in subjects), *result.rests_on)
    finding = FindingRecord(
        study=study.name,
        experiment=asked.asked.name,
        question=study.question,
        answers=tuple(result.answers),
        tables=tuple(result.tables),
        charts=tuple(result.charts),
        lacking=(*result.lacking, *failed),
        assumptions=tuple(result.assumptions),
        rests_on=tuple(dict.fromkeys(places)),
    )
    keep_finding(asked.ledger.root, finding)
    return finding, outcome
