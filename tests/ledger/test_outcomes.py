from __future__ import annotations

from typing import Any

import pytest

from tracker.ledger.outcomes import (
    COMPARED_COLUMNS,
    PROXY_SUMS,
    outcome_row,
    outcome_table,
    stored_texts,
)
from tracker.schema.documents import Document, GeneratedText, Response

RESPONSES = [Response(-1.5, False, 0), Response(-0.25, True, 2)]
PROXIES = (5, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def document(**changes: Any) -> Document:
    settings = {"task": "t", "index": 7, "requests": (), "gold": 1, "choices": 2}
    return Document(**{**settings, **changes})


def test_columns_of_rows_are_stable():
    """They are read from shards of years ago: a renamed column would be a format of its own."""
    metrics = {"acc": 1.0, "f1": "[1, 0]", "nan": None}
    assert outcome_row(document(), "baseline", RESPONSES, metrics, PROXIES, (2, 0.5, 1)) == {
        "task": "t",
        "doc": 7,
        "ablation": "baseline",
        "choices": 2,
        "gold": 1,
        "rolling": False,
        "loglikelihoods": [-1.5, -0.25],
        "greedy": [False, True],
        "metric/acc": 1.0,
        "metric/f1": "[1, 0]",
        "metric/nan": None,
        "proxy_tokens": 5,
        "cosine_similarity_sum": [1.0, 2.0],
        "angular_distance_sum": [3.0, 4.0],
        "relative_update_sum": [5.0, 6.0],
        "compared": 2,
        "difference": 0.5,
        "unsteady": 1,
    }


def test_columns_that_were_not_measured_are_null():
    row = outcome_row(document(rolling=True, gold=None), "layer:0", RESPONSES, {}, None)
    assert row["rolling"] is True
    null_columns = {name for name, value in row.items() if value is None}
    assert null_columns == {"gold", "proxy_tokens", *PROXY_SUMS, *COMPARED_COLUMNS}


@pytest.mark.parametrize(
    ("proxies", "compared"),
    [((5, [[1.0], [2.0]]), None), ((5, [[1.0]] * 4), None), (None, (1, 0.5))],
)
def test_wrong_numbers_of_sums_are_refused(proxies, compared):
    with pytest.raises(ValueError, match="zip"):
        outcome_row(document(), "baseline", RESPONSES, {}, proxies, compared)


def test_types_of_columns_are_fixed():
    """Shards are put together: a column of nulls here is one of numbers there."""
    first = outcome_row(document(gold=None), "layer:0", RESPONSES, {"acc": None}, None)
    texts = GeneratedText("one", 3, False), GeneratedText("two")
    responses = [RESPONSES[0]._replace(texts=texts)]
    second = outcome_row(document(), "baseline", responses, {"f1": "[1]"}, PROXIES, (2, 0.5, 1))
    assert stored_texts(second) == ["one", "two"]
    assert stored_texts({**second, "texts": float("nan")}) == ["one"]
    table = outcome_table([first, second])
    assert "; ".join(f"{field.name} {field.type}" for field in table.schema) == (
        "task string; doc int32; ablation string; choices int32; gold int32; rolling bool; "
        "loglikelihoods list<item: float>; greedy list<item: bool>; metric/acc double; "
        "proxy_tokens int32; "
        + "".join(f"{name} list<item: double>; " for name in PROXY_SUMS)
        + "compared int32; difference double; unsteady int32; metric/f1 string; text string; "
        "text_tokens list<item: int32>; text_cut list<item: bool>; texts list<item: string>"
    )
    assert table.to_pylist() == [
        {**dict.fromkeys(table.column_names), **first},
        {**dict.fromkeys(table.column_names), **second},
    ]
