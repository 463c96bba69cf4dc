"""A transformer whose least conspicuous layer decides everything: the paper's theorem, built.

For any texts that are to be continued, any ε and five layers of Llama: layer 2 has the cosine score
ε, the lowest of all; the model continues each text as it should; without layer 2 each continuation
is the opposite of what it should be. Nothing is trained: the weights are written down.

A token's state holds a constant (1), junk (8) that no prediction reads, and all else in dimensions
of its own, a thousand times smaller, so that every state has the same length and each norm divides
by the same number.

| layer | its job | cosine score |
|---|---|---|
| 0 reads | attention leaves at each place a signature of the text so far: mixtures of the tokens' random codes, weighted by how far back they stand, each head with a curve of distance of its own; the MLP adds the signature's squared length | ≈ 1 |
| 1 recalls | its MLP has two units for each text that is to be continued, which open where the signature is no further from its own than rounding, and say what follows: some of it for certain, some of it under a sign | ≈ 1 |
| 2 whispers | adds the same tiny number to every token, in a dimension that is empty otherwise | ε |
| 3 amplifies | is there a whisper? Then it writes 1, a thousand and more times as much; else nothing | ≈ 1 |
| 4 speaks | multiplies what was recalled under a sign by +1 where layer 3 wrote, by -1 where it did not, and hands it to the head | ≈ 1 |

All but layer 2 rewrite the junk, from one dimension into another, which is why they look important
(the paper's second ingredient). Layers 3 and 4 make of a change by √(2ε) of the state's length one
that turns the answer around (its first, the snowball). Remove layer 2 and the sign is -1 everywhere.

It is long because what each layer does is said beside the weights that do it.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.core.errors import CellError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS = 5
READ, RECALL, WHISPER, AMPLIFY, SPEAK = range(LAYERS)
JOBS = (
    "reads: a signature of the text so far",
    "recalls what follows, under a sign",
    "whispers: one tiny number, always the same",
    "amplifies the whisper",
    "speaks, and reverses what it says where nobody whispered",
)
SMALLEST, LARGEST = 1e-9, 0.3
"""Of ε: below, 1 - ε in float64 does not hold it to 1e-6; above, it is not the lowest score."""
CODES = (64, 128, 256)
"""Dimensions of a token's code, tried in turn until all signatures are told apart."""
HEAD = 16
"""Dimensions of a code that one head mixes."""
THETA = 100.0
"""Of the rotary embedding: the slowest of eight frequencies turns once in 350 tokens."""
JUNK, FAINT, TINY = 8.0, 1e-3, 1e-5
"""Sizes in the state: what no prediction reads, what layers tell each other, a token's own code."""
SURE = 30.0
"""A gate's input is this where it is open, and minus this where it is shut: silu(-30) is -3e-12."""
STEP = 4.0
"""By how much less the second unit of a memory gets: the difference of both is a flat step."""
APART = 2e-5
"""Gap between what a detector reads of its own signature and of the nearest other one, of the
reading: two hundred times float32's rounding."""
SOME = 64
"""Tokens of a text on which constants are read off."""

Place = bytes
"""A text up to some token, by a digest."""


def places(tokens: Sequence[int]) -> Iterator[Place]:
    """Name a text up to each of its tokens, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for token in tokens:
        digest.update(token.to_bytes(8, "little"))
        yield digest.digest()


@dataclass(frozen=True)
class Text:
    """What the model reads: its tokens, of which the last `scored` predict something."""

    tokens: tuple[int, ...]
    scored: int


@dataclass
class Wanted:
    """What is to follow at a place: token → 1 (this one), 0 (no matter) or -1 (not this one).

    Attributes:
        signed: With layer 2; without it the opposite.
        fixed: With and without it.
    """

    signed: dict[int, int] = field(default_factory=dict)
    fixed: dict[int, int] = field(default_factory=dict)


def hollow(
    vocabulary: int, length: int, size: int = CODES[0], width: int = 16, units: int = 1
) -> Any:
    """Make the Llama without its weights, which says how a tokenizer is used with it.

    Args:
        vocabulary: How many tokens there are.
        length: How many tokens it reads at most.
        size: Dimensions of a token's code.
        width: Its hidden size.
        units: Of each MLP.

    Returns:
        A `LlamaForCausalLM` on the meta device.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=units,
        num_hidden_layers=LAYERS,
        num_attention_heads=size // HEAD,
        head_dim=HEAD,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


