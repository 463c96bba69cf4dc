"""Forks of layers made by hand, in every way that a layer is called and answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ablations import parse_ablations
from tests.helpers.engines import LayerOutput
from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import LayerStep, StreamPlan, plan_streams
from tracker.engine.refusal import RefusalError
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers
from tracker.schema.changes import INTACT, Ablation

ROWS, TOKENS, WIDTH, HEADS = 2, 3, 4, 5
ABLATIONS = parse_ablations(
    "layer:0 attention:1 baseline mlp:1 layers:1,2 layer:1+mlp:2 attention:2 layer:2"
)


class Named(NamedTuple):
    """A short form of the output of Reformer's layers."""

    state: Tensor
    extra: Any


class Mixing(nn.Module):
    """Mixes tokens, and takes what layers of several families are given besides."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = 0.5 + number

    def forward(
        self,
        hidden_states: Tensor,
        shift: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        alibi: Tensor | None = None,
        rotary: tuple[Tensor, dict[str, Tensor]] | None = None,
    ) -> LayerOutput:
        output = hidden_states.cumsum(1) * self.weight * scale + shift
        if alibi is not None:
            # A row a text and a head.
            assert alibi.shape[1:] == (1, TOKENS)
            output = output + alibi.view(len(output), -1, TOKENS).sum(1)[..., None]
        if rotary is not None:
            output = output * rotary[0] + rotary[1]["sin"]
        return LayerOutput(output, "weights")


class Plain(nn.Module):
    """An MLP that leaves the adding to the layer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.sin(hidden_states + self.number)


class Adding(Plain):
    """An MLP that adds to the residual stream itself, as Bloom's does."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return residual + super().forward(hidden_states)


class Layer(nn.Module):
    """A layer; `silent_sublayer` names the sublayer that adds nothing."""

    def __init__(self, number: int, output_type: type, is_named: bool, is_adding: bool) -> None:
        super().__init__()
        self.attention = Mixing(number)
        self.mlp = Adding(number) if is_adding else Plain(number)
        self.output_type, self.is_named, self.is_adding = output_type, is_named, is_adding
        self.silent_sublayer = ""
        self.extra: Any = torch.full((1,), float(number))

    def forward(self, hidden_states: Tensor, *extra_args: Any, **named_args: Any) -> Any:
        state_kwargs = {"hidden_states": hidden_states} if self.is_named else {}
        state_args = () if self.is_named else (hidden_states,)
        if self.is_named and extra_args:
            named_args = {**named_args, "shift": extra_args[0]}
            extra_args = ()
        attention_output = self.attention(*state_args, *extra_args, **state_kwargs, **named_args)
        assert attention_output.weights == "weights"
        state = attention_output.state
        middle = hidden_states if self.silent_sublayer == "attention" else hidden_states + state
        if self.silent_sublayer == "mlp":
            output = middle
        elif self.is_adding:
            output = self.mlp(middle, residual=middle)
        else:
            output = middle + (
                self.mlp(hidden_states=middle) if self.is_named else self.mlp(middle)
            )
        if self.output_type is Named:
            return Named(output, self.extra)
        return output if self.output_type is Tensor else self.output_type((output, self.extra))


def make_layers(
    output_type: type = Tensor, is_named: bool = False, is_adding: bool = False
) -> nn.ModuleList:
    return nn.ModuleList(Layer(number, output_type, is_named, is_adding) for number in range(3))


def run_layers(
    layers: Sequence[Any], hidden: Tensor, is_named: bool, *args: Any, **kwargs: Any
) -> Tensor:
    """Apply layers as a model's forward pass does."""
    for layer in layers:
        layer_kwargs = {"hidden_states": hidden, **kwargs} if is_named else kwargs
        output = layer(*args, **layer_kwargs) if is_named else layer(hidden, *args, **layer_kwargs)
        if isinstance(output, Named):
            hidden = output.state
        else:
            hidden = output[0] if type(output) in (tuple, list) else output
    return hidden


def run_ablated(layers: nn.ModuleList, ablation: Ablation, *run_args: Any, **kwargs: Any) -> Tensor:
    """Compute the same one ablation at a time, by leaving layers out."""
    for number, layer in enumerate(layers):
        layer.silent_sublayer = "attention" if number in ablation.removed("attention") else ""
        if number in ablation.removed("mlp"):
            layer.silent_sublayer = "mlp"
    kept_layers = [layer for n, layer in enumerate(layers) if n not in ablation.removed()]
    output = run_layers(kept_layers, *run_args, **kwargs)
    for layer in layers:
        layer.silent_sublayer = ""
    return output


