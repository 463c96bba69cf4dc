"""Forks of layers made by hand, in every way that a layer is called and answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.engines import Output
from tracker.core.changes import INTACT, Ablation
from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import LayerStep, StreamPlan, plan_streams
from tracker.engine.refusal import RefusalError
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers

ROWS, TOKENS, WIDTH, HEADS = 2, 3, 4, 5
ABLATIONS = [
    Ablation.parse("layer:0"),
    Ablation.parse("attention:1"),
    INTACT,
    Ablation.parse("mlp:1"),
    Ablation.parse("layers:1,2"),
    Ablation.parse("layer:1+mlp:2"),
    Ablation.parse("attention:2"),
    Ablation.parse("layer:2"),
]


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
    ) -> Output:
        mixed = hidden_states.cumsum(1) * self.weight * scale + shift
        if alibi is not None:
            # A row a text and a head.
            assert alibi.shape[1:] == (1, TOKENS)
            mixed = mixed + alibi.view(len(mixed), -1, TOKENS).sum(1)[..., None]
        if rotary is not None:
            mixed = mixed * rotary[0] + rotary[1]["sin"]
        return Output(mixed, "weights")


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
    """A layer; `silent` names the sublayer that adds nothing."""

    def __init__(self, number: int, answer: type, named: bool, adding: bool) -> None:
        super().__init__()
        self.attention = Mixing(number)
        self.mlp = Adding(number) if adding else Plain(number)
        self.answer, self.named, self.adding = answer, named, adding
        self.silent = ""
        self.extra: Any = torch.full((1,), float(number))

    def forward(self, hidden_states: Tensor, *besides: Any, **named: Any) -> Any:
        called = {"hidden_states": hidden_states} if self.named else {}
        given = () if self.named else (hidden_states,)
        if self.named and besides:
            named = {**named, "shift": besides[0]}
            besides = ()
        attended = self.attention(*given, *besides, **called, **named)
        assert attended.weights == "weights"
        mixed = attended.state
        middle = hidden_states if self.silent == "attention" else hidden_states + mixed
        if self.silent == "mlp":
            after = middle
        elif self.adding:
            after = self.mlp(middle, residual=middle)
        else:
            after = middle + (self.mlp(hidden_states=middle) if self.named else self.mlp(middle))
        if self.answer is Named:
            return Named(after, self.extra)
        return after if self.answer is Tensor else self.answer((after, self.extra))


def make(answer: type = Tensor, named: bool = False, adding: bool = False) -> nn.ModuleList:
    return nn.ModuleList(Layer(number, answer, named, adding) for number in range(3))


def run(layers: Sequence[Any], hidden: Tensor, named: bool, *args: Any, **kwargs: Any) -> Tensor:
    """Apply layers as a model's forward pass does."""
    for layer in layers:
        given = {"hidden_states": hidden, **kwargs} if named else kwargs
        output = layer(*args, **given) if named else layer(hidden, *args, **given)
        if isinstance(output, Named):
            hidden = output.state
        else:
            hidden = output[0] if type(output) in (tuple, list) else output
    return hidden


def without(layers: nn.ModuleList, ablation: Ablation, *given: Any, **kwargs: Any) -> Tensor:
    """Compute the same one ablation at a time, by leaving layers out."""
    for number, layer in enumerate(layers):
        layer.silent = "attention" if number in ablation.removed("attention") else ""
        layer.silent = "mlp" if number in ablation.removed("mlp") else layer.silent
    left = [layer for number, layer in enumerate(layers) if number not in ablation.removed()]
    found = run(left, *given, **kwargs)
    for layer in layers:
        layer.silent = ""
    return found


def parts(layers: nn.ModuleList) -> LayerAnatomy:
    sublayers = [Sublayers(layer.attention, layer.mlp) for layer in layers]
    return LayerAnatomy(None, layers, torch.device("cpu"), parts={Sublayers: sublayers})


def hidden_states() -> Tensor:
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def agree(
    found: Tensor,
    plan: StreamPlan,
    ablations: Sequence[Ablation],
    expected: Callable[[Ablation], Tensor],
) -> None:
    """Compare each stream behind the last layer with what is expected of its ablation."""
    assert len(found) == plan.streams * ROWS
    streams = found.unflatten(0, (plan.streams, ROWS))
    for ablation, stream in zip(ablations, plan.stream_of, strict=True):
        torch.testing.assert_close(streams[stream], expected(ablation))


BESIDES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a row a text, as the hidden states": {"shift": hidden_states() * 2},
    "what broadcasts": {"scale": torch.arange(TOKENS, dtype=torch.float32)[None, :, None]},
    "one number": {"scale": torch.tensor(2.0), "shift": 0.25},
    "a row a head": {
        "alibi": torch.randn(ROWS * HEADS, 1, TOKENS, generator=torch.Generator().manual_seed(2))
    },
}


