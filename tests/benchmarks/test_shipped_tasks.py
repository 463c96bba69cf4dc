"""The tasks that ship in `experiments/tasks`: their rows, and the answers that they find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracker.schema.documents import GeneratedText, Response
from tracker.schema.extent import Extent

from .conftest import make

TASKS = str(Path(__file__).parents[2] / "experiments" / "tasks")
RIGHT_TEXTS = {
    "arc_easy_generation": ("A", " A. Solid", "**A**", "The answer is (A)."),
    "sciq_generation": ("darwin", "Charles Darwin, and not Linnaeus"),
    "countries": (" France and the largest city", "the France"),
    "capitals_generation": ("Paris", "The capital of France is Paris, not Manila."),
    "sums": ("13", "4 + 4 = 8. 8 + 5 = 13. The answer is 13."),
}
WRONG_TEXTS = ("", "Who knows? No-one.", "B. Manila, Scopes and 9999")


@pytest.mark.parametrize("name", RIGHT_TEXTS)
def test_a_task_finds_the_answer_in_a_text(name, encoder):
    benchmark = make(name, include_path=TASKS)
    (document,) = benchmark.documents(encoder, Extent(limit=1))
    for expected, texts in ((1, RIGHT_TEXTS[name]), (0, WRONG_TEXTS)):
        for text in texts:
            response = Response(0.0, False, 0, (GeneratedText(text, 5, is_cut=False),))
            values = benchmark.outcomes(document, [response])
            assert [*values.values()] == [expected, 0], text


@pytest.mark.parametrize("name", ["arc_easy", "sciq", "capitals"])
def test_given_and_written_options_have_the_same_rows(name):
    names = name, f"{name}_generation"
    digests = {make(task, include_path=TASKS).rows_digest(task) for task in names}
    assert len(digests) == 1
