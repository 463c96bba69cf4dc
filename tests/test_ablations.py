from __future__ import annotations

import pytest

from tracker.core.ablations import INTACT, Ablation, ablate, ablation_of, ablations_of, removals
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError
from tracker.core.kinds import Action
from tracker.core.model_parts import CONTROLS, ModelParts, with_all_parts
from tracker.core.records import RunIdentity
from tracker.measuring.prepare import check_range
from tracker.studies.base import removing_whole_layers


def request(**settings: object) -> CellRequest:
    return CellRequest(model="m", benchmark="b", **{"layers": (0, 1, 2, 3), **settings})


@pytest.mark.parametrize(
    ("ablation", "name"),
    [
        (INTACT, "baseline"),
        (Ablation((3,)), "layer:3"),
        (Ablation((3, 17)), "layers:3,17"),
        (Ablation(attention=(5,)), "attention:5"),
        (Ablation(mlp=(5, 6)), "mlp:5,6"),
        (Ablation((3, 17), mlp=(5,)), "layers:3,17+mlp:5"),
        (Ablation((3,), (1,), (2,)), "layer:3+attention:1+mlp:2"),
    ],
)
def test_names(ablation: Ablation, name: str) -> None:
    assert ablation.name == name
    assert ablation.has_sublayers == ("attention" in name or "mlp" in name)


def test_what_happens_at_each_layer() -> None:
    ablation = Ablation((0,), attention=(0, 1, 3), mlp=(2, 3))
    # Both halves of a layer are the whole of it.
    actions = [ablation.at(layer).action.name for layer in range(5)]
    assert actions == ["SKIP", "NO_ATTENTION", "NO_MLP", "SKIP", "PASS"]
    assert {INTACT.at(layer).action for layer in range(5)} == {Action.PASS}


@pytest.mark.parametrize(
    ("component", "layers", "removed", "expected"),
    [
        ("layer", [2], (), Ablation((2,))),
        ("layer", [2], (3, 1), Ablation((1, 2, 3))),
        ("attention", [4, 2], (), Ablation(attention=(2, 4))),
        ("mlp", [2], (3,), Ablation((3,), mlp=(2,))),
        # Of a layer that is removed already, nothing is left to remove.
        ("mlp", [2, 3], (3,), Ablation((3,), mlp=(2,))),
        ("attention", [3], (3,), Ablation((3,))),
        ("layer", [], (), INTACT),
    ],
)
def test_ablate(component, layers, removed, expected: Ablation) -> None:
    assert ablate(component, layers, removed) == expected
    # One set has one name and one hash, however it was asked for.
    assert hash(ablate(component, layers[::-1], removed[::-1])) == hash(expected)


def test_runs_come_component_by_component_span_by_span() -> None:
    asked = request(layers=(0, 2), components=("mlp", "layer"), spans=(2, 1))
    assert list(removals(asked, 4)) == [
        RunIdentity(component=component, layer=layer, span=span)
        for component in ("mlp", "layer")
        for span in (2, 1)
        for layer in (0, 2)
    ]


def test_what_is_no_run_is_left_out() -> None:
    def runs(**asked: object) -> list[tuple[int, int]]:
        return [(run.layer, run.span) for run in removals(request(**asked), 4)]

    beyond = runs(spans=(1, 2, 4, 5))
    assert beyond == [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2)]
    assert runs(spans=(1, 2), removed=(1,)) == [(0, 1), (2, 1), (3, 1), (2, 2)]
    assert runs(layers=(0,), spans=(4,), components=("mlp",)) == [(0, 4)]
    assert (
        runs(removed=(0, 1, 2, 3)) == runs(layers=(3,), removed=(0, 1, 2)) == runs(layers=()) == []
    )


def test_a_run_lies_on_top_of_the_removed_layers() -> None:
    (run,) = removals(request(layers=(2,), spans=(2,), removed=(0,)), 4)
    assert ablation_of(run, (0,)) == Ablation((0, 2, 3))


