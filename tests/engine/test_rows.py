"""Rows by themselves: whatever shares one, each token is predicted from its own text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch

from tests.helpers.engines import MAX_LENGTH, make_document, make_documents
from tracker.engine.scoring.rows import (
    ANY_LENGTH,
    Lengths,
    Row,
    common_beginning,
    pack_flat_rows,
    pack_tree_rows,
)
from tracker.schema.documents import Document, Request
from tracker.schema.errors import CellError

Tokens = tuple[int, ...]


def request_text(request: Request, max_length: int) -> Tokens:
    """Return a request's tokens as lm-eval cuts them: the model reads all but the last."""
    return (request.context + request.continuation)[-max_length - 1 :]


def visible_tokens(row: Row, node: int, beginning: Tokens) -> Tokens:
    """Return the tokens that a node attends to, ordered by position in the text."""
    tokens = row.input_ids.flatten()
    positions = row.positions.expand(row.input_ids.shape).flatten()
    if row.ancestors is None:
        nodes = torch.arange(node - node % row.input_ids.shape[1], node + 1)
    else:
        nodes = row.ancestors[node].nonzero().flatten()
        nodes = nodes[positions[nodes].argsort()]
    assert positions[nodes].tolist() == [row.prefix + position for position in range(len(nodes))]
    return (*beginning[: row.prefix], *tokens[nodes].tolist())


def check_rows(
    rows: Iterable[Row],
    documents: Sequence[Document],
    max_length: int,
    beginning: Tokens = (),
    lengths: Lengths = ANY_LENGTH,
) -> None:
    """Check that rows ask each request, and measure each document, once and by its own text."""
    predicted: dict[tuple[int, int], list[Tokens]] = {}
    measured: dict[int, list[Tokens]] = {}
    for row in rows:
        text_lengths = {
            len(request_text(documents[d].requests[i], max_length)) - 1 for d, i in row.requests
        }
        assert row.ancestors is None or row.ancestors.dtype == torch.bool
        assert len(row.predicting_nodes) == len(row.predicting_nodes.unique())
        assert (
            row.input_ids.dtype == row.predicting_nodes.dtype == row.predictor.dtype == torch.long
        )
        assert row.predicted.dtype == row.owner.dtype == torch.long
        assert row.predictor.unique().tolist() == list(range(len(row.predicting_nodes)))
        assert row.owner.unique().tolist() == list(range(len(row.requests)))
        for index, owner in enumerate(row.owner.tolist()):
            text = visible_tokens(row, int(row.predicting_nodes[row.predictor[index]]), beginning)
            full_text = (*text, int(row.predicted[index]))
            predicted.setdefault(row.requests[owner], []).append(full_text)
        for number, nodes in row.gold:
            assert nodes.dtype == torch.long
            texts = [visible_tokens(row, node, beginning) for node in nodes.tolist()]
            # What was read apart is measured where it is read.
            prefix_texts = [beginning[: end + 1] for end in range(row.prefix)]
            measured.setdefault(number, []).extend(prefix_texts + texts)
            text_lengths.add(len(texts[-1]))
        assert len({lengths.side(tokens) for tokens in text_lengths}) == 1
    for number, document in enumerate(documents):
        paths = []
        for index, request in enumerate(document.requests):
            full_text = request_text(request, max_length)
            first = len(full_text) - len(request.continuation)
            ends = range(first, len(full_text))
            assert predicted.pop((number, index)) == [full_text[: end + 1] for end in ends]
            if document.rolling or index == (document.gold or 0):
                start = first if document.rolling else 0
                end = min(len(full_text), max_length)
                paths += [full_text[: index + 1] for index in range(start, end)]
        assert sorted(measured.pop(number)) == sorted(paths)
    assert not predicted
    assert not measured


def test_lengths_have_sides():
    assert Lengths().side(5) == Lengths().side(5000)
    two_thresholds = Lengths((10, 20))
    assert len({two_thresholds.side(n) for n in (9, 10, 11, 20, 21)}) == 5
    assert two_thresholds.side(11) == two_thresholds.side(19)
    all_lengths = Lengths((10,), all_differ=True)
    assert all_lengths.side(3) == all_lengths.side(9)
    assert len({all_lengths.side(n) for n in (9, 10, 11, 12)}) == 4
    assert Lengths((), all_differ=True).side(3) != Lengths((), all_differ=True).side(4)