@pytest.mark.parametrize("besides", BESIDES)
@pytest.mark.parametrize("answer", [Tensor, tuple, list, Named])
@pytest.mark.parametrize(("named", "adding"), [(True, False), (False, True), (False, False)])
def test_every_stream_is_the_model_without(besides, answer, named, adding) -> None:
    layers, hidden, kwargs = make(answer, named, adding), hidden_states(), BESIDES[besides]
    some = (ABLATIONS, ABLATIONS[::-1], [INTACT, ABLATIONS[0]], ABLATIONS[1:3], [INTACT])
    for ablations, at_once in itertools.product(some, (None, 1, 2)):
        plan = plan_streams(ablations, 3)
        with ForwardPass(layers, plan, parts(layers), at_once=at_once).installed():
            found = run(layers, hidden, named, **kwargs)
        agree(found, plan, ablations, lambda a: without(layers, a, hidden, named, **kwargs))


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
    ablations = [
        INTACT,
        Ablation.parse("layer:1"),
        Ablation.parse("layer:0"),
        Ablation.parse("layers:1,2"),
    ]
    seen: list[tuple[int, Tensor, Tensor]] = []

    def left(ablation: Ablation) -> Tensor:
        some = [layer for number, layer in enumerate(layers) if number not in ablation.removed()]
        return run(some, hidden_states(), named)

    for ways, at_once in itertools.product((ablations, ablations[:1]), (None, 1)):
        plan, hidden = plan_streams(ways, 3), hidden_states()
        for _ in range(2):
            seen.clear()
            observing = ForwardPass(
                layers, plan, observe=lambda *what: seen.append(what), at_once=at_once
            ).installed()
            with torch.inference_mode(), observing:
                found = run(layers, hidden, named)
            assert torch.equal(hidden, hidden_states())
            for number, before, after in seen:
                state = run(layers[:number], hidden_states(), named)
                torch.testing.assert_close(before, state)
                torch.testing.assert_close(after, layers[number](state.clone()))
            agree(found, plan, ways, left)


def test_no_more_streams_than_may_pass_a_layer_at_once() -> None:
    layers, sizes = make(), []
    honest = layers[2].forward
    layers[2].forward = lambda state: (sizes.append(len(state) // ROWS), honest(state))[1]
    pairs = [
        Ablation.of(removed=some) for n in (1, 2) for some in itertools.combinations((0, 1), n)
    ]
    without_mlp = Ablation.parse("mlp:2")
    for ablations, expected in (
        ([INTACT, *pairs], [2, 2]),
        # The baseline and its fork are taken apart for, and the others pass the layer as it is.
        ([INTACT, *pairs, without_mlp], [2, 2, 1]),
    ):
        sizes.clear()
        with ForwardPass(layers, plan_streams(ablations, 3), parts(layers), at_once=2).installed():
            run(layers, hidden_states(), False)
        assert sizes == expected


def test_what_has_a_row_a_stream_is_cut_to_those_that_enter() -> None:
    """As while texts are generated: each stream is a text with positions of its own."""
    layers, count = make(), len(ABLATIONS)
    steps = [LayerStep(count, (), tuple(a.at(layer) for a in ABLATIONS)) for layer in range(3)]
    plan = StreamPlan(tuple(steps), (tuple(range(count)),) * 3)
    hidden, shift, cos, sin = torch.randn(
        4, count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)
    )
    alibi = shift[:, :1, :TOKENS]
    with ForwardPass(layers, plan, parts(layers), batched=True).installed():
        given = {"scale": torch.tensor(2.0), "alibi": alibi, "rotary": (cos, {"sin": sin})}
        streams = run(layers, hidden, False, shift, **given)
    for place, ablation in enumerate(ABLATIONS):
        one = slice(place, place + 1)
        given |= {"alibi": alibi[one], "rotary": (cos[one], {"sin": sin[one]})}
        expected = without(layers, ablation, hidden[one], False, shift[one], **given)
        torch.testing.assert_close(streams[one], expected)


class TestRefusals:
    PLAN = plan_streams([INTACT, Ablation.parse("layer:0"), Ablation.parse("layer:1")], 3)

    def test_a_batch_that_changes_between_layers(self) -> None:
        layers = make()
        said = "^something between its layers changes the batch$"
        with ForwardPass(layers, self.PLAN).installed(), pytest.raises(RefusalError, match=said):
            layers[1](layers[0](hidden_states())[:3])

    @pytest.mark.parametrize("answer", [lambda hidden: hidden[:, 1:], lambda hidden: "nothing"])
    @pytest.mark.parametrize("several", [True, False])
    def test_a_layer_that_returns_something_else(self, answer: Any, several: bool) -> None:
        layers = make()
        layers[1].forward = lambda hidden: (answer(hidden), 1) if several else answer(hidden)
        said = "^layer 1 returns something else than a hidden state of the shape that it was given$"
        with ForwardPass(layers, self.PLAN).installed(), pytest.raises(RefusalError, match=said):
            run(layers, hidden_states(), False)

    @pytest.mark.parametrize("named", [False, True])
    def test_layers_that_hand_on_more_than_the_hidden_state(self, named: bool) -> None:
        layers = make(tuple)
        layers[0].extra = torch.ones(1)
        said = "^its layers hand more to each other than the hidden state$"
        for plan in (self.PLAN, plan_streams([INTACT, Ablation.parse("layer:1")], 3)):
            with ForwardPass(layers, plan).installed():
                hidden, more = layers[0](hidden_states())
                by_name: dict[str, Any] = {"shift": more} if named else {}
                with pytest.raises(RefusalError, match=said):
                    layers[1](hidden, *(() if named else (more,)), **by_name)
                # Another pass begins: what the last one left is no matter.
                layers[1](layers[0](hidden_states(), more)[0])

    def test_with_one_stream_nothing_is_forked(self) -> None:
        layers = make(tuple)
        with ForwardPass(layers, plan_streams([INTACT, Ablation.parse("layer:2")], 3)).installed():
            hidden, more = layers[0](hidden_states())
            layers[1](hidden, more)
