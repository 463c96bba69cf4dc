from __future__ import annotations

import pytest

from tracker.measuring.prepare import check_possible
from tracker.schema.changes import CHANGE_COLUMNS, INTACT, MAX_NAMED_MAPS, Ablation, Change
from tracker.schema.config import CellRequest, cell_request
from tracker.schema.errors import ExperimentError
from tracker.schema.kinds import Action
from tracker.schema.model_parts import N_CONTROLS, ModelParts, fill_parts
from tracker.schema.provenance import content_hash
from tracker.schema.records import ChangeRecord


def request(**settings: object) -> CellRequest:
    return cell_request(model="m", benchmark="b", **{"layers": (0, 1, 2, 3), **settings})


TEXTS = {
    "layer:3": Change("layer", (3,)),
    "layers:3,4,9": Change("layer", (3, 4, 9)),
    "drawn:3,4": Change("layer", (3, 4), drawn=True),
    "attention:3,4": Change("attention", (3, 4)),
    "mlp:12": Change("mlp", (12,)),
    "shared_expert:2": Change("shared_expert", (2,)),
    "head:3.0": Change("head", (3,), part=0),
    "kv_head:3.1": Change("kv_head", (3,), part=1),
    "neuron:3.5": Change("neuron", (3,), part=5),
    "expert:11.63": Change("expert", (11,), part=63),
    "mean:3": Change("layer", (3,), "mean"),
    "linear:3": Change("layer", (3,), "linear"),
    "int4:5": Change("layer", (5,), "int4"),
    "int4:5.mlp": Change("linear", (5,), "int4", "mlp"),
    "q4_k:5.mlp.experts.7.down_proj": Change("linear", (5,), "q4_k", "mlp.experts.7.down_proj"),
    "fp8:lm_head": Change("linear", (), "fp8", "lm_head"),
    "repeat:3": Change("layer", (3,), "repeat"),
    "repeat:3-6": Change("layer", (3, 4, 5, 6), "repeat"),
    "repeat3:3-6": Change("layer", (3, 4, 5, 6), "repeat", repeats=3),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_change_is_read_back_from_its_text(text):
    change = TEXTS[text]
    assert str(change) == text
    assert Change.parse(text) == change
    assert ChangeRecord.model_validate_json(f'{{"change": "{text}"}}').change == change
    fields = {name: getattr(change, name) for name in CHANGE_COLUMNS}
    assert ChangeRecord.model_validate(fields).change == change, "as former versions wrote it"
    # A kind is the same change at layer 0.
    if not change.members:
        assert change.kind.at_layer(change.layer) == change


def test_ranges_and_plurals_are_read_too():
    assert Change.parse("layer:3-5,9") == Change.parse("layers:3,4,5,9")
    assert Change.parse("attention:4,3") == Change.parse("attention:3-4")


NO_CHANGES = """
    layer layer: layer:x layer:3- layer:5-3 layer:-1 layer:0-99999 head:3 head:3.x head:3,4.0
    layer:3.0 mean:3,4 mean:3.0 remove:3 int4: int4:somewhere int4:3,4.mlp int4:3,4 layer:embedding
    repeat:3.1 quantise:3 repeatx:3 linear:3.mlp layer:3+mlp:4 Layer:3
"""


@pytest.mark.parametrize("text", ["", *NO_CHANGES.split()])
def test_invalid_changes_are_refused(text):
    with pytest.raises(ValueError, match=r"invalid change .* expected e\.g\. layer:3"):
        Change.parse(text)


ABLATIONS = """
    baseline layer:3 layers:3,17 mlp:5,6 layers:3,17+mlp:5 repeat:3-6 layer:1+mean:3
    layer:3+attention:1+mlp:2+shared_expert:0 layer:1+head:2.0+head:2.1
    int4:2.mlp+int4:2.mlp.down_proj int4:embedding+int4:lm_head+int4:2
"""


@pytest.mark.parametrize("name", ABLATIONS.split())
def test_an_ablation_is_read_back_from_its_name(name):
    ablation = Ablation.parse(name)
    assert ablation.name == name
    # One set has one name and one hash, however it was written.
    reordered = Ablation.parse("+".join(reversed(name.split("+"))))
    assert (reordered, hash(reordered)) == (ablation, hash(ablation))
    assert ablation.has_sublayers == ("attention" in name or "mlp:" in f" {name}".split("int4")[0])


def test_a_mixture_of_formats_is_named_by_a_digest():
    maps = [f"int4:{layer}.mlp" for layer in range(MAX_NAMED_MAPS + 1)]
    assert Ablation.parse("+".join(maps[1:])).name == "+".join(maps[1:])
    assert Ablation.parse("+".join(maps)).name == f"rounded:{content_hash(maps)[:16]}"


def test_actions_of_an_ablation_by_layer():
    ablation = Ablation.parse("layer:0+attention:1,3+mlp:2,3+repeat:4-5")
    # Both halves of a layer are the whole of it.
    actions = [ablation.at_layer(layer).action.name for layer in range(6)]
    assert actions == ["SKIP", "NO_ATTENTION", "NO_MLP", "SKIP", "PASS", "REPEAT"]
    assert {INTACT.at_layer(layer).action for layer in range(5)} == {Action.PASS}


def test_changes_of_removed_layers_are_dropped():
    change = Change.parse("mlp:2,3")
    assert Ablation.from_changes(change, removed=(3,)).name == "layer:3+mlp:2"
    assert Ablation.from_changes(Change.parse("layer:2"), removed=(3, 1)).name == "layers:1,2,3"
    assert Ablation.from_changes() == INTACT


def test_invalid_runs_are_left_out():
    def runs(**settings: object) -> list[tuple[int, int]]:
        return [(run.layer, run.span) for run in request(**settings).valid_changes(4)]

    beyond = runs(spans=(1, 2, 4, 5))
    assert beyond == [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2)]
    assert runs(spans=(1, 2), removed=(1,)) == [(0, 1), (2, 1), (3, 1), (2, 2)]
    assert runs(layers=(0,), spans=(4,), components=("mlp",)) == [(0, 4)]
    assert (
        runs(removed=(0, 1, 2, 3)) == runs(layers=(3,), removed=(0, 1, 2)) == runs(layers=()) == []
    )


