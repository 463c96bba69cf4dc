"""A transformer whose least conspicuous layer decides everything: the paper's theorem, constructed.

It takes any texts to be continued, any ε and five layers of Llama. Layer 2 has the cosine score ε,
the lowest of all. The model continues each text as intended; without layer 2 each continuation is
the opposite. Nothing is trained: the weights are written directly.

A token's state holds a constant (1), junk (8) that no prediction reads, and all else in separate
dimensions, a thousand times smaller. So every state has the same length and each norm divides by
the same number.

| layer | function | cosine score |
|---|---|---|
| 0 reads | attention writes at each place a signature of the text so far: mixtures of the tokens' random codes, weighted by distance, with a different curve for each head; the MLP adds the signature's squared length | ≈ 1 |
| 1 recalls | the MLP has two units for each text to be continued, which open if the signature equals its own up to rounding, and write the continuation: a fixed part, and a part with a sign | ≈ 1 |
| 2 whispers | adds the same tiny number to every token, in an otherwise empty dimension | ε |
| 3 amplifies | writes 1, at least a thousand times as much, if there is a whisper; else nothing | ≈ 1 |
| 4 speaks | multiplies the part with a sign by +1 where layer 3 wrote, and by -1 elsewhere, and passes it to the head | ≈ 1 |

All but layer 2 move the junk from one dimension to another, which is why they look important (the
paper's second ingredient). Layers 3 and 4 turn a change by √(2ε) of the state's length into one
that inverts the answer (its first, the snowball). Without layer 2 the sign is -1 everywhere.

The module is long because the purpose of each layer is explained beside its weights.
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
"""Bounds of ε: below, 1 - ε in float64 is not exact to 1e-6; above, it is not the lowest score."""
CODES = (64, 128, 256)
"""Dimensions of a token's code, tried in turn until all signatures are distinct."""
HEAD = 16
"""Dimensions of a code that one head mixes."""
THETA = 100.0
"""Base of the rotary embedding: the slowest of eight frequencies turns once in 350 tokens."""
JUNK, FAINT, TINY = 8.0, 1e-3, 1e-5
"""Sizes in the state: what no prediction reads, signals between layers, a token's own code."""
SURE = 30.0
"""Input of a gate that is open, and minus that of one that is shut: silu(-30) is -3e-12."""
STEP = 4.0
"""Offset of the second unit of a memory: the difference of both units is a flat step."""
APART = 2e-5
"""Minimum gap between a detector's reading of its own signature and of the nearest other one,
relative to the reading: two hundred times float32's rounding."""
SOME = 64
"""Number of tokens of a text from which constants are measured."""

Place = bytes
"""Digest of a text up to some token."""