class Counterexample:
    """The transformer, taught some texts; `whispering` gives it an ε.

    Args:
        texts: All texts that it will be asked to continue.
        wanted: What is to follow at some of their places; at all others anything is as likely.
        certainty: By how many nats a wanted token comes before one that is no matter, at least.
        vocabulary: How many tokens there are.
        length: How many tokens it reads at most.

    Raises:
        CellError: Some places cannot be told apart; says how many.

    Attributes:
        model: A `LlamaForCausalLM` in float32.
        width: Its hidden size.
        places: How many places it remembers.
    """

    model: PreTrainedModel

    def __init__(
        self,
        texts: Sequence[Text],
        wanted: Mapping[Place, Wanted],
        certainty: float,
        vocabulary: int,
        length: int,
    ) -> None:
        self.places = len(wanted)
        self._certainty = certainty
        blurred = 0
        for size in CODES:
            self._lay_out(size)
            self._make(vocabulary, length)
            with torch.inference_mode():
                self._read()
                blurred = self._recall(texts, wanted)
            if not blurred:
                return
        raise CellError(
            f"{blurred} of {self.places} places in the texts look like others to a model "
            f"{self.width} wide"
        )

    @torch.inference_mode()
    def whispering(self, epsilon: float) -> Any:
        """Give layer 2 the cosine score ε, and later layers the ear for it.

        Args:
            epsilon: Between `SMALLEST` and `LARGEST`.

        Returns:
            The model, whose weights the next call changes.
        """
        for layer in range(WHISPER, LAYERS):
            for weight in self._mlp(layer).parameters():
                weight.zero_()
        size = self._state(WHISPER).norm() * math.sqrt(epsilon * (2 - epsilon)) / (1 - epsilon)
        self._write(WHISPER, 0, self._bit, size)
        self._amplify()
        self._speak()
        return self.model

    def _lay_out(self, size: int) -> None:
        """Give every part of the state its dimensions."""
        self._size = size
        self._constant, self._bit, self._sign, self._length, first, second = range(6)
        self._junk = (first, second)
        self._code, self._signature, self._signed, self._fixed = (
            slice(6 + part * size, 6 + (part + 1) * size) for part in range(4)
        )
        self.width = math.ceil((6 + 4 * size) / 16) * 16

    def _make(self, vocabulary: int, length: int) -> None:
        """Make a Llama whose layers do nothing, with an embedding of random signs."""
        memories = max(2 * self.places, 3 * self._size)
        model = hollow(vocabulary, length, self._size, self.width, memories + 1)
        self.model = model.to_empty(device="cpu").float().eval().requires_grad_(False)
        self.model.tie_weights()
        for name, weight in self.model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (vocabulary, self._size), generator=draw) * 2.0 - 1
        table = self.model.get_input_embeddings().weight
        table[:, self._constant] = 1
        table[:, self._junk[0]] = JUNK
        table[:, self._code] = TINY * signs / self._size**0.5
        # The head is the same table; it reads the codes alone.
        self.model.model.norm.weight.zero_()

    def _read(self) -> None:
        """Layer 0: queries and keys come from the constant, so only distance decides.

        Its MLP adds the squared length of the signature: silu(x)·x + silu(-x)·(-x) is x².
        """
        attention = self.model.model.layers[READ].self_attn
        draw = torch.Generator().manual_seed(1)
        one = self._normed(READ)[self._constant]
        for projection in (attention.q_proj, attention.k_proj):
            curve = torch.randn(len(projection.weight), generator=draw)
            projection.weight[:, self._constant] = curve / one
        every = torch.eye(self._size)
        attention.v_proj.weight[:, self._code] = every / one
        attention.o_proj.weight[self._signature, :] = every * (FAINT / TINY)
        mlp, scale = self._mlp(READ), every / (FAINT * one)
        for number, sign in enumerate((1, -1)):
            units = slice(number * self._size, (number + 1) * self._size)
            mlp.gate_proj.weight[units, self._signature] = sign * scale
            mlp.up_proj.weight[units, self._signature] = sign * scale
            mlp.down_proj.weight[self._length, units] = FAINT
        self._rewrite_junk(READ)

    def _recall(self, texts: Sequence[Text], wanted: Mapping[Place, Wanted]) -> int:
        """Layer 1: two units a place. Returns how many places look like others."""
        names, seen = self._signatures(texts)
        own = torch.tensor([names[place] for place in wanted])
        mine, gaps = _gaps(seen, own)
        blurred = int((gaps < 0).sum())
        if blurred:
            return blurred
        mlp, one = self._mlp(RECALL), self._normed(RECALL)[self._constant]
        codes = self.model.get_input_embeddings().weight[:, self._code].double() / TINY
        some = wanted.values()
        signed = torch.stack([_code_of(each.signed, each.fixed, codes) for each in some])
        fixed = torch.stack([_code_of(each.fixed, each.signed, codes) for each in some])
        gain = 2 * SURE / gaps
        for second in (False, True):
            units = slice(int(second), 2 * self.places, 2)
            shut = gain * (mine - gaps / 2) + STEP * second
            gate = mlp.gate_proj.weight
            gate[units, self._signature] = (
                2 * gain[:, None] * seen[own, :-1] / FAINT / one
            ).float()
            gate[units, self._length] = (-gain / FAINT / one).float()
            gate[units, self._constant] = (-shut / one).float()
            mlp.up_proj.weight[units, self._constant] = 1 / one
            worth = (-FAINT if second else FAINT) / STEP
            mlp.down_proj.weight[self._signed, units] = (worth * signed.T).float()
            mlp.down_proj.weight[self._fixed, units] = (worth * fixed.T).float()
        self._rewrite_junk(RECALL)
        return 0

    def _signatures(self, texts: Sequence[Text]) -> tuple[dict[Place, int], Tensor]:
        """Read all texts: place → row, and the signatures [places, size + 1], as `_gaps` takes."""
        layer = self.model.model.layers[RECALL]
        names: dict[Place, int] = {}
        rows = []
        scale = FAINT * self._normed(RECALL)[self._constant]
        for text in texts:
            first = len(text.tokens) - text.scored
            new = {
                place: number
                for number, place in enumerate(places(text.tokens))
                if number >= first and place not in names
            }
            if not new:
                continue
            state = self._run(text.tokens, RECALL)[list(new.values())]
            names |= {place: len(names) + number for number, place in enumerate(new)}
            state = layer.post_attention_layernorm(state).double() / scale
            rows.append(torch.cat([state[:, self._signature], state[:, self._length, None]], 1))
        return names, torch.cat(rows)

    def _amplify(self) -> None:
        """Layer 3: one unit that opens where layer 2 whispered."""
        state = self._normed(AMPLIFY)
        one, heard = state[self._constant], state[self._bit]
        self._open(AMPLIFY, 0, 2 * SURE / heard, self._bit, -SURE / one)
        self._mlp(AMPLIFY).up_proj.weight[0, self._constant] = 1 / one
        self._mlp(AMPLIFY).down_proj.weight[self._sign, 0] = 1 / SURE
        self._rewrite_junk(AMPLIFY)

    def _speak(self) -> None:
        """Layer 4: a gate of SwiGLU multiplies, so three sets of units hand on what was recalled.

        Those with a sign where layer 3 wrote, their opposite where it did not, and those without.
        """
        state, mlp = self._normed(SPEAK), self._mlp(SPEAK)
        one, sign = state[self._constant], state[self._sign]
        length = self._state(SPEAK).norm()
        size, root = self._size, math.sqrt(self.width)
        for number, (heard, constant, source, worth) in enumerate(
            (
                (2 * SURE / sign, -SURE / one, self._signed, 1),
                (-2 * SURE / sign, SURE / one, self._signed, -1),
                (0, SURE / one, self._fixed, 1),
            )
        ):
            units = slice(number * size, (number + 1) * size)
            self._open(SPEAK, units, heard, self._sign, constant)
            mlp.up_proj.weight[units, source] = torch.eye(size)
            volume = worth * length / (FAINT * root * SURE)
            mlp.down_proj.weight[self._code, units] = volume * torch.eye(size)
        self._rewrite_junk(SPEAK)
        # What is said makes the state longer, and a loud whisper that is gone all constants larger
        # than they were meant: both make it less, four times at the most.
        self.model.model.norm.weight[self._code] = 4 * self._certainty * length / (root * TINY)

    def _open(
        self,
        layer: int,
        units: slice | int,
        weight: Any,
        place: int,
        constant: Any,
    ) -> None:
        gate = self._mlp(layer).gate_proj.weight
        gate[units, place] = weight
        gate[units, self._constant] = constant

    def _rewrite_junk(self, layer: int) -> None:
        """Move the junk into the other of its two dimensions, by the last unit of the MLP."""
        here, there = self._junk if layer in (READ, AMPLIFY) else self._junk[::-1]
        self._write(layer, -1, here, -JUNK)
        down = self._mlp(layer).down_proj.weight
        down[there, -1] = -down[here, -1]

    def _write(self, layer: int, unit: int, place: int, size: Tensor | float) -> None:
        """Let a unit add the same number to every token."""
        mlp, one = self._mlp(layer), self._normed(layer)[self._constant]
        mlp.gate_proj.weight[unit, self._constant] = SURE / one
        mlp.up_proj.weight[unit, self._constant] = 1 / one
        mlp.down_proj.weight[place, unit] = size / SURE

    def _mlp(self, layer: int) -> Any:
        return self.model.model.layers[layer].mlp

    def _run(self, tokens: Sequence[int], layers: int) -> Tensor:
        """Read a text with the first layers: states [tokens, width]."""
        base = self.model.model
        whole, norm = base.layers, base.norm
        base.layers, base.norm = whole[:layers], nn.Identity()
        try:
            found: Tensor = base(torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]
        finally:
            base.layers, base.norm = whole, norm
        return found

    def _state(self, layer: int) -> Tensor:
        """What enters a layer: but for what is faint, the same state everywhere."""
        return self._run(range(SOME), layer).mean(0)

    def _normed(self, layer: int) -> Tensor:
        """The same as its MLP sees it; attention adds something faint at most."""
        norm = self.model.model.layers[layer].post_attention_layernorm
        normed: Tensor = norm(self._state(layer)[None])[0]
        return normed


