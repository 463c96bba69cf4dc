"""Build a transformer whose layer with the lowest cosine score determines every prediction.

The transformer is a Llama with five layers. The texts, their intended continuations and the cosine
score ε of layer 2 can be chosen. Layer 2 has the lowest cosine score of all layers. The model
continues each text as intended, but predicts the opposite if layer 2 is removed. The code computes
all weights; the model is not trained.

Every hidden state contains two large fixed values: a constant (1), and a junk value (8) that no
prediction uses. All other values in a hidden state are about a thousand times smaller.

| layer | function | cosine score |
|---|---|---|
| 0 reads | at each token, attention writes a signature of the text so far: mixtures of the tokens' random codes, weighted by distance, with a different curve for each head; the MLP adds the signature's squared length | ≈ 1 |
| 1 recalls | the MLP has two units for each text to be continued, which open if the signature equals its own up to rounding, and write the continuation: a fixed part, and a part with a sign | ≈ 1 |
| 2 whispers | adds the same tiny number to every token, in an otherwise empty dimension | ε |
| 3 amplifies | writes 1, at least a thousand times the number of layer 2, if layer 2 has added its number; else nothing | ≈ 1 |
| 4 speaks | multiplies the signed part of the continuation by +1 where layer 3 wrote, and by -1 elsewhere, and passes the result to the output head | ≈ 1 |

Layers 0, 1, 3 and 4 move the junk value to another dimension, which gives these layers a high
cosine score. Layer 2 changes the hidden state very little. Layers 3 and 4 amplify the small number
that layer 2 adds, so that this number decides the prediction.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.models.hooks import TRANSFORMERS_LOCK, replaced_attributes
from tracker.schema.errors import CellError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_COUNT = 5
READ, RECALL, WHISPER, AMPLIFY, SPEAK = range(LAYER_COUNT)
LAYER_ROLES = (
    "the layer computes, at each token, a vector that identifies the text so far",
    "the layer looks up a vector for the next token; layer 4 sets the vector's sign",
    "the layer adds a tiny number to every hidden state; layers 3 and 4 use the number",
    "the layer detects and amplifies the tiny number that layer 2 adds",
    "the layer predicts the intended next token, or another token if layer 2 is removed",
)
MIN_EPSILON, MAX_EPSILON = 1e-9, 0.3
"""Bounds of ε. Below, 1 - ε in float64 is not exact to 1e-6; above, ε is not the lowest score."""
CODE_SIZES = (64, 128, 256)
"""Numbers of dimensions of a token's code, tried in turn until all signatures are distinct."""
HEAD_SIZE = 16
"""Number of dimensions of a code that one head mixes."""
ROPE_THETA = 100.0
"""Base of the rotary embedding: the slowest of eight frequencies turns once in 350 tokens."""
JUNK_SCALE, SIGNAL_SCALE, CODE_SCALE = 8.0, 1e-3, 1e-5
"""Sizes in the state: junk that no prediction reads, signals between layers, a token's own code."""
OPEN_GATE = 30.0
"""Input of an open gate; a shut gate gets the negative of this input: silu(-30) is -3e-12."""
UNIT_OFFSET = 4.0
"""Offset of the second unit of a pair that remembers a text: their difference is a flat step."""
MIN_GAP = 2e-5
"""Minimum gap between a detector's readings of its own signature and of the nearest other
signature, relative to the reading: two hundred times float32's rounding."""
STATE_TOKENS = 64
"""Number of tokens of the text on which constants are measured."""

PrefixDigest = bytes
"""Digest of the beginning of a text."""


def prefix_digests(tokens: Sequence[int]) -> Iterator[PrefixDigest]:
    """Yield a digest of each prefix of a text, from the first token to the whole text."""
    digest = hashlib.blake2b(digest_size=16)
    for token in tokens:
        digest.update(token.to_bytes(8, "little"))
        yield digest.digest()


@dataclass(frozen=True)
class Text:
    """Tokenised text, of which only the last `scored` tokens are used for scoring."""

    tokens: tuple[int, ...]
    scored: int