SHARED = make_documents(12, shared=9)
BEGINNING = common_beginning(SHARED, MAX_LENGTH)
ROLLING = make_document(((0,), (4, 5, 6)), ((5, 6), (7, 8)), gold=None, rolling=True)
OPEN = make_document(((3, 1, 4), (1, 5)), ((3, 1), (4,)), gold=None)
LENGTHS = [ANY_LENGTH, Lengths((14, 18)), Lengths((16,), all_differ=True)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
@pytest.mark.parametrize("max_length", [MAX_LENGTH, 15])
def test_every_token_is_predicted_from_its_own_text(lengths, row_tokens, max_length):
    documents = [*SHARED, ROLLING, OPEN]
    flat = list(pack_flat_rows(documents, max_length, row_tokens, lengths))
    tree = list(pack_tree_rows(documents, max_length, row_tokens, lengths=lengths))
    check_rows(flat, documents, max_length, lengths=lengths)
    check_rows(tree, documents, max_length, lengths=lengths)
    assert all(row.prefix == 0 for row in (*flat, *tree))


def test_a_tree_holds_what_several_texts_begin_with_once():
    (row,) = pack_tree_rows(SHARED, MAX_LENGTH, 1000)
    texts = [(r.context + r.continuation)[:-1] for document in SHARED for r in document.requests]
    gold = [document.requests[document.gold] for document in SHARED]
    texts += [request.context + request.continuation for request in gold]
    assert row.tokens == len({text[: end + 1] for text in texts for end in range(len(text))})


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("row_tokens", [1, 1000])
def test_a_beginning_that_was_read_apart_belongs_to_the_text(lengths, row_tokens):
    rows = list(pack_tree_rows(SHARED, MAX_LENGTH, row_tokens, len(BEGINNING), lengths))
    check_rows(rows, SHARED, MAX_LENGTH, BEGINNING, lengths)
    assert {row.prefix for row in rows} == ({9} if lengths is ANY_LENGTH else {0, 9})


def test_a_row_is_as_full_as_its_size_allows():
    documents = [make_document(((n, n), (5,)), ((n, n), (6,)), gold=1) for n in range(6)]
    assert [row.input_ids.shape for row in pack_flat_rows(documents, 9, 9)] == [(3, 3), (3, 3)]
    assert [row.input_ids.shape for row in pack_flat_rows(documents, 9, 8)] == [(2, 3)] * 3
    assert [row.input_ids.shape for row in pack_flat_rows(documents, 9, 1)] == [(1, 3)] * 6
    assert [row.tokens for row in pack_tree_rows(documents, 9, 9)] == [9, 9]
    assert [row.tokens for row in pack_tree_rows(documents, 9, 8)] == [6, 6, 6]
    assert [row.tokens for row in pack_tree_rows(documents, 9, 1)] == [3] * 6


def test_documents_that_begin_alike_share_a_row_in_whatever_order_they_come():
    documents = [make_document(((n % 2, 2, 3, 4), (5 + n, 1))) for n in range(4)]
    assert [row.tokens for row in pack_tree_rows(documents, 9, 8)] == [8, 8]
    assert {row.requests[0][0] % 2 for row in pack_tree_rows(documents, 9, 8)} == {0, 1}


def test_what_begins_another_request_is_read_with_it():
    documents = [make_document(((1, 2), (3,)), ((1, 2, 3), (4, 5)), ((1, 2), (9,)), gold=1)]
    (row,) = pack_flat_rows(documents, 9, 1000)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert row.predicting_nodes.tolist() == [2, 3, 1]


def test_the_last_token_is_not_read_with_a_request_that_it_would_change():
    """As long as a threshold, the whole text is read once more, for the proxies alone."""
    documents = [make_document(((1, 2), (3,)))]
    for pack in (pack_tree_rows, pack_flat_rows):
        rows = list(pack(documents, 9, 1000, lengths=Lengths((3,))))
        assert [(row.tokens, len(row.requests), len(row.gold)) for row in rows] == [
            (2, 1, 0),
            (3, 0, 1),
        ]
        check_rows(rows, documents, 9, lengths=Lengths((3,)))


def test_the_common_beginning_ends_where_requests_part_or_something_is_predicted():
    def find_beginning(*requests: tuple[Tokens, Tokens], max_length: int = 9) -> Tokens:
        return common_beginning([make_document(request) for request in requests], max_length)

    assert common_beginning([], 9) == ()
    assert find_beginning(((1, 2, 3, 4), (5,)), ((1, 2, 9, 4), (5,))) == (1, 2)
    assert find_beginning(((1, 2, 3), (5,)), ((1, 2, 3), (6,))) == (1, 2)
    assert find_beginning(((1, 2, 3), (5,)), ((1, 2, 3, 4, 5), (6,))) == (1, 2)
    # Nothing parts where one request begins the other.
    nested_document = make_document(((1, 2, 3), (4,)), ((1, 2, 3), (4, 5)), gold=1)
    assert common_beginning([nested_document], 9) == (1, 2)
    # Of the first only the last two tokens are left.
    assert find_beginning(((1, 2, 3), (5,)), ((1, 2, 3, 4), (6,)), max_length=2) == ()
    assert find_beginning(((1,), (5,)), ((1,), (6,))) == ()


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_nodes_are_added_up_to_a_multiple(prefix, multiple):
    (row,) = pack_tree_rows(SHARED, MAX_LENGTH, 1000, prefix)
    padded_row, nodes = row.pad_nodes(multiple), row.tokens
    assert (prefix + padded_row.tokens) % multiple == 0
    assert 0 <= padded_row.tokens - nodes < multiple
    visible = padded_row.ancestors
    assert torch.equal(visible[:nodes, :nodes], row.ancestors)
    assert not visible[:nodes, nodes:].any()
    assert torch.equal(visible[nodes:], torch.eye(padded_row.tokens, dtype=torch.bool)[nodes:])
    assert (padded_row.positions[:, nodes:] == prefix).all()
    assert (padded_row.predicting_nodes, padded_row.gold, padded_row.length) == (
        row.predicting_nodes,
        row.gold,
        row.length,
    )
    (flat_row, *_) = pack_flat_rows(SHARED, MAX_LENGTH, 1000)
    assert flat_row.pad_nodes(multiple) is flat_row


def test_the_longest_continuation_that_a_model_can_score():
    (row,) = pack_tree_rows([make_document(((1,), (2, 3, 4)))], 3, 1000)
    assert row.predicted.tolist() == [2, 3, 4]
    with pytest.raises(
        CellError, match=r"a continuation of 4 tokens .* reads 1 to 3 tokens; lm-eval"
    ):
        list(pack_tree_rows([make_document(((1,), (2, 3, 4, 5)))], 3, 1000))
    with pytest.raises(CellError, match="a continuation of 0 tokens"):
        list(pack_flat_rows([make_document(((1,), ()))], 3, 1000))
