"""A variant of the registry against an independent truth.

The truth shares no code with the engine: the checkpoint without the layer that `tracker export`
writes, as transformers loads it, one plain forward pass a request, on the tokens that lm-eval
reads. Where there is no such checkpoint, it is a fresh copy of the model with the layer's output
replaced by its input. Two cells are measured: blocks of documents in one order with small rows, and
all of it backwards with large ones. What becomes of all variants is kept by `census`.
"""

from __future__ import annotations

import copy
import math
import random
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn

from tests.helpers.ablations import single_layers
from tests.helpers.engines import VerdictMemory, skipping_layers, wrap_model
from tests.helpers.registry import LAYERS, ORIGINAL_LENGTH, VOCABULARY, Variant
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check_sharing
from tracker.models.checkpoint import savable_copy
from tracker.models.layers import find_layers
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document, Request
from tracker.schema.errors import CellError, ModelError

MAX_LENGTH = 176
ABLATIONS = [*single_layers(tuple(range(LAYERS))), Ablation.parse("layers:1,2")]
ROWS = (192, 1024)
"""Tokens of a row on a processor and on an accelerator."""
SECONDS = 240
"""Of computing that one variant may take."""
NO_FILE = {
    "skipped": "tracker export writes no checkpoint; the layer hands on its input",
    "deleted": "as the model with these layers deleted",
}
"""Where what is measured is not what is saved and loaded."""
MATTERS = 0.02
"""Nats that a layer's removal must move, or its equality says nothing."""

EXACT, REFUSED, DISCONTINUOUS = "exact", "refused", "discontinuous"
WRONG, CRASH, NO_VARIANT = "SILENTLY WRONG", "CRASH", "not accepted"
FAILURES = (WRONG, CRASH)
ORDER = ("documents", "tokens", "depth", "nothing")
"""How far is shared, the furthest first."""

SAVED, SKIPPED, DELETED = "saved and loaded", "skipped", "deleted"
"""What the model without a layer is."""

_Responses = Sequence[tuple[float, Document, Request]]


class TooLongError(BaseException):
    """A variant took too long; no code that catches what a model raises catches this."""


@dataclass(frozen=True)
class Verdict:
    """Result of the check of a variant.

    Attributes:
        variant: Which.
        verdict: One of the words above.
        shared: How far: over documents, tokens, depth or nothing; the least of both cells.
        difference: Largest difference from the truth, in nats.
        why: What is to be said of it: why refused, where wrong, what shares less.
        idle: Layers whose removal moves less than `MATTERS`.
        seconds: Time that it took.
        state: Which code, torch and transformers it was found with; see `census`.
    """

    variant: Variant
    verdict: str
    shared: str = ""
    difference: float = 0.0
    why: str = ""
    idle: tuple[int, ...] = ()
    seconds: float = 0.0
    state: str = ""

    def __str__(self) -> str:
        parts = [f"{self.seconds:5.1f} s", self.verdict, str(self.variant)]
        if self.verdict in (EXACT, DISCONTINUOUS, WRONG):
            parts.append(f"shared over {self.shared}, {self.difference:.2g} nats")
        if self.idle:
            parts.append(f"layers that move nothing: {self.idle}")
        return ": ".join([*parts, *([self.why] if self.why else [])])


def make_blocks() -> list[list[Document]]:
    """Make the documents, in the blocks that are scored one after another."""
    generator = random.Random(0)

    def draw_tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, VOCABULARY) for _ in range(count))

    def draw_answers(context: tuple[int, ...], *lengths: int) -> list[Request]:
        return [Request(context, draw_tokens(length)) for length in lengths]

    letters = [draw_tokens(1) for _ in range(4)]
    contexts = map(draw_tokens, (120, 100, 40, 60, 30, 50))
    short_requests = [[Request(context, letter) for letter in letters] for context in contexts]
    common = draw_tokens(55)
    shared_requests = [
        draw_answers(common + draw_tokens(extra), 1, 1, 3, 6) for extra in (3, 9, 30)
    ]
    window_requests = [
        draw_answers(draw_tokens(length), 1, 3)
        for length in (ORIGINAL_LENGTH - 3, ORIGINAL_LENGTH - 1, ORIGINAL_LENGTH, 26)
    ]
    mixed_requests = [
        draw_answers(draw_tokens(9), 1, 1, 3, 6),
        draw_answers(draw_tokens(40), 70, 74),
        *window_requests,
    ]
    cut_requests = [draw_answers(draw_tokens(170), 20)]
    count = iter(range(1000))
    return [
        [Document("task", next(count), tuple(requests), 0, len(requests)) for requests in block]
        for block in (short_requests, shared_requests, mixed_requests + cut_requests)
    ]