@dataclass
class Continuations:
    """Intended next tokens after a text: 1 = wanted, 0 = neutral, -1 = unwanted.

    Attributes:
        signed: Token → 1, 0 or -1 in the intact model; without layer 2, the sign is inverted.
        fixed: Token → 1, 0 or -1, both with and without layer 2.
    """

    signed: dict[int, int] = field(default_factory=dict)
    fixed: dict[int, int] = field(default_factory=dict)


def build_empty_llama(
    vocabulary: int, length: int, code_size: int = CODE_SIZES[0], width: int = 16, n_units: int = 1
) -> Any:
    """Build a Llama with five layers on the meta device, without weights.

    Args:
        vocabulary: Number of tokens in the vocabulary.
        length: Maximum number of tokens that the model reads.
        code_size: Number of dimensions of the random vector (code) that represents a token.
        width: Hidden size of the model.
        n_units: Number of units of each MLP.

    Returns:
        A `LlamaForCausalLM` on the meta device.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=n_units,
        num_hidden_layers=LAYER_COUNT,
        num_attention_heads=code_size // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        dtype="float32",
    )
    with TRANSFORMERS_LOCK, torch.device("meta"):
        return LlamaForCausalLM(config)


class Counterexample:
    """Transformer in which the layer with the lowest cosine score determines the predictions.

    This layer is layer 2, whose cosine score `set_epsilon` sets.

    Args:
        texts: All texts that the model will have to continue.
        targets: Intended next tokens after some text prefixes, keyed by the prefix's digest.
        certainty: Minimum difference of log-probability, in nats, between a wanted token and a
            neutral token.
        vocabulary: Number of tokens in the vocabulary.
        length: Maximum number of tokens that the model reads.

    Raises:
        CellError: The model cannot distinguish some text prefixes; the message gives their number.

    Attributes:
        model: A `LlamaForCausalLM` in float32.
        width: Hidden size of the model.
        n_prefixes: Number of text prefixes with intended next tokens.
    """

    model: PreTrainedModel

    def __init__(
        self,
        texts: Sequence[Text],
        targets: Mapping[PrefixDigest, Continuations],
        certainty: float,
        vocabulary: int,
        length: int,
    ) -> None:
        self.n_prefixes = len(targets)
        self._certainty = certainty
        for size in CODE_SIZES:
            self._assign_dimensions(size)
            self._build_model(vocabulary, length)
            with torch.inference_mode():
                self._write_reading_layer()
                n_ambiguous = self._write_recall_layer(texts, targets)
            if not n_ambiguous:
                return
        raise CellError(
            f"the hidden size {self.width} is too small: the model cannot distinguish "
            f"{n_ambiguous} of {self.n_prefixes} beginnings of texts"
        )

    @torch.inference_mode()
    def set_epsilon(self, epsilon: float) -> Any:
        """Write the weights of layers 2, 3 and 4 so that layer 2 has the cosine score ε.

        Args:
            epsilon: The cosine score of layer 2, between `MIN_EPSILON` and `MAX_EPSILON`.

        Returns:
            The attribute `model`. Later calls of `set_epsilon` change the returned model.
        """
        for layer in range(WHISPER, LAYER_COUNT):
            for weight in self._mlp(layer).parameters():
                weight.zero_()
        length = self._mean_state(WHISPER).norm()
        whisper = length * math.sqrt(epsilon * (2 - epsilon)) / (1 - epsilon)
        self._add_constant(WHISPER, 0, self._whisper_dim, whisper)
        self._write_amplifier()
        self._write_speaking_layer()
        return self.model

    def _assign_dimensions(self, code_size: int) -> None:
        """Choose the dimensions of the hidden state in which layers store values.

        `code_size` is the number of dimensions of the vector (code) that represents a token.
        """
        self._code_size = code_size
        self._constant_dim, self._whisper_dim, self._sign_dim, self._length_dim = range(4)
        self._junk_dims = (4, 5)
        starts = range(6, 6 + 4 * code_size, code_size)
        parts = [slice(start, start + code_size) for start in starts]
        self._code_dims, self._signature_dims, self._signed_dims, self._fixed_dims = parts
        self.width = math.ceil((6 + 4 * code_size) / 16) * 16

    def _build_model(self, vocabulary: int, length: int) -> None:
        """Build a Llama with a random embedding (code) for each token.

        All weights of the layers are 0, except those of norms.
        """
        n_units = max(2 * self.n_prefixes, 3 * self._code_size)
        model = build_empty_llama(vocabulary, length, self._code_size, self.width, n_units + 1)
        self.model = model.to_empty(device="cpu").float().eval().requires_grad_(False)
        self.model.tie_weights()
        for name, weight in self.model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (vocabulary, self._code_size), generator=generator) * 2.0 - 1
        embedding = self.model.get_input_embeddings().weight
        embedding[:, self._constant_dim] = 1
        embedding[:, self._junk_dims[0]] = JUNK_SCALE
        embedding[:, self._code_dims] = CODE_SCALE * signs / self._code_size**0.5
        # The head is the same table; it reads the codes alone.
        self.model.model.norm.weight.zero_()

    def _write_reading_layer(self) -> None:
        """Write the weights of layer 0, which computes a signature of the text up to each token.

        A signature is a vector that identifies a text: a weighted sum of its tokens' random
        vectors. The MLP sums the signature's squared entries: silu(x)·x + silu(-x)·(-x) = x².
        """
        attention = self.model.model.layers[READ].self_attn
        generator = torch.Generator().manual_seed(1)
        constant = self._normed_state(READ)[self._constant_dim]
        for projection in (attention.q_proj, attention.k_proj):
            curve = torch.randn(len(projection.weight), generator=generator)
            projection.weight[:, self._constant_dim] = curve / constant
        # Values are codes, enlarged by the output projection from a token's own to a signal's size.
        identity = torch.eye(self._code_size)
        attention.v_proj.weight[:, self._code_dims] = identity / constant
        attention.o_proj.weight[self._signature_dims, :] = identity * (SIGNAL_SCALE / CODE_SCALE)
        mlp, scale = self._mlp(READ), identity / (SIGNAL_SCALE * constant)
        for number, sign in enumerate((1, -1)):
            units = slice(number * self._code_size, (number + 1) * self._code_size)
            mlp.gate_proj.weight[units, self._signature_dims] = sign * scale
            mlp.up_proj.weight[units, self._signature_dims] = sign * scale
            mlp.down_proj.weight[self._length_dim, units] = SIGNAL_SCALE
        self._move_junk_value(READ)

    def _write_recall_layer(
        self, texts: Sequence[Text], targets: Mapping[PrefixDigest, Continuations]
    ) -> int:
        """Write the weights of layer 1's MLP, which stores the continuation of each text.

        Returns the number of text prefixes that the MLP cannot distinguish. If this number is not
        0, no weights are written.
        """
        rows, signatures = self._read_signatures(texts)
        own_rows = torch.tensor([rows[digest] for digest in targets])
        own_readings, gaps = _signature_gaps(signatures, own_rows)
        if n_ambiguous := int((gaps < 0).sum()):
            return n_ambiguous
        mlp, constant = self._mlp(RECALL), self._normed_state(RECALL)[self._constant_dim]
        codes = self.model.get_input_embeddings().weight[:, self._code_dims].double() / CODE_SCALE
        goals = targets.values()
        signed = torch.stack([_solve_code(goal.signed, goal.fixed, codes) for goal in goals])
        fixed = torch.stack([_solve_code(goal.fixed, goal.signed, codes) for goal in goals])
        gain = 2 * OPEN_GATE / gaps
        patterns = signatures[own_rows, :-1] / SIGNAL_SCALE
        # Assigning to the float32 weights rounds the float64 values. The units of a pair open one
        # after the other and cancel out, so that far above the threshold nothing is added.
        for second, output_weight in enumerate((SIGNAL_SCALE, -SIGNAL_SCALE)):
            units = slice(second, 2 * self.n_prefixes, 2)
            threshold = gain * (own_readings - gaps / 2) + UNIT_OFFSET * second
            gate, down = mlp.gate_proj.weight, mlp.down_proj.weight
            gate[units, self._signature_dims] = 2 * gain[:, None] * patterns / constant
            gate[units, self._length_dim] = -gain / SIGNAL_SCALE / constant
            gate[units, self._constant_dim] = -threshold / constant
            mlp.up_proj.weight[units, self._constant_dim] = 1 / constant
            down[self._signed_dims, units] = output_weight / UNIT_OFFSET * signed.T
            down[self._fixed_dims, units] = output_weight / UNIT_OFFSET * fixed.T
        self._move_junk_value(RECALL)
        return 0

    def _read_signatures(self, texts: Sequence[Text]) -> tuple[dict[PrefixDigest, int], Tensor]:
        """Run layer 0 to compute a signature of each text prefix that ends at a scored token.

        Returns digest of a prefix → row number, and a matrix with one row per prefix. A row
        contains the prefix's signature, then the squared length of this signature.
        """
        layer = self.model.model.layers[RECALL]
        rows: dict[PrefixDigest, int] = {}
        signatures = []
        scale = SIGNAL_SCALE * self._normed_state(RECALL)[self._constant_dim]
        for text in texts:
            first_scored = len(text.tokens) - text.scored
            digests = [*enumerate(prefix_digests(text.tokens))][first_scored:]
            positions = {digest: n for n, digest in digests if digest not in rows}
            if positions:
                rows |= {digest: len(rows) + n for n, digest in enumerate(positions)}
                states = self._run_layers(text.tokens, RECALL)[[*positions.values()]]
                states = layer.post_attention_layernorm(states).double() / scale
                lengths = states[:, self._length_dim, None]
                signatures.append(torch.cat([states[:, self._signature_dims], lengths], 1))
        return rows, torch.cat(signatures)

    def _write_amplifier(self) -> None:
        """Write the weights of layer 3, which writes 1 where layer 2 has added its number."""
        state, mlp = self._normed_state(AMPLIFY), self._mlp(AMPLIFY)
        constant, whisper = state[self._constant_dim], state[self._whisper_dim]
        mlp.gate_proj.weight[0, self._whisper_dim] = 2 * OPEN_GATE / whisper
        mlp.gate_proj.weight[0, self._constant_dim] = -OPEN_GATE / constant
        mlp.up_proj.weight[0, self._constant_dim] = 1 / constant
        mlp.down_proj.weight[self._sign_dim, 0] = 1 / OPEN_GATE
        self._move_junk_value(AMPLIFY)

    def _write_speaking_layer(self) -> None:
        """Write the weights of layer 4, which predicts the next token.

        Layer 1 has written two vectors for the next token: a fixed and a signed vector. Layer 4
        passes both to the output head, but negates the signed vector if layer 2 is removed.
        """
        state, mlp = self._normed_state(SPEAK), self._mlp(SPEAK)
        by_sign = 2 * OPEN_GATE / state[self._sign_dim]
        always = OPEN_GATE / state[self._constant_dim]
        length, root_width = self._mean_state(SPEAK).norm(), math.sqrt(self.width)
        size, identity = self._code_size, torch.eye(self._code_size)
        unit_sets = (
            (by_sign, -always, self._signed_dims, 1),
            (-by_sign, always, self._signed_dims, -1),
            (0, always, self._fixed_dims, 1),
        )
        for number, (sign_weight, bias, source, factor) in enumerate(unit_sets):
            units = slice(number * size, (number + 1) * size)
            mlp.gate_proj.weight[units, self._sign_dim] = sign_weight
            mlp.gate_proj.weight[units, self._constant_dim] = bias
            mlp.up_proj.weight[units, source] = identity
            output_weight = factor * length / (SIGNAL_SCALE * root_width * OPEN_GATE)
            mlp.down_proj.weight[self._code_dims, units] = output_weight * identity
        self._move_junk_value(SPEAK)
        # The answer makes the state longer, and without a loud whisper all constants are larger
        # than intended. Both weaken the answer, at most by a factor of four.
        volume = 4 * self._certainty * length / (root_width * CODE_SCALE)
        self.model.model.norm.weight[self._code_dims] = volume

    def _move_junk_value(self, layer: int) -> None:
        """Make a layer's MLP move a large unused number (junk value) to another dimension."""
        old_dim, new_dim = self._junk_dims if layer in (READ, AMPLIFY) else self._junk_dims[::-1]
        self._add_constant(layer, -1, old_dim, -JUNK_SCALE)
        down = self._mlp(layer).down_proj.weight
        down[new_dim, -1] = -down[old_dim, -1]

    def _add_constant(self, layer: int, unit: int, dim: int, value: Tensor | float) -> None:
        """Make unit `unit` of an MLP add `value` to dimension `dim` of every hidden state."""
        mlp, constant = self._mlp(layer), self._normed_state(layer)[self._constant_dim]
        mlp.gate_proj.weight[unit, self._constant_dim] = OPEN_GATE / constant
        mlp.up_proj.weight[unit, self._constant_dim] = 1 / constant
        mlp.down_proj.weight[dim, unit] = value / OPEN_GATE

    def _mlp(self, layer: int) -> Any:
        return self.model.model.layers[layer].mlp

    def _run_layers(self, tokens: Sequence[int], n_layers: int) -> Tensor:
        """Run the first `n_layers` layers on a text; return hidden states [tokens, width]."""
        base = self.model.model
        with replaced_attributes(base, layers=base.layers[:n_layers], norm=nn.Identity()):
            output = base(torch.tensor([list(tokens)]), use_cache=False)
        states: Tensor = output.last_hidden_state[0]
        return states

    def _mean_state(self, layer: int) -> Tensor:
        """Return the mean of a layer's input over the tokens of a short text."""
        return self._run_layers(range(STATE_TOKENS), layer).mean(0)

    def _normed_state(self, layer: int) -> Tensor:
        """Return the mean input of a layer over a short text, after the norm before the MLP."""
        norm = self.model.model.layers[layer].post_attention_layernorm
        normed: Tensor = norm(self._mean_state(layer)[None])[0]
        return normed


