"""Compare the passes that `until` needs with an oracle that knows the best bets in advance.

The stopping rules `top` and `prune` bet on the difference of each pair of runs, with a mixture of
four sizes of bets. The oracle sums the capital of twelve sizes, and does not pay for having twelve.
So it decides each pair at least as early as the size of bet that is best in hindsight, and no
mixture of these sizes needs fewer passes. Missing documents are measured first.

    python -m tests.tools.until_oracle experiments/study.yaml --set sample=null --benchmark arc_easy
"""

from __future__ import annotations

import math
import sys
from typing import Any
from unittest.mock import patch

import numpy as np

from tracker import cli
from tracker.cli.terminal import echo
from tracker.schema.questions import parse_question
from tracker.stats import stopping
from tracker.studies.base import StudyContext, Subject
from tracker.studies.savings import (
    RANDOM_ORDERS,
    Savings,
    cost_quantile,
    draw_orders,
    read_documents,
    replay_question,
)

QUESTION = parse_question("top 5 within 2 pp")
METRICS = ("", "choice_probability")
ORACLE_BETS = np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])


class OracleTopK(stopping.SequentialTopK):
    """Stopping rule that decides a pair of runs as soon as one size of bet would allow it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._log_target -= math.log(len(ORACLE_BETS))


def write_passes(study: Savings, context: StudyContext, subjects: list[Subject]) -> None:
    """Write the median passes of the rule and of the oracle for each model and benchmark."""
    for subject in subjects:
        cell = read_documents(subject)
        if isinstance(cell, str):
            raise SystemExit(cell)
        orders = draw_orders(len(cell.drops))
        rule = replay_question(cell, QUESTION, orders)
        with (
            patch.object(stopping, "BET_FRACTIONS", ORACLE_BETS),
            patch.object(stopping, "MAX_BET_FRACTION", ORACLE_BETS[-1]),
            patch.object(stopping, "SequentialTopK", OracleTopK),
        ):
            oracle = replay_question(cell, QUESTION, orders)
        shares = [f"{100 * cost_quantile(replay.passes):.1f} %" for replay in (rule, oracle)]
        wrong = f"{100 * rule.wrong.mean():.1f} % wrong"
        echo(f"{cell.title}, {subject.view.metric}, {cell.extent}, {RANDOM_ORDERS} orders:")
        echo(f"  '{QUESTION}': rule {shares[0]} of the passes ({wrong}), oracle {shares[1]}")
    raise SystemExit


def main() -> None:
    """Replay the question by accuracy and by choice probability."""
    for metric in METRICS:
        options = ["--metric", metric] * bool(metric)
        with patch.object(Savings, "answer", write_passes):
            try:
                cli.main(["study", "savings", *sys.argv[1:], *options])
            except SystemExit as exit_request:
                if exit_request.code:
                    raise


if __name__ == "__main__":
    main()