def reverse_blocks(ordered: list[list[Document]]) -> list[list[Document]]:
    """Reverse the blocks, and the documents of each."""
    return [block[::-1] for block in ordered[::-1]]


class PlainTruth:
    """True log-likelihoods of requests without some layers, by one plain forward pass each."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._changes_itself: bool | None = None
        self._logprobs: dict[tuple[str, Ablation, tuple[int, ...]], torch.Tensor] = {}
        self._copies: dict[tuple[str, Ablation], nn.Module] = {}
        self._loaded: dict[Ablation, nn.Module | None] = {}

    def loglikelihood(
        self,
        ablation: Ablation,
        request: Request,
        kind: str | None = None,
        n_tokens: int | None = None,
    ) -> float:
        """Sum the log-probabilities of a continuation, or of its first tokens."""
        tokens = (request.context + request.continuation)[-(MAX_LENGTH + 1) :][:-1]
        if kind is None:
            kind = SAVED if self.has_checkpoint(ablation) else SKIPPED
        key = (kind, ablation, tokens)
        if key not in self._logprobs:
            self._logprobs[key] = self._forward(ablation, tokens, kind)
        target = torch.tensor(request.continuation)
        logprobs = self._logprobs[key][-len(request.continuation) :]
        return float(logprobs.gather(1, target[:, None])[:n_tokens].sum())

    def has_checkpoint(self, ablation: Ablation) -> bool:
        """Return whether a checkpoint without the layers exists and runs."""
        if not ablation.removed():
            return False
        if ablation not in self._loaded:
            try:
                self._loaded[ablation] = reload_without(self.model, ablation.removed())
                self._forward(ablation, (5, 6, 7), SAVED)
            except Exception:  # noqa: BLE001 - whatever a class says where a layer is missing
                self._loaded[ablation] = None
        return self._loaded[ablation] is not None

    def _forward(self, ablation: Ablation, tokens: tuple[int, ...], kind: str) -> torch.Tensor:
        model = self._copy(ablation, kind)
        ids = torch.tensor([tokens])
        # A model whose layers cannot be told has a baseline nevertheless.
        skips = ablation.removed() and kind == SKIPPED
        skip = skipping_layers(model, ablation.removed()) if skips else nullcontext()
        with skip, torch.inference_mode():
            logprobs = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        if self._changes_itself is None and kind != SAVED:
            old_tensors, new_tensors = _tensors(self.model), _tensors(model)
            self._changes_itself = any(
                not _is_equal(old_tensors[name], new_tensors[name]) for name in old_tensors
            )
        return logprobs

    def _copy(self, ablation: Ablation, kind: str) -> nn.Module:
        key = (kind, ablation)
        if self._changes_itself is not False or key not in self._copies:
            loaded = self._loaded[ablation] if kind == SAVED else None
            self._copies[key] = copy.deepcopy(self.model if loaded is None else loaded)
            if kind == DELETED:
                delete_layers(self._copies[key], ablation.removed())
        return self._copies[key]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a call may change: weights, and buffers that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _is_equal(tensor: torch.Tensor, other_tensor: torch.Tensor) -> bool:
    return bool(torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(other_tensor)))


def reload_without(model: Any, removed: Sequence[int]) -> nn.Module:
    """Write the checkpoint without layers as `tracker export` does, and load it by transformers."""
    with TemporaryDirectory() as folder:
        savable_copy(copy.deepcopy(model), removed).save_pretrained(folder)
        loaded, loading_info = type(model).from_pretrained(
            folder,
            dtype=torch.float32,  # tables too, as in the model before it became a double
            attn_implementation=model.config._attn_implementation,
            experts_implementation=model.config._experts_implementation,
            output_loading_info=True,
        )
    if (
        loading_info["missing_keys"]
        or loading_info["unexpected_keys"]
        or loading_info["mismatched_keys"]
    ):
        raise ModelError("it asks for other weights")
    return loaded.eval().requires_grad_(False).to(model.dtype)


def delete_layers(model: nn.Module, removed: Sequence[int]) -> None:
    """Delete layers as an export would: lists with an entry a layer cut, the others renumbered."""
    layers = find_layers(model)
    kept_layers = [index for index in range(LAYERS) if index not in removed]
    owners = [m for m in model.modules() if any(part is layers for part in m.children())]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for owner in [*owners, *configs.values()]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, (list, tuple)) and len(value) == LAYERS:
                setattr(owner, name, type(value)(value[index] for index in kept_layers))
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) == LAYERS:
            config.num_hidden_layers = len(kept_layers)
    for new_index, old_index in enumerate(kept_layers):
        for module in layers[old_index].modules():
            for name in ("layer_idx", "layer_id", "layer_number"):
                if vars(module).get(name) == old_index:
                    setattr(module, name, new_index)
    for index in sorted(removed, reverse=True):
        del layers[index]


def examine_variant(variant: Variant) -> Verdict:
    """Measure a variant in both orders, and compare every response with the truth."""
    start = time.monotonic()
    try:
        with _time_limit(SECONDS):
            verdict = _measure_variant(variant)
    except (Exception, TooLongError) as error:  # noqa: BLE001 - it is what this looks for
        verdict = Verdict(variant, CRASH, why=_error_line(error))
    return replace(verdict, seconds=time.monotonic() - start)


def _measure_variant(variant: Variant) -> Verdict:
    try:
        model = variant.model()
        truth = PlainTruth(model)
        truth.loglikelihood(INTACT, make_blocks()[0][0].requests[0])
    except Exception as error:  # noqa: BLE001 - the model's own code
        return Verdict(variant, NO_VARIANT, why=_error_line(error))
    try:
        comparison = _compare(model, truth)
    except (CellError, ModelError) as error:
        return Verdict(variant, REFUSED, why=_error_line(error))
    idle = tuple(
        layer
        for layer in range(LAYERS)
        if not _is_relevant(Ablation.parse(f"layer:{layer}"), truth)
    )
    verdict = (
        EXACT
        if comparison.agrees
        else DISCONTINUOUS
        if _exact_in_double(model, comparison)
        else WRONG
    )
    return Verdict(variant, verdict, comparison.shared, comparison.largest, comparison.note, idle)


def _exact_in_double(model: nn.Module, comparison: _CellComparison) -> bool:
    """Return whether differences in float32 vanish in float64, with the same sharing.

    Or the engine said that it shares less, and what still differs are answers of a model that
    depend on what follows: equal tokens tie in a top-k.
    """
    double: Any = model.double()
    try:
        # The grouped matrix product of experts knows no float64.
        double.set_experts_implementation("eager")
        truth = PlainTruth(double)
        double_comparison = _compare(double, truth)
        if double_comparison.agrees and double_comparison.shared == comparison.shared:
            return True
        return double_comparison.is_noted and all(
            _depends_on_what_follows(truth, requests, ablation)
            for ablation, requests in double_comparison.differing_requests.items()
        )
    except Exception:  # noqa: BLE001 - a model need not run in float64
        return False


def _depends_on_what_follows(
    truth: PlainTruth, requests: Sequence[Request], ablation: Ablation
) -> bool:
    """Return whether any of some answers changes with the tokens after it."""
    following_tokens = tuple(range(3, VOCABULARY))
    for request in requests:
        size = len(request.continuation)
        for n_more in (1, 2, 5, 20, 60):
            longer_request = Request(
                request.context, request.continuation + following_tokens[:n_more]
            )
            if len(longer_request.context) + len(longer_request.continuation) > MAX_LENGTH:
                break
            if (
                abs(
                    truth.loglikelihood(ablation, longer_request, n_tokens=size)
                    - truth.loglikelihood(ablation, request)
                )
                > 1e-3
            ):
                return True
    return False


@dataclass(frozen=True)
class _CellComparison:
    agrees: bool
    largest: float
    shared: str
    is_noted: bool
    note: str
    differing_requests: dict[Ablation, list[Request]]


def _compare(model: nn.Module, truth: PlainTruth) -> _CellComparison:
    """Measure both cells with copies of a model, and compare them with the truth."""
    memory = VerdictMemory()
    cells = [
        _compare_cell(model, truth, rows, ordered, memory)
        for rows, ordered in zip(ROWS, (make_blocks(), reverse_blocks(make_blocks())), strict=True)
    ]
    return _CellComparison(
        agrees=all(cell.agrees for cell in cells),
        largest=max(cell.largest for cell in cells),
        shared=max((cell.shared for cell in cells), key=ORDER.index),
        is_noted=all(cell.is_noted for cell in cells),
        # One sentence: of the cell that is wrong or shares less.
        note=max(cells, key=lambda cell: (not cell.agrees, ORDER.index(cell.shared))).note,
        differing_requests={a: r for cell in cells for a, r in cell.differing_requests.items()},
    )


def _compare_cell(
    model: nn.Module,
    truth: PlainTruth,
    rows: int,
    ordered: list[list[Document]],
    memory: VerdictMemory,
) -> _CellComparison:
    documents = [document for block in ordered for document in block]
    engine = Engine(wrap_model(copy.deepcopy(model)), MAX_LENGTH, row_tokens=rows)
    checked = check_sharing(engine, documents, ABLATIONS, memory)
    scores = [
        score_row for block in ordered for score_row in checked.engine.score(block, ABLATIONS)
    ]
    largest, wrong_notes, wrong_documents = 0.0, [], set()
    names_by_kind: dict[str, list[str]] = {}
    differing: dict[Ablation, list[Request]] = {}
    for column, ablation in enumerate(ABLATIONS):
        responses = [
            (response.loglikelihood, score.document, request)
            for score in scores
            for response, request in zip(
                score.responses[column], score.document.requests, strict=True
            )
        ]
        max_difference, differing_responses = _find_differences(responses, ablation, truth)
        # What loads is the truth, but where it is said that something else is measured.
        loads_saved = not ablation.removed() or truth.has_checkpoint(ablation)
        kind = SAVED if loads_saved else SKIPPED
        alternative = (
            None
            if loads_saved and not checked.checkpoint_note
            else SKIPPED
            if loads_saved
            else DELETED
        )
        if (
            differing_responses
            and alternative
            and (alternative_match := _compare_alternative(responses, ablation, truth, alternative))
        ):
            (max_difference, differing_responses), kind = alternative_match, alternative
        if kind != SAVED:
            names_by_kind.setdefault(kind, []).append(ablation.name)
        largest = max(largest, max_difference)
        if differing_responses:
            wrong_notes.append(f"{ablation.name} by {max_difference:.2g}")
            wrong_documents |= {document.index for document, _ in differing_responses}
            differing[ablation] = [request for _, request in differing_responses]
    shared = _sharing_word(checked.engine.sharing)
    check_notes = (checked.checkpoint_note, checked.sharing_note, checked.unsteady_note)
    note = "; ".join(line for line in check_notes if line)
    if wrong_notes:
        note = (
            f"rows of {rows} shared over {shared}: {', '.join(wrong_notes)}; "
            f"documents {', '.join(map(str, sorted(wrong_documents)))}"
        )
    elif names_by_kind and not checked.checkpoint_note:
        note = "; ".join(
            [f"{', '.join(names)}: {NO_FILE[kind]}" for kind, names in names_by_kind.items()]
            + ([note] if note else [])
        )
    return _CellComparison(not wrong_notes, largest, shared, bool(note), note, differing)


def _compare_alternative(
    responses: _Responses, ablation: Ablation, truth: PlainTruth, kind: str
) -> tuple[float, list[tuple[Document, Request]]] | None:
    """Compare with another model, which the one without a layer may be instead."""
    try:
        max_difference, differing_responses = _find_differences(responses, ablation, truth, kind)
    except Exception:  # noqa: BLE001 - a model need not run with layers deleted
        return None
    return None if differing_responses else (max_difference, differing_responses)


def _find_differences(
    responses: _Responses, ablation: Ablation, truth: PlainTruth, kind: str | None = None
) -> tuple[float, list[tuple[Document, Request]]]:
    """Find the largest difference, and the requests whose responses differ beyond rounding."""
    max_difference: float = 0.0
    differing_responses: list[tuple[Document, Request]] = []
    for loglikelihood, document, request in responses:
        true_ll = truth.loglikelihood(ablation, request, kind)
        if not math.isfinite(loglikelihood) and not math.isfinite(true_ll):
            continue
        difference = abs(loglikelihood - true_ll)
        max_difference = max(max_difference, difference if math.isfinite(difference) else math.inf)
        if not difference <= 1e-3 + 1e-4 * abs(true_ll):
            differing_responses.append((document, request))
    return max_difference, differing_responses


def _is_relevant(ablation: Ablation, truth: PlainTruth) -> bool:
    return any(
        not abs(truth.loglikelihood(ablation, request) - truth.loglikelihood(INTACT, request))
        < MATTERS
        for block in make_blocks()
        for document in block
        for request in document.requests
    )


def _sharing_word(sharing: Any) -> str:
    if sharing.prefix:
        return "documents"
    return "tokens" if sharing.tokens else "depth" if sharing.depth else "nothing"


def _error_line(error: BaseException) -> str:
    """Return an error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise an error where it computes for longer, however many others compute beside it."""

    def stop(signal_number: int, frame: Any) -> None:
        raise TooLongError(f"took longer than {seconds} s")

    old_handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old_handler)


def prepare_process() -> None:
    """Make a process fit for models this small, which only wait for a second thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