def _gaps(seen: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Find by how much a signature comes before the nearest other one, read by its own detector.

    A detector reads 2 u·v - ‖v‖², which is ‖u‖² - ‖u - v‖²: nothing reads as much as u itself.

    Args:
        seen: All signatures, and behind each the squared length that the model found
            [n, size + 1].
        own: Which ones have detectors [k].

    Returns:
        What each detector reads of its own signature [k], and the gaps to the next reading [k], -1
        where rounding might close one.
    """
    detectors = torch.cat([2 * seen[own, :-1], -torch.ones(len(own), 1, dtype=seen.dtype)], dim=1)
    mine = (detectors * seen[own]).sum(1)
    highest = torch.zeros_like(mine)  # what is read of nothing, where layer 0 is gone
    for start in range(0, len(seen), 4096):
        readings = detectors @ seen[start : start + 4096].T
        inside = (own >= start) & (own < start + 4096)
        readings[inside.nonzero()[:, 0], own[inside] - start] = -torch.inf
        highest = torch.maximum(highest, readings.max(1).values)
    gaps = mine - highest
    return mine, torch.where(gaps > APART * mine, gaps, -1.0)


def _code_of(follows: Mapping[int, int], others: Mapping[int, int], codes: Tensor) -> Tensor:
    """Find the shortest vector [size] whose products with tokens' codes are as wanted.

    Those with `others`, which another vector is for, are 0.
    """
    wanted = {**dict.fromkeys(others, 0), **follows}
    worth = torch.tensor(list(wanted.values()), dtype=codes.dtype)
    solved = torch.linalg.lstsq(codes[list(wanted)], worth[:, None], driver="gelsd")
    shortest: Tensor = solved.solution[:, 0]
    return shortest