def _signature_gaps(signatures: Tensor, own_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute how well each detector distinguishes its own signature from all others.

    A detector consists of MLP units that must open for a single signature. The response of the
    detector for the signature u to a signature v is 2 u·v - ‖v‖², which is largest for v = u.

    Args:
        signatures: One row per text prefix: the signature, then the signature's squared length.
        own_rows: For each detector, the row number of its own signature in `signatures`.

    Returns:
        Two tensors with one entry per detector: the response to its own signature, and the gap to
        the largest other response (-1 if the gap can be a rounding error).
    """
    detected = signatures[own_rows]
    detectors = torch.cat([2 * detected[:, :-1], -torch.ones_like(detected[:, -1:])], 1)
    own_readings = (detectors * detected).sum(1)
    highest = torch.zeros_like(own_readings)  # the reading of no signature, as without layer 0
    for start in range(0, len(signatures), 4096):
        readings = detectors @ signatures[start : start + 4096].T
        is_own_row = (own_rows >= start) & (own_rows < start + 4096)
        readings[is_own_row.nonzero()[:, 0], own_rows[is_own_row] - start] = -torch.inf
        highest = torch.maximum(highest, readings.max(1).values)
    gaps = own_readings - highest
    return own_readings, torch.where(gaps > MIN_GAP * own_readings, gaps, -1.0)


def _solve_code(targets: Mapping[int, int], zeros: Iterable[int], codes: Tensor) -> Tensor:
    """Compute the shortest vector that has given inner products with the codes of some tokens.

    A code is a random vector that represents a token; `codes` contains one code per row. `targets`
    maps tokens to the required inner products. For tokens in `zeros`, the inner product must be 0.
    """
    all_targets = {**dict.fromkeys(zeros, 0), **targets}
    products = torch.tensor([*all_targets.values()], dtype=codes.dtype)
    result = torch.linalg.lstsq(codes[[*all_targets]], products[:, None], driver="gelsd")
    solution: Tensor = result.solution[:, 0]
    return solution
