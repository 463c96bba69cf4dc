"""Statements are read as they are meant, and false ones are found."""

from __future__ import annotations

from tests.tools.claims.__main__ import normalise_sentence
from tests.tools.claims.made_up import THREE_LAYERS
from tests.tools.claims.reading import (
    board_statements,
    false_statements,
    listed_layers,
    named_layers_in,
    ordered_pairs,
)


def test_what_is_said_is_read() -> None:
    assert named_layers_in("Without layer 0, 3 or 7 it falls, as of layers 11–13.") == {
        0,
        3,
        7,
        11,
        12,
        13,
    }
    assert named_layers_in("14 of 30 layers cost less than 5 pp.") == set()
    ranks = {"0": "1 to 2", "3": "1 to 3", "5": "3 to 3", "6": "–"}
    assert [*ordered_pairs(ranks)] == ["0 before 5"]
    assert [
        *listed_layers(
            "m · piqa\nlayer (0-based)  drop\n     3   20.1 (1.0 to 39.2)\n15 of 16 runs"
        )
    ] == ["layer 3 matters: m · piqa"]
    board = " 1 to 3      3  matters   1.00  38.3 (23.5 to 49.7)\n 4 to 9      5  open   0.1"
    assert [*board_statements(board)] == ["layer 3 matters"]


def test_a_sentence_is_the_same_of_other_layers() -> None:
    sentence = "It falls without layer 0, 3 or 11."
    assert (
        normalise_sentence(sentence)
        == normalise_sentence("It falls without layer 12.")
        == "It falls without layer #."
    )


def test_what_is_not_so_is_found() -> None:
    statements = [
        *("Without layer 3 it falls.", "layer 5 matters", "3 before 5", "0 before 3"),
        *("layer 5 below 5 pp", "layer 3 below 5 pp", "5 before 3"),
        "13 of 16 layers are shown to cost less than 5 pp.",
        "14 of 16 layers are shown to cost less than 5 pp.",
        *("Only layer 5 is shown to cost less than 5 pp.", "It rises without layer 3."),
        "Only layers 3 and 4 are shown to cost less than 5 pp.",
        "Without layer 3 the model breaks down (every answer becomes unlikely).",
        "These break the same documents: layers 0, 5.",
        "a: ranks by relevance and by cosine score differ significantly for 6 of 16 layers",
        "a: ranks by relevance and by cosine score differ significantly for 7 of 16 layers",
        "significant in 0 of 2 measurements (5 %, Holm-corrected).",
        "significant in 1 of 2 measurements (5 %, Holm-corrected).",
        "For 13 layers, 100 documents cannot tell.",
        "The 2 layers with the highest cosine scores are 3 and 4, not 0 and 3.",
        "The 2 layers with the highest cosine scores are 3 and 4, not 3 and 5.",
    ]
    false_set = {statements[index] for index in (1, 3, 5, 6, 8, 10, 11, 12, 13, 15, 17, 20)}
    assert {*false_statements("page", statements, THREE_LAYERS)} == false_set
    assert false_statements("page", statements[-7:-6], {}) == statements[-7:-6]
    model_statements = [
        "a minus b: shown: 1 of 32 differences, such as layer 3 on piqa",
        "a before b",
    ]
    assert false_statements("models", model_statements, THREE_LAYERS) == model_statements


def test_what_studies_say_that_is_not_so_is_found() -> None:
    statements = [
        *("0.9 needs about 300.", "Documents for 0.9 by other figures: cosine score 8."),
        "Documents for 0.9 by other figures: gold log-prob drop 300.",
        "accuracy beats random by 1.0 pp.",
        *(
            "At a false discovery rate of 5%, 2 pairs are redundant and 1 are sub-additive.",
            "layers 0 and 3",
        ),
        *(
            "m: gold log-prob drop orders the layers best of 7 proxies",
            "m: a leaves the most of 4.",
        ),
        "m: KL divergence orders the layers best of 7 proxies",
        "it is not known which of 7 proxies orders the layers best; it may be KL divergence.",
        "accuracy beats gold_logprob by 1.0 pp.",
        "random beats last by 1.0 pp.",
        "Pruning by accuracy is significantly better than by random, gold_logprob.",
        "which of 5 strategies leaves the most accuracy; it may be accuracy or last.",
    ]
    assert false_statements("studies", statements, THREE_LAYERS) == statements[7:]
    assert [
        statement
        for statement in statements
        if statement not in false_statements("studies", statements, {})
    ] == [statements[1], statements[6]]
