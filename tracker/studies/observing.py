"""What a study observes of its cells besides outcomes."""

from __future__ import annotations

from collections.abc import Callable

from tracker.engine.scoring.sweep import Engine
from tracker.measuring import observing
from tracker.measuring.observing import Observe, Observed
from tracker.studies.base import StudyContext, Subject


def observe(
    subject: Subject, kind: str, asked: StudyContext, begin: Callable[[Engine], Observe]
) -> Observed:
    """Observe all documents of a study's cell, as `tracker.measuring.observing` does."""
    request = subject.request
    return observing.observe(
        request,
        subject.store,
        kind,
        begin,
        lambda: observing.open_observed(request, asked.ledger, asked.options, asked.progress),
        asked.progress,
    )
