"""The texts that a miniature is asked: whether they cross what they are made to cross."""

from __future__ import annotations

from tests.helpers.engines import MAX_LENGTH
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, NO_PREFIX
from tracker.engine.scoring.rows import common_beginning, pack_tree_rows
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.selfcheck.miniature_check import draw_long_documents, draw_short_documents
from tracker.engine.selfcheck.quirks import SMALL_NUMBERS
from tracker.schema.documents import Document


def context(document: Document) -> tuple[int, ...]:
    return document.requests[0].context


def test_they_cross_what_an_architecture_counts_tokens_by() -> None:
    """Of random tokens, since a repeated one looks alike from every place."""
    calls = draw_short_documents(97, MAX_LENGTH)
    assert calls == draw_short_documents(97, MAX_LENGTH)
    for documents in calls:
        requests = [request for document in documents for request in document.requests]
        tokens = [t for r in requests for t in (*r.context, *r.continuation)]
        assert 2 <= min(tokens) < max(tokens) < 97
        assert len(set(tokens)) > 20
    # The first ones are special in many a vocabulary.
    small_calls = draw_short_documents(4, MAX_LENGTH)
    small_tokens = {token for documents in small_calls for d in documents for token in context(d)}
    assert small_tokens == {2, 3}
    first_documents, step_documents, *prefix_calls = calls
    lengths = [len(context(document)) for document in first_documents]
    assert lengths != sorted(lengths) != lengths[::-1]
    for document, length in zip(step_documents, SMALL_NUMBERS[1::2], strict=True):
        texts = [r.length for r in document.requests]
        assert len(context(document)) < length <= max(texts)
    common_lengths = [len(common_beginning(documents, MAX_LENGTH)) for documents in prefix_calls]
    assert common_lengths == [MIN_PREFIX + 4, MIN_PREFIX + 1]
    for documents in calls:
        assert [document.index for document in documents] == list(range(len(documents)))
        assert {document.task for document in documents} == {"probe"}
        assert all(d.choices == len(set(d.requests)) > d.gold >= 0 for d in documents)
        assert len({document.gold for document in documents}) > 1


def test_texts_are_asked_on_both_sides_of_every_length() -> None:
    for longest in (96, 100, 256, 1024):
        lengths, rows, wide_documents, prefix_documents = draw_long_documents(
            97, longest, 192, 2 * longest, FULL
        )
        # Asked alone, a request takes a call as long as all of it but its last token.
        sides = [(len(context(d)), d.requests[1].length) for d in lengths]
        assert max(full_length for _, full_length in sides) <= longest
        crossed_lengths = {n for wide_row, f in sides for n in range(wide_row, f)}
        assert crossed_lengths >= set(range(2, max(crossed_lengths)))
        assert max(crossed_lengths) >= longest - 3
        row = next(pack_tree_rows(rows, longest, 192))
        assert row.tokens > 192 - 16
        assert int(row.positions.max()) < 24
        (wide_row,) = pack_tree_rows(wide_documents, longest, 192)
        assert wide_row.tokens > 1.5 * longest
        for document in (*wide_documents, *prefix_documents):
            assert all(r.length <= longest for r in document.requests)


def test_a_row_of_one_document_is_as_wide_as_a_cell_s() -> None:
    for widest in (64, 300, 1000):
        *_, wide_documents, prefix_documents = draw_long_documents(97, 128, 192, widest, FULL)
        (wide_row,) = pack_tree_rows(wide_documents, 128, 192)
        assert wide_row.tokens >= widest
        assert wide_row.tokens > 128  # more than any text has, however narrow the cell's are
        assert int(wide_row.positions.max()) < 128
        # Behind a kept beginning, rows are as full as without one.
        rows = list(pack_tree_rows(prefix_documents, 128, 192, 64))
        assert max(row.tokens for row in rows) > 192 - 16


def test_no_text_is_asked_for_what_nothing_shares() -> None:
    lengths, rows, wide_documents, prefix_documents = draw_long_documents(97, 256, 192, 256, FULL)
    assert draw_long_documents(97, 256, 192, 256, NO_PREFIX) == [lengths, rows, wide_documents]
    assert draw_long_documents(97, 256, 192, 256, DEPTH_ONLY) == [lengths, rows]
    assert len(common_beginning(prefix_documents, 256)) >= 128
    assert [len(context(d)) - 128 for d in prefix_documents] == [63, 7, *[13] * 12]
    assert max(r.length for d in prefix_documents for r in d.requests) == 256