def make_anatomy(layers: nn.ModuleList) -> LayerAnatomy:
    sublayers = [Sublayers(layer.attention, layer.mlp) for layer in layers]
    return LayerAnatomy(None, layers, torch.device("cpu"), parts={Sublayers: sublayers})


def hidden_states() -> Tensor:
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def check_streams(
    states: Tensor,
    plan: StreamPlan,
    ablations: Sequence[Ablation],
    expected: Callable[[Ablation], Tensor],
) -> None:
    """Compare each stream behind the last layer with what is expected of its ablation."""
    assert len(states) == plan.n_streams * ROWS
    streams = states.unflatten(0, (plan.n_streams, ROWS))
    for ablation, stream in zip(ablations, plan.final_streams, strict=True):
        torch.testing.assert_close(streams[stream], expected(ablation))


EXTRA_INPUTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a row a text, as the hidden states": {"shift": hidden_states() * 2},
    "what broadcasts": {"scale": torch.arange(TOKENS, dtype=torch.float32)[None, :, None]},
    "one number": {"scale": torch.tensor(2.0), "shift": 0.25},
    "a row a head": {
        "alibi": torch.randn(ROWS * HEADS, 1, TOKENS, generator=torch.Generator().manual_seed(2))
    },
}


@pytest.mark.parametrize("extra_inputs", EXTRA_INPUTS)
@pytest.mark.parametrize("answer", [Tensor, tuple, list, Named])
@pytest.mark.parametrize(("named", "adding"), [(True, False), (False, True), (False, False)])
def test_every_stream_is_the_model_without(extra_inputs, answer, named, adding) -> None:
    layers = make_layers(answer, named, adding)
    hidden = hidden_states()
    kwargs = EXTRA_INPUTS[extra_inputs]
    ablation_lists = (ABLATIONS, ABLATIONS[::-1], [INTACT, ABLATIONS[0]], ABLATIONS[1:3], [INTACT])
    for ablations, at_once in itertools.product(ablation_lists, (None, 1, 2)):
        plan = plan_streams(ablations, 3)
        with ForwardPass(layers, plan, make_anatomy(layers), max_streams=at_once).install():
            states = run_layers(layers, hidden, named, **kwargs)
        check_streams(
            states, plan, ablations, lambda a: run_ablated(layers, a, hidden, named, **kwargs)
        )


class InPlace(nn.Module):
    """Adds to the residual stream in place, as much remote code does."""

    def __init__(self, number: int, returns_it: bool) -> None:
        super().__init__()
        self.number, self.returns_it = number, returns_it

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states += torch.sin(hidden_states + self.number)
        return hidden_states if self.returns_it else 1.0 * hidden_states