def test_ablations_of_a_cell_are_unique():
    names = [ablation.name for ablation in request(layers=(0, 1), removed=(3,)).ablations(4)]
    assert names == ["baseline", "layer:3", "layers:0,3", "layers:1,3"]
    assert request(layers=()).ablations(4) == [INTACT]
    grid_request = request(components=("layer", "attention", "mlp"), spans=(1, 2, 3))
    ablations = grid_request.ablations(4)
    assert len(set(ablations)) == len(ablations) == 1 + 3 * (4 + 3 + 2)
    assert ablations[0] == INTACT


def test_replaced_sublayers_are_refused_with_the_reason():
    mean_request = request(layers=(3,), components=("attention",), interventions=("mean",))
    with pytest.raises(ExperimentError, match=r"is possible \(mean applies to single whole"):
        check_possible(mean_request, ModelParts(30))
    mixed = request(layers=(3,), components=("attention",), interventions=("remove", "mean"))
    assert [run.intervention for run in mixed.valid_changes(30)] == ["remove"]
    check_possible(mixed, ModelParts(30))


def test_spans_of_a_kind_and_random_controls():
    parts = ModelParts(8, kind_layers=(0, 1, 3, 4, 6))
    filled = fill_parts(request(layers=(), spans=(1, 3), control="random"), parts)
    runs = filled.valid_changes(8)
    singles = [run.layer for run in runs if run.span == 1]
    assert singles == [0, 1, 3, 4, 6]
    spans = [run.layers for run in runs if run.span == 3 and not run.drawn]
    assert spans == [(0, 1, 3), (1, 3, 4), (3, 4, 6)]
    drawn_sets = [run.layers for run in runs if run.drawn]
    assert len(drawn_sets) == len({*drawn_sets}) == N_CONTROLS
    assert not {*drawn_sets} & {*spans}
    assert all(len(layers) == 3 and max(layers) < 8 for layers in drawn_sets)
    assert drawn_sets == [run.layers for run in filled.valid_changes(8) if run.drawn]
    assert {Ablation.from_changes(run, removed=()).name for run in runs if run.span == 3} == {
        f"layers:{','.join(map(str, layers))}" for layers in (*spans, *drawn_sets)
    }
    # In the order in which records keep them, each once.
    assert len({*runs}) == len(runs)
    assert [run.label() for run in runs if run.layers == (0, 1, 3)] == ["layers 0, 1, 3"]
    neighbours = fill_parts(request(layers=(), spans=(2,)), ModelParts(5, kind_layers=(1, 2, 4)))
    assert [run.label() for run in neighbours.valid_changes(5)] == ["layers 1–2", "layers 2, 4"]


def test_spans_of_a_kind_refuse_other_components():
    """Was: spans of other components, and stretches, went without a word."""
    parts = ModelParts(8, kind_layers=(0, 1, 3))
    for settings in ({"interventions": ("remove", "repeat")}, {"components": ("layer", "mlp")}):
        with pytest.raises(ExperimentError, match="in a separate file"):
            fill_parts(request(layers=(), spans=(1, 2), **settings), parts)


def test_a_study_of_single_layers_leaves_sets_and_controls_out():
    """Was: they were measured with the layers that it asked for."""
    parts = ModelParts(6, kind_layers=(0, 2, 4))
    filled_request = fill_parts(request(layers=(), spans=(1, 2), control="random"), parts)
    assert {change.drawn for change in filled_request.changes.expand()} == {False, True}
    single_request = filled_request.with_changes(layers=filled_request.changes.layers)
    assert [run.layers for run in single_request.valid_changes(6)] == [(0,), (2,), (4,)]
    assert fill_parts(single_request, ModelParts(6)) == single_request


def test_controls_differ_from_the_spans():
    cell_request = request(layers=(), spans=(2,), control="random", removed=(0,))
    filled_request = fill_parts(cell_request, ModelParts(5))
    runs = filled_request.valid_changes(5)
    # Of the six pairs of four layers three are spans.
    assert [run.layers for run in runs if not run.drawn] == [(1, 2), (2, 3), (3, 4)]
    assert {run.layers for run in runs if run.drawn} == {(1, 3), (1, 4), (2, 4)}