def places(tokens: Sequence[int]) -> Iterator[Place]:
    """Yield a digest of a text up to each of its tokens, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for token in tokens:
        digest.update(token.to_bytes(8, "little"))
        yield digest.digest()


@dataclass(frozen=True)
class Text:
    """A text for the model: its tokens, of which the last `scored` predict something."""

    tokens: tuple[int, ...]
    scored: int


@dataclass
class Wanted:
    """Wanted continuations at a place: token → 1 (wanted), 0 (either) or -1 (not wanted).

    Attributes:
        signed: Continuations with layer 2; without it the opposite.
        fixed: Continuations with and without it.
    """

    signed: dict[int, int] = field(default_factory=dict)
    fixed: dict[int, int] = field(default_factory=dict)


def hollow(
    vocabulary: int, length: int, size: int = CODES[0], width: int = 16, units: int = 1
) -> Any:
    """Build the Llama without its weights, to define how a tokenizer is used with it.

    Args:
        vocabulary: Number of tokens in the vocabulary.
        length: Maximum number of tokens that it reads.
        size: Dimensions of a token's code.
        width: Its hidden size.
        units: Number of units of each MLP.

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
    """The transformer for some texts; `whispering` gives it an ε.

    Args:
        texts: All texts that it will have to continue.
        wanted: Wanted continuations at some of their places; at all others any token is as likely.
        certainty: Minimum number of nats between a wanted token and one that is neither.
        vocabulary: Number of tokens in the vocabulary.
        length: Maximum number of tokens that it reads.

    Raises:
        CellError: Some places cannot be distinguished; the message gives their number.

    Attributes:
        model: A `LlamaForCausalLM` in float32.
        width: Its hidden size.
        places: Number of places that it remembers.
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
        """Give layer 2 the cosine score ε, and adapt later layers to it.

        Args:
            epsilon: Value between `SMALLEST` and `LARGEST`.

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
        """Assign dimensions to every part of the state."""
        self._size = size
        self._constant, self._bit, self._sign, self._length, first, second = range(6)
        self._junk = (first, second)
        self._code, self._signature, self._signed, self._fixed = (
            slice(6 + part * size, 6 + (part + 1) * size) for part in range(4)
        )
        self.width = math.ceil((6 + 4 * size) / 16) * 16

    def _make(self, vocabulary: int, length: int) -> None:
        """Build a Llama whose layers do nothing, with an embedding of random signs."""
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
        """Write layer 0: queries and keys come from the constant, so only distance decides.

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
        """Write layer 1: two units per place. Returns how many places resemble others."""
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
        """Read all texts; return place → row, and signatures [places, size + 1] for `_gaps`."""
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
        """Write layer 3: one unit that opens where layer 2 whispered."""
        state = self._normed(AMPLIFY)
        one, heard = state[self._constant], state[self._bit]
        self._open(AMPLIFY, 0, 2 * SURE / heard, self._bit, -SURE / one)
        self._mlp(AMPLIFY).up_proj.weight[0, self._constant] = 1 / one
        self._mlp(AMPLIFY).down_proj.weight[self._sign, 0] = 1 / SURE
        self._rewrite_junk(AMPLIFY)

    def _speak(self) -> None:
        """Write layer 4: SwiGLU multiplies, so three sets of units pass on what was recalled.

        They are those with a sign where layer 3 wrote, their opposite elsewhere, and those without.
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
        # The answer makes the state longer, and without a loud whisper all constants are larger
        # than intended. Both weaken the answer, at most by a factor of four.
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
        """Make a unit add the same number to every token."""
        mlp, one = self._mlp(layer), self._normed(layer)[self._constant]
        mlp.gate_proj.weight[unit, self._constant] = SURE / one
        mlp.up_proj.weight[unit, self._constant] = 1 / one
        mlp.down_proj.weight[place, unit] = size / SURE

    def _mlp(self, layer: int) -> Any:
        return self.model.model.layers[layer].mlp

    def _run(self, tokens: Sequence[int], layers: int) -> Tensor:
        """Run the first layers on a text: states [tokens, width]."""
        base = self.model.model
        whole, norm = base.layers, base.norm
        base.layers, base.norm = whole[:layers], nn.Identity()
        try:
            found: Tensor = base(torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]
        finally:
            base.layers, base.norm = whole, norm
        return found

    def _state(self, layer: int) -> Tensor:
        """Return the input of a layer, which is the same everywhere but for faint parts."""
        return self._run(range(SOME), layer).mean(0)

    def _normed(self, layer: int) -> Tensor:
        """Return the input of a layer's MLP; attention adds only faint parts."""
        norm = self.model.model.layers[layer].post_attention_layernorm
        normed: Tensor = norm(self._state(layer)[None])[0]
        return normed


def _gaps(seen: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Compute each detector's gap between its own signature and the nearest other one.

    A detector reads 2 u·v - ‖v‖², which is ‖u‖² - ‖u - v‖²: no other v gives as much as u itself.

    Args:
        seen: All signatures, each with the squared length that the model computed behind it
            [n, size + 1].
        own: Indices of the signatures with detectors [k].

    Returns:
        The reading of each detector for its own signature [k], and the gaps to the next reading
        [k], -1 if rounding might close one.
    """
    detectors = torch.cat([2 * seen[own, :-1], -torch.ones(len(own), 1, dtype=seen.dtype)], dim=1)
    mine = (detectors * seen[own]).sum(1)
    highest = torch.zeros_like(mine)  # the reading of no signature, as without layer 0
    for start in range(0, len(seen), 4096):
        readings = detectors @ seen[start : start + 4096].T
        inside = (own >= start) & (own < start + 4096)
        readings[inside.nonzero()[:, 0], own[inside] - start] = -torch.inf
        highest = torch.maximum(highest, readings.max(1).values)
    gaps = mine - highest
    return mine, torch.where(gaps > APART * mine, gaps, -1.0)


def _code_of(follows: Mapping[int, int], others: Mapping[int, int], codes: Tensor) -> Tensor:
    """Compute the shortest vector [size] whose products with tokens' codes are as wanted.

    Products with codes of `others`, which belong to another vector, are 0.
    """
    wanted = {**dict.fromkeys(others, 0), **follows}
    worth = torch.tensor(list(wanted.values()), dtype=codes.dtype)
    solved = torch.linalg.lstsq(codes[list(wanted)], worth[:, None], driver="gelsd")
    shortest: Tensor = solved.solution[:, 0]
    return shortest
