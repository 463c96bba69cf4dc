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
from tests.helpers.engines import Memory, loaded, skipped
from tests.helpers.registry import LAYERS, ORIGINAL, VOCABULARY, Variant
from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document, Request
from tracker.core.errors import CellError, ModelError
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check
from tracker.models.checkpoint import without
from tracker.models.layers import find_layers

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


def blocks() -> list[list[Document]]:
    """Make the documents, in the blocks that are scored one after another."""
    draw = random.Random(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    def answers(context: tuple[int, ...], *lengths: int) -> list[Request]:
        return [Request(context, some(length)) for length in lengths]

    letters = [some(1) for _ in range(4)]
    contexts = map(some, (120, 100, 40, 60, 30, 50))
    short = [[Request(context, letter) for letter in letters] for context in contexts]
    common = some(55)
    shared = [answers(common + some(more), 1, 1, 3, 6) for more in (3, 9, 30)]
    around = [answers(some(length), 1, 3) for length in (ORIGINAL - 3, ORIGINAL - 1, ORIGINAL, 26)]
    mixed = [answers(some(9), 1, 1, 3, 6), answers(some(40), 70, 74), *around]
    cut = [answers(some(170), 20)]
    count = iter(range(1000))
    return [
        [Document("task", next(count), tuple(requests), 0, len(requests)) for requests in block]
        for block in (short, shared, mixed + cut)
    ]


def backwards(ordered: list[list[Document]]) -> list[list[Document]]:
    """Reverse the blocks, and the documents of each."""
    return [block[::-1] for block in ordered[::-1]]


class Truth:
    """True log-likelihoods of requests without some layers, by one plain forward pass each."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._changes_itself: bool | None = None
        self._said: dict[tuple[str, Ablation, tuple[int, ...]], torch.Tensor] = {}
        self._copies: dict[tuple[str, Ablation], nn.Module] = {}
        self._loaded: dict[Ablation, nn.Module | None] = {}

    def of(
        self,
        ablation: Ablation,
        request: Request,
        way: str | None = None,
        first: int | None = None,
    ) -> float:
        """Sum the log-probabilities of a continuation, or of its first tokens."""
        tokens = (request.context + request.continuation)[-(MAX_LENGTH + 1) :][:-1]
        if way is None:
            way = SAVED if self.loads(ablation) else SKIPPED
        key = (way, ablation, tokens)
        if key not in self._said:
            self._said[key] = self._forward(ablation, tokens, way)
        target = torch.tensor(request.continuation)
        said = self._said[key][-len(request.continuation) :]
        return float(said.gather(1, target[:, None])[:first].sum())

    def loads(self, ablation: Ablation) -> bool:
        """Return whether a checkpoint without the layers exists and runs."""
        if not ablation.removed():
            return False
        if ablation not in self._loaded:
            try:
                self._loaded[ablation] = saved_and_loaded(self.model, ablation.removed())
                self._forward(ablation, (5, 6, 7), SAVED)
            except Exception:  # noqa: BLE001 - whatever a class says where a layer is missing
                self._loaded[ablation] = None
        return self._loaded[ablation] is not None

    def _forward(self, ablation: Ablation, tokens: tuple[int, ...], way: str) -> torch.Tensor:
        model = self._copy(ablation, way)
        ids = torch.tensor([tokens])
        # A model whose layers cannot be told has a baseline nevertheless.
        skips = ablation.removed() and way == SKIPPED
        skip = skipped(model, ablation.removed()) if skips else nullcontext()
        with skip, torch.inference_mode():
            said = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        if self._changes_itself is None and way != SAVED:
            before, now = _tensors(self.model), _tensors(model)
            self._changes_itself = any(not _same(before[name], now[name]) for name in before)
        return said

    def _copy(self, ablation: Ablation, way: str) -> nn.Module:
        key = (way, ablation)
        if self._changes_itself is not False or key not in self._copies:
            loaded = self._loaded[ablation] if way == SAVED else None
            self._copies[key] = copy.deepcopy(self.model if loaded is None else loaded)
            if way == DELETED:
                delete_layers(self._copies[key], ablation.removed())
        return self._copies[key]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a call may change: weights, and buffers that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)))


def saved_and_loaded(model: Any, removed: Sequence[int]) -> nn.Module:
    """Write the checkpoint without layers as `tracker export` does, and load it by transformers."""
    with TemporaryDirectory() as folder:
        without(copy.deepcopy(model), removed).save_pretrained(folder)
        loaded, found = type(model).from_pretrained(
            folder,
            dtype=torch.float32,  # tables too, as in the model before it became a double
            attn_implementation=model.config._attn_implementation,
            experts_implementation=model.config._experts_implementation,
            output_loading_info=True,
        )
    if found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]:
        raise ModelError("it asks for other weights")
    return loaded.eval().requires_grad_(False).to(model.dtype)


def delete_layers(model: nn.Module, removed: Sequence[int]) -> None:
    """Delete layers as an export would: lists with an entry a layer cut, the others renumbered."""
    layers = find_layers(model)
    kept = [index for index in range(LAYERS) if index not in removed]
    owners = [m for m in model.modules() if any(part is layers for part in m.children())]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for owner in [*owners, *configs.values()]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, (list, tuple)) and len(value) == LAYERS:
                setattr(owner, name, type(value)(value[index] for index in kept))
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) == LAYERS:
            config.num_hidden_layers = len(kept)
    for new, old in enumerate(kept):
        for module in layers[old].modules():
            for name in ("layer_idx", "layer_id", "layer_number"):
                if vars(module).get(name) == old:
                    setattr(module, name, new)
    for index in sorted(removed, reverse=True):
        del layers[index]


def examine(variant: Variant) -> Verdict:
    """Measure a variant in both orders, and compare every response with the truth."""
    start = time.monotonic()
    try:
        with _within(SECONDS):
            found = _examine(variant)
    except (Exception, TooLongError) as error:  # noqa: BLE001 - it is what this looks for
        found = Verdict(variant, CRASH, why=_said(error))
    return replace(found, seconds=time.monotonic() - start)


def _examine(variant: Variant) -> Verdict:
    try:
        model = variant.model()
        truth = Truth(model)
        truth.of(INTACT, blocks()[0][0].requests[0])
    except Exception as error:  # noqa: BLE001 - the model's own code
        return Verdict(variant, NO_VARIANT, why=_said(error))
    try:
        found = _compare(model, truth)
    except (CellError, ModelError) as error:
        return Verdict(variant, REFUSED, why=_said(error))
    idle = tuple(
        layer for layer in range(LAYERS) if not _matters(Ablation.parse(f"layer:{layer}"), truth)
    )
    verdict = EXACT if found.agrees else DISCONTINUOUS if _exact_in_double(model, found) else WRONG
    return Verdict(variant, verdict, found.shared, found.largest, found.note, idle)


def _exact_in_double(model: nn.Module, found: _Compared) -> bool:
    """Return whether differences in float32 vanish in float64, with the same sharing.

    Or the engine said that it shares less, and what still differs are answers of a model that
    depend on what follows: equal tokens tie in a top-k.
    """
    double: Any = model.double()
    try:
        # The grouped matrix product of experts knows no float64.
        double.set_experts_implementation("eager")
        truth = Truth(double)
        exactly = _compare(double, truth)
        if exactly.agrees and exactly.shared == found.shared:
            return True
        return exactly.said and all(
            _depends_on_what_follows(truth, requests, ablation)
            for ablation, requests in exactly.differing.items()
        )
    except Exception:  # noqa: BLE001 - a model need not run in float64
        return False


def _depends_on_what_follows(truth: Truth, requests: Sequence[Request], ablation: Ablation) -> bool:
    """Return whether any of some answers changes with the tokens after it."""
    behind = tuple(range(3, VOCABULARY))
    for request in requests:
        size = len(request.continuation)
        for more in (1, 2, 5, 20, 60):
            longer = Request(request.context, request.continuation + behind[:more])
            if len(longer.context) + len(longer.continuation) > MAX_LENGTH:
                break
            if abs(truth.of(ablation, longer, first=size) - truth.of(ablation, request)) > 1e-3:
                return True
    return False


@dataclass(frozen=True)
class _Compared:
    agrees: bool
    largest: float
    shared: str
    said: bool
    note: str
    differing: dict[Ablation, list[Request]]


def _compare(model: nn.Module, truth: Truth) -> _Compared:
    """Measure both cells with copies of a model, and compare them with the truth."""
    kept = Memory()
    cells = [
        _compare_cell(model, truth, rows, ordered, kept)
        for rows, ordered in zip(ROWS, (blocks(), backwards(blocks())), strict=True)
    ]
    return _Compared(
        agrees=all(cell.agrees for cell in cells),
        largest=max(cell.largest for cell in cells),
        shared=max((cell.shared for cell in cells), key=ORDER.index),
        said=all(cell.said for cell in cells),
        # One sentence: of the cell that is wrong or shares less.
        note=max(cells, key=lambda cell: (not cell.agrees, ORDER.index(cell.shared))).note,
        differing={a: r for cell in cells for a, r in cell.differing.items()},
    )


def _compare_cell(
    model: nn.Module, truth: Truth, rows: int, ordered: list[list[Document]], kept: Memory
) -> _Compared:
    documents = [document for block in ordered for document in block]
    engine = Engine(loaded(copy.deepcopy(model)), MAX_LENGTH, row_tokens=rows)
    checked = check(engine, documents, ABLATIONS, kept)
    scores = [one for block in ordered for one in checked.engine.score(block, ABLATIONS)]
    largest, wrong, where = 0.0, [], set()
    others: dict[str, list[str]] = {}
    differing: dict[Ablation, list[Request]] = {}
    for column, ablation in enumerate(ABLATIONS):
        responses = [
            (response.loglikelihood, score.document, request)
            for score in scores
            for response, request in zip(
                score.responses[column], score.document.requests, strict=True
            )
        ]
        far, off = _furthest(responses, ablation, truth)
        # What loads is the truth, but where it is said that something else is measured.
        is_saved = not ablation.removed() or truth.loads(ablation)
        way = SAVED if is_saved else SKIPPED
        other = None if is_saved and not checked.which else SKIPPED if is_saved else DELETED
        if off and other and (found := _in_a_way(responses, ablation, truth, other)):
            (far, off), way = found, other
        if way != SAVED:
            others.setdefault(way, []).append(ablation.name)
        largest = max(largest, far)
        if off:
            wrong.append(f"{ablation.name} by {far:.2g}")
            where |= {document.index for document, _ in off}
            differing[ablation] = [request for _, request in off]
    shared = _shared(checked.engine.sharing)
    said = (checked.which, checked.lost, checked.unsteady)
    note = "; ".join(line for line in said if line)
    if wrong:
        note = (
            f"rows of {rows} shared over {shared}: {', '.join(wrong)}; "
            f"documents {', '.join(map(str, sorted(where)))}"
        )
    elif others and not checked.which:
        note = "; ".join(
            [f"{', '.join(names)}: {NO_FILE[way]}" for way, names in others.items()]
            + ([note] if note else [])
        )
    return _Compared(not wrong, largest, shared, bool(note), note, differing)


def _in_a_way(
    responses: _Responses, ablation: Ablation, truth: Truth, way: str
) -> tuple[float, list[tuple[Document, Request]]] | None:
    """Compare with another model, which the one without a layer may be instead."""
    try:
        far, off = _furthest(responses, ablation, truth, way)
    except Exception:  # noqa: BLE001 - a model need not run with layers deleted
        return None
    return None if off else (far, off)


def _furthest(
    responses: _Responses, ablation: Ablation, truth: Truth, way: str | None = None
) -> tuple[float, list[tuple[Document, Request]]]:
    """Find the largest difference, and the requests whose responses differ beyond rounding."""
    far: float = 0.0
    off: list[tuple[Document, Request]] = []
    for ours, document, request in responses:
        theirs = truth.of(ablation, request, way)
        if not math.isfinite(ours) and not math.isfinite(theirs):
            continue
        difference = abs(ours - theirs)
        far = max(far, difference if math.isfinite(difference) else math.inf)
        if not difference <= 1e-3 + 1e-4 * abs(theirs):
            off.append((document, request))
    return far, off


def _matters(ablation: Ablation, truth: Truth) -> bool:
    return any(
        not abs(truth.of(ablation, request) - truth.of(INTACT, request)) < MATTERS
        for block in blocks()
        for document in block
        for request in document.requests
    )


def _shared(sharing: Any) -> str:
    if sharing.prefix:
        return "documents"
    return "tokens" if sharing.tokens else "depth" if sharing.depth else "nothing"


def _said(error: BaseException) -> str:
    """Return an error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raise an error where it computes for longer, however many others compute beside it."""

    def stop(number: int, frame: Any) -> None:
        raise TooLongError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def prepare() -> None:
    """Make a process fit for models this small, which only wait for a second thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