def test_a_cell_has_the_baseline_what_is_removed_and_every_run_once() -> None:
    names = [each.name for each in ablations_of(request(layers=(0, 1), removed=(3,)), 4)]
    assert names == ["baseline", "layer:3", "layers:0,3", "layers:1,3"]
    assert ablations_of(request(layers=()), 4) == [INTACT]
    asked = request(components=("layer", "attention", "mlp"), spans=(1, 2, 3))
    found = ablations_of(asked, 4)
    assert len(set(found)) == len(found) == 1 + 3 * (4 + 3 + 2)
    assert found[0] == INTACT


def test_a_sublayer_that_is_to_be_replaced_says_why_it_is_no_run():
    asked = request(layers=(3,), components=("attention",), interventions=("mean",))
    with pytest.raises(ExperimentError, match=r"is a run \(mean is done to whole single"):
        check_range(asked, ModelParts(30))
    both = asked.model_copy(update={"interventions": ("remove", "mean")})
    assert [run.intervention for run in removals(both, 30)] == ["remove"]
    check_range(both, ModelParts(30))


def test_a_kind_with_a_span_is_neighbours_of_that_kind_and_controls_are_drawn():
    parts = ModelParts(8, of_kind=(0, 1, 3, 4, 6))
    asked = with_all_parts(request(layers=(), spans=(1, 3), control="random"), parts)
    runs = list(removals(asked, 8))
    alone = [run.layer for run in runs if run.span == 1]
    assert alone == [0, 1, 3, 4, 6]
    together = [run.changed for run in runs if run.span == 3 and not run.drawn]
    assert together == [(0, 1, 3), (1, 3, 4), (3, 4, 6)]
    drawn = [run.changed for run in runs if run.drawn]
    assert len(drawn) == len({*drawn}) == CONTROLS
    assert not {*drawn} & {*together}
    assert all(len(some) == 3 and max(some) < 8 for some in drawn)
    assert drawn == [run.changed for run in removals(asked, 8) if run.drawn]
    assert {ablation_of(run, ()).name for run in runs if run.span == 3} == {
        f"layers:{','.join(map(str, some))}" for some in (*together, *drawn)
    }
    # In the order in which records keep them, each once.
    assert len({run.order for run in runs}) == len(runs)
    assert [run.label() for run in runs if run.changed == (0, 1, 3)] == ["layers 0, 1, 3"]
    neighbours = with_all_parts(request(layers=(), spans=(2,)), ModelParts(5, of_kind=(1, 2, 4)))
    assert [run.label() for run in removals(neighbours, 5)] == ["layers 1–2", "layers 2, 4"]


def test_what_a_kind_with_a_span_would_lose_is_refused():
    """Was: spans of other components, and stretches, went without a word."""
    parts = ModelParts(8, of_kind=(0, 1, 3))
    for more in ({"interventions": ("remove", "repeat")}, {"components": ("layer", "mlp")}):
        with pytest.raises(ExperimentError, match="in a file of their own"):
            with_all_parts(request(layers=(), spans=(1, 2), **more), parts)


def test_a_study_of_single_layers_leaves_sets_and_controls_out():
    """Was: they were measured with the layers that it asked for."""
    asked = with_all_parts(
        request(layers=(), spans=(1, 2), control="random"), ModelParts(6, of_kind=(0, 2, 4))
    )
    assert asked.sets
    assert asked.drawn
    alone = removing_whole_layers(asked)
    assert [run.changed for run in removals(alone, 6)] == [(0,), (2,), (4,)]
    assert with_all_parts(alone, ModelParts(6)) == alone


def test_controls_of_spans_are_others_than_the_spans():
    asked = with_all_parts(
        request(layers=(), spans=(2,), control="random", removed=(0,)), ModelParts(5)
    )
    runs = list(removals(asked, 5))
    # Of the six pairs of four layers three are spans.
    assert [run.changed for run in runs if not run.drawn] == [(1, 2), (2, 3), (3, 4)]
    assert {run.changed for run in runs if run.drawn} == {(1, 3), (1, 4), (2, 4)}