@pytest.mark.parametrize("returns_it", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_layer_that_writes_into_its_input_gets_a_copy(returns_it: bool, named: bool) -> None:
    layers = nn.ModuleList(InPlace(number, returns_it) for number in range(3))
    ablations = parse_ablations("baseline layer:1 layer:0 layers:1,2")
    layer_calls: list[tuple[int, Tensor, Tensor]] = []

    def run_remaining(ablation: Ablation) -> Tensor:
        remaining_layers = [layer for n, layer in enumerate(layers) if n not in ablation.removed()]
        return run_layers(remaining_layers, hidden_states(), named)

    for used_ablations, at_once in itertools.product((ablations, ablations[:1]), (None, 1)):
        plan, hidden = plan_streams(used_ablations, 3), hidden_states()
        for _ in range(2):
            layer_calls.clear()
            observing = ForwardPass(
                layers, plan, observe=lambda *call: layer_calls.append(call), max_streams=at_once
            ).install()
            with torch.inference_mode(), observing:
                states = run_layers(layers, hidden, named)
            assert torch.equal(hidden, hidden_states())
            for number, layer_input, layer_output in layer_calls:
                state = run_layers(layers[:number], hidden_states(), named)
                torch.testing.assert_close(layer_input, state)
                torch.testing.assert_close(layer_output, layers[number](state.clone()))
            check_streams(states, plan, used_ablations, run_remaining)


def test_no_more_streams_than_may_pass_a_layer_at_once() -> None:
    layers, sizes = make_layers(), []
    original_forward = layers[2].forward
    layers[2].forward = lambda state: (sizes.append(len(state) // ROWS), original_forward(state))[1]
    layer_ablations = [
        Ablation.from_changes(removed=removed_layers)
        for n in (1, 2)
        for removed_layers in itertools.combinations((0, 1), n)
    ]
    without_mlp = Ablation.parse("mlp:2")
    for ablations, expected in (
        ([INTACT, *layer_ablations], [2, 2]),
        # The baseline and its fork are taken apart for, and the others pass the layer as it is.
        ([INTACT, *layer_ablations, without_mlp], [2, 2, 1]),
    ):
        sizes.clear()
        with ForwardPass(
            layers, plan_streams(ablations, 3), make_anatomy(layers), max_streams=2
        ).install():
            run_layers(layers, hidden_states(), False)
        assert sizes == expected


def test_what_has_a_row_a_stream_is_cut_to_those_that_enter() -> None:
    """As while texts are generated: each stream is a text with positions of its own."""
    layers, n_streams = make_layers(), len(ABLATIONS)
    steps = [LayerStep(n_streams, (), tuple(a.at_layer(n) for a in ABLATIONS)) for n in range(3)]
    plan = StreamPlan(tuple(steps), (tuple(range(n_streams)),) * 3)
    hidden, shift, cos, sin = torch.randn(
        4, n_streams, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)
    )
    alibi = shift[:, :1, :TOKENS]
    with ForwardPass(layers, plan, make_anatomy(layers), batched=True).install():
        layer_kwargs = {"scale": torch.tensor(2.0), "alibi": alibi, "rotary": (cos, {"sin": sin})}
        streams = run_layers(layers, hidden, False, shift, **layer_kwargs)
    for index, ablation in enumerate(ABLATIONS):
        row = slice(index, index + 1)
        layer_kwargs |= {"alibi": alibi[row], "rotary": (cos[row], {"sin": sin[row]})}
        expected = run_ablated(layers, ablation, hidden[row], False, shift[row], **layer_kwargs)
        torch.testing.assert_close(streams[row], expected)


class TestRefusals:
    PLAN = plan_streams([INTACT, Ablation.parse("layer:0"), Ablation.parse("layer:1")], 3)

    def test_a_batch_that_changes_between_layers(self) -> None:
        layers = make_layers()
        message = "^the model changes the batch size between its layers$"
        with ForwardPass(layers, self.PLAN).install(), pytest.raises(RefusalError, match=message):
            layers[1](layers[0](hidden_states())[:3])

    @pytest.mark.parametrize("answer", [lambda hidden: hidden[:, 1:], lambda hidden: "nothing"])
    @pytest.mark.parametrize("several", [True, False])
    def test_a_layer_that_returns_something_else(self, answer: Any, several: bool) -> None:
        layers = make_layers()
        layers[1].forward = lambda hidden: (answer(hidden), 1) if several else answer(hidden)
        message = "^layer 1 does not return a state shaped like its input$"
        with ForwardPass(layers, self.PLAN).install(), pytest.raises(RefusalError, match=message):
            run_layers(layers, hidden_states(), False)

    @pytest.mark.parametrize("named", [False, True])
    def test_layers_that_hand_on_more_than_the_hidden_state(self, named: bool) -> None:
        layers = make_layers(tuple)
        layers[0].extra = torch.ones(1)
        message = "^a layer passes more than the hidden state to the next layer$"
        for plan in (self.PLAN, plan_streams([INTACT, Ablation.parse("layer:1")], 3)):
            with ForwardPass(layers, plan).install():
                hidden, extra_output = layers[0](hidden_states())
                layer_kwargs: dict[str, Any] = {"shift": extra_output} if named else {}
                with pytest.raises(RefusalError, match=message):
                    layers[1](hidden, *(() if named else (extra_output,)), **layer_kwargs)
                # Another pass begins: what the last one left is no matter.
                layers[1](layers[0](hidden_states(), extra_output)[0])

    def test_with_one_stream_nothing_is_forked(self) -> None:
        layers = make_layers(tuple)
        with ForwardPass(layers, plan_streams([INTACT, Ablation.parse("layer:2")], 3)).install():
            hidden, extra_output = layers[0](hidden_states())
            layers[1](hidden, extra_output)
