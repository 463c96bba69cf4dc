"""Every variant of the registry against an independent truth, and the table that comes of it.

`make families` runs the whole and writes `docs/families.md`. The truth shares no code with the
engine: a fresh copy of the model, the layer's output replaced by its input, one plain forward pass
a request, on the tokens that lm-eval reads. Two cells are measured: blocks of documents in one
order with small rows, and all of it backwards with large ones.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import random
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.ablations import single_layers
from tests.engine.plain import Memory, loaded, skipped
from tests.engine.registry import (
    FAMILY_NAMES,
    LAYERS,
    NOT_BUILT,
    ORIGINAL,
    VOCABULARY,
    Variant,
    config_class,
    families,
    variants,
)
from tracker.ablations import INTACT, Ablation
from tracker.documents import Document, Request
from tracker.engine.check import check
from tracker.engine.sweep import Engine
from tracker.errors import CellError, ModelError
from tracker.models.layers import find_layers
from tracker.provenance import content_hash, file_hash, package_versions

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MAX_LENGTH = 176
ABLATIONS = [*single_layers(tuple(range(LAYERS))), Ablation((1, 2))]
ROWS = (192, 1024)
"""Tokens of a row on a processor and on an accelerator."""
SECONDS = 240
"""Of computing that one variant may take."""
PROCESSES = 2
MATTERS = 0.02
"""Nats that a layer's removal must move, or its equality says nothing."""

EXACT, REFUSED, DISCONTINUOUS = "exact", "refused", "discontinuous"
WRONG, CRASH, NO_VARIANT = "SILENTLY WRONG", "CRASH", "not accepted"
FAILURES = (WRONG, CRASH)
ORDER = ("documents", "tokens", "depth", "nothing")
"""How far is shared, the furthest first."""

_Responses = Sequence[tuple[float, Document, Request]]


@dataclass(frozen=True)
class Verdict:
    """What became of a variant.

    Attributes:
        variant: Which.
        verdict: One of the words above.
        shared: How far: over documents, tokens, depth or nothing; the least of both cells.
        difference: Largest difference from the truth, in nats.
        why: What is to be said of it: why refused, where wrong, what shares less.
        idle: Layers whose removal moves less than `MATTERS`.
        seconds: Time that it took.
    """

    variant: Variant
    verdict: str
    shared: str = ""
    difference: float = 0.0
    why: str = ""
    idle: tuple[int, ...] = ()
    seconds: float = 0.0

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
    short = [
        [Request(context, letter) for letter in letters]
        for context in map(some, (120, 100, 40, 60, 30, 50))
    ]
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
    """What a model says about requests without some layers, by one plain forward pass each."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._changes_itself: bool | None = None
        self._said: dict[tuple[bool, Ablation, tuple[int, ...]], torch.Tensor] = {}
        self._copies: dict[tuple[bool, Ablation], nn.Module] = {}

    def of(
        self,
        ablation: Ablation,
        request: Request,
        deleted: bool = False,
        first: int | None = None,
    ) -> float:
        """Sum the log-probabilities of a continuation, or of its first tokens."""
        tokens = (request.context + request.continuation)[-(MAX_LENGTH + 1) :][:-1]
        key = (deleted, ablation, tokens)
        if key not in self._said:
            self._said[key] = self._forward(ablation, tokens, deleted)
        target = torch.tensor(request.continuation)
        said = self._said[key][-len(request.continuation) :]
        return float(said.gather(1, target[:, None])[:first].sum())

    def _forward(self, ablation: Ablation, tokens: tuple[int, ...], deleted: bool) -> torch.Tensor:
        model = self._copy(ablation, deleted)
        ids = torch.tensor([tokens])
        # A model whose layers cannot be told has a baseline nevertheless.
        skip = skipped(model, ablation.layers) if ablation.layers and not deleted else nullcontext()
        with skip, torch.inference_mode():
            said = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        if self._changes_itself is None:
            before, now = _tensors(self.model), _tensors(model)
            self._changes_itself = any(not _same(before[name], now[name]) for name in before)
        return said

    def _copy(self, ablation: Ablation, deleted: bool) -> nn.Module:
        key = (deleted, ablation)
        if self._changes_itself is not False or key not in self._copies:
            self._copies[key] = copy.deepcopy(self.model)
            if deleted:
                delete_layers(self._copies[key], ablation.layers)
        return self._copies[key]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a call may change: weights, and buffers that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)))


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
    except Exception as error:  # noqa: BLE001 - whatever it was, it is what this looks for
        found = Verdict(variant, CRASH, why=_said(error))
    return Verdict(**{**vars(found), "seconds": time.monotonic() - start})


def _examine(variant: Variant) -> Verdict:
    try:
        model = variant.model()
        truth = Truth(model)
        truth.of(INTACT, blocks()[0][0].requests[0])
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001 - the model's own code
        return Verdict(variant, NO_VARIANT, why=_said(error))
    try:
        found = _compare(model, truth)
    except (CellError, ModelError) as error:
        return Verdict(variant, REFUSED, why=_said(error))
    idle = tuple(layer for layer in range(LAYERS) if not _matters(Ablation((layer,)), truth))
    verdict = EXACT if found.agrees else DISCONTINUOUS if _exact_in_double(model, found) else WRONG
    return Verdict(variant, verdict, found.shared, found.largest, found.note, idle)


def _exact_in_double(model: nn.Module, found: _Compared) -> bool:
    """Say whether what differs in float32 is the same in float64, sharing as much.

    Or the engine said that it shares less, and what still differs are answers of a model that
    depend on what follows: equal tokens tie in a top-k.
    """
    double: Any = model.double()
    try:
        # The grouped matrix product of experts knows no float64.
        double.set_experts_implementation("eager")
        exactly = _compare(double, Truth(double))
        same = exactly.agrees and exactly.shared == found.shared
        truth = Truth(double)
        return same or (
            exactly.said
            and all(
                _depends_on_what_follows(truth, requests, ablation)
                for ablation, requests in exactly.differing.items()
            )
        )
    except TimeoutError:
        raise
    except Exception:  # noqa: BLE001 - a model need not run in float64
        return False


def _depends_on_what_follows(truth: Truth, requests: Sequence[Request], ablation: Ablation) -> bool:
    """Say whether any of some answers changes with the tokens behind it."""
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
        note="; ".join(dict.fromkeys(cell.note for cell in cells if cell.note)),
        differing={a: r for cell in cells for a, r in cell.differing.items()},
    )


def _compare_cell(
    model: nn.Module, truth: Truth, rows: int, ordered: list[list[Document]], kept: Memory
) -> _Compared:
    documents = [document for block in ordered for document in block]
    engine = Engine(loaded(copy.deepcopy(model)), MAX_LENGTH, row_tokens=rows)
    checked = check(engine, documents, ABLATIONS, kept)
    scores = [one for block in ordered for one in checked.engine.score(block, ABLATIONS)]
    largest, wrong, deleted, where = 0.0, [], [], set()
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
        if off and ablation.layers and (other := _as_if_deleted(responses, ablation, truth)):
            far, off = other
            deleted.append(ablation.name)
        largest = max(largest, far)
        if off:
            wrong.append(f"{ablation.name} by {far:.2g}")
            where |= {document.index for document, _ in off}
            differing[ablation] = [request for _, request in off]
    shared = _shared(checked.engine.sharing)
    note = "; ".join(line for line in (checked.lost, checked.unsteady) if line)
    if wrong:
        note = (
            f"rows of {rows} shared over {shared}: {', '.join(wrong)}; "
            f"documents {', '.join(map(str, sorted(where)))}"
        )
    elif deleted:
        note = f"{', '.join(deleted)}: as the model with these layers deleted"
    return _Compared(not wrong, largest, shared, bool(note), note, differing)


def _as_if_deleted(
    responses: _Responses, ablation: Ablation, truth: Truth
) -> tuple[float, list[tuple[Document, Request]]] | None:
    """Compare with a re-indexed model, where that says something else by nature."""
    try:
        far, off = _furthest(responses, ablation, truth, deleted=True)
    except TimeoutError:
        raise
    except Exception:  # noqa: BLE001 - a model need not run with layers deleted
        return None
    return None if off else (far, off)


def _furthest(
    responses: _Responses, ablation: Ablation, truth: Truth, deleted: bool = False
) -> tuple[float, list[tuple[Document, Request]]]:
    """Find the largest difference, and the requests whose responses differ beyond rounding."""
    far: float = 0.0
    off: list[tuple[Document, Request]] = []
    for ours, document, request in responses:
        theirs = truth.of(ablation, request, deleted)
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


def _said(error: Exception) -> str:
    """Say in one line what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raise an error where it computes for longer, however many others compute beside it."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def page(verdicts: Sequence[Verdict]) -> str:
    """Write the table of families, their variants merged."""
    every = sum(1 for family in families() for _ in variants(family))
    counts = Counter(one.verdict for one in verdicts)
    found = ", ".join(f"{name}: {counts[name]}" for name in (EXACT, REFUSED, DISCONTINUOUS))
    lines = [
        "# Families",
        "",
        "This page is generated: `make families` measures and writes it.",
        f"It holds {len(verdicts):,} of {every:,} variants.",
        "",
        "Every causal language model of the installed transformers",
        f"({transformers.__version__}), tiny and random, in variants of its windows, chunks, kinds",
        "of layers, rotary positions and switches. Each is measured by the engine, in two orders",
        "of documents of many lengths, and compared with one plain forward pass a request of the",
        "model whose removed layer hands on its input.",
        "",
        f"**{found}, silently wrong: {counts[WRONG]}, crashed: {counts[CRASH]}.** Another",
        f"{counts[NO_VARIANT]} settings are not accepted by their classes.",
        "",
        "- *Shared*, exactly: over *documents* (their common beginning is read once), *tokens*",
        "  (what a document's requests have in common is read once), *depth* (layers below the",
        "  removed one run once) or *nothing*. Variants are named that share unlike most.",
        "- *Exact to*: the largest difference from the truth, in nats.",
        "- *Discontinuous*: a router or a top-k flips within float32's rounding; in float64 the",
        "  same model is exact.",
        "",
        "| family | shared | exact to | else |",
        "|---|---|---|---|",
    ]
    for family in families():
        own = [one for one in verdicts if one.variant.family == family]
        if own:
            lines.append(_row(family, own))
    lines += ["", "## Not built", "", "| family | why |", "|---|---|"]
    lines += [
        f"| {family} | {NOT_BUILT[family]} |" for family in FAMILY_NAMES if family in NOT_BUILT
    ]
    return "\n".join(lines) + "\n"


def in_short(text: str) -> str:
    """Say of the page of families which share how far: the table in `docs/models.md`."""
    far: dict[str, list[str]] = {}
    table = text[text.index("| family | shared |") : text.index("## Not built")]
    for line in table.splitlines()[2:]:
        if line:
            family, shared, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            name = re.sub(r" \(.*", "", family).removesuffix("_text")
            names = far.setdefault(re.split("[;,]", shared)[0].strip(), [])
            names += [name] if name not in names else []
    lines = ["| shared | families, most of whose variants share so far |", "|---|---|"]
    for place, words in IN_SHORT.items():
        names = far.pop(place, [])
        lines.append(f"| {words} | {len(names)}: {', '.join(names) or 'none'} |")
    assert not far, f"the page of families knows {list(far)}"
    return "\n".join(lines)


IN_SHORT = {
    "documents": "over depth, over tokens, and what documents have in common",
    "tokens": "over depth and tokens",
    "depth": "over depth",
    "nothing": "nothing: one plain pass a request",
    "–": "refused by name",
}
BEGIN, END = "<!-- made by `make families` -->\n", "\n<!-- end -->"


def write_in_short() -> None:
    """Write the table into `docs/models.md`."""
    path = PAGE.with_name("models.md")
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + BEGIN + in_short(PAGE.read_text()) + END + after)


def _row(family: str, verdicts: Sequence[Verdict]) -> str:
    exact = [one for one in verdicts if one.verdict == EXACT]
    most = Counter(one.shared for one in exact).most_common(1)
    shared = [
        how
        if most and how == most[0][0]
        else f"{how}: {', '.join(one.variant.name for one in exact if one.shared == how)}"
        for how in sorted({one.shared for one in exact}, key=lambda how: (how != most[0][0], how))
    ]
    besides: dict[str, list[str]] = {}
    for one in verdicts:
        if one.verdict not in (EXACT, NO_VARIANT):
            far = "" if one.verdict == REFUSED else f" by {one.difference:.2g} nats"
            said = f"{one.verdict}{far}" + (f" ({one.why})" if one.verdict == REFUSED else "")
            besides.setdefault(said, []).append(one.variant.name)
    cells = (
        f"{family} ({config_class(family).__name__})",
        "; ".join(shared) or "–",
        f"{max(one.difference for one in exact):.0e}" if exact else "–",
        "; ".join(
            f"{said}: {'all' if len(names) == len(verdicts) else ', '.join(names)}"
            for said, names in besides.items()
        ),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _begun() -> Path:
    """Where verdicts stand until the page is written: those of this code and these versions."""
    root = PAGE.parents[1]
    rooms = ("tracker/engine", "tracker/models", "tests/engine")
    code = file_hash(path for room in rooms for path in (root / room).glob("*.py"))
    name = content_hash([code, package_versions()])[:16]
    return root / "build" / f"families-{name}.jsonl"


def found_before(todo: Sequence[Variant], begun: Path) -> list[Verdict]:
    """Look up what a survey that was stopped has found; failures are looked at again."""
    known = {}
    for line in begun.read_text().splitlines() if begun.exists() else []:
        with suppress(ValueError):  # the last line of one that was killed
            found = json.loads(line)
            name = found.pop("variant")
            known[name] = {**found, "idle": tuple(found["idle"])}
    again = [Verdict(each, **known[str(each)]) for each in todo if str(each) in known]
    return [each for each in again if each.verdict not in FAILURES]


def note(verdict: Verdict, begun: Path) -> None:
    """Add a verdict to what was found."""
    begun.parent.mkdir(exist_ok=True)
    with begun.open("a") as file:
        file.write(json.dumps({**vars(verdict), "variant": str(verdict.variant)}) + "\n")


def main() -> int:
    """Examine every variant, print a line each, and write the page."""
    wanted = sys.argv[1:] or families()
    todo = [variant for family in wanted for variant in variants(family)]
    begun = _begun()
    verdicts = found_before(todo, begun)
    if verdicts:
        print(f"{len(verdicts)} of {len(todo)} were examined before")  # noqa: T201
    known = {str(each.variant) for each in verdicts}
    left = [variant for variant in todo if str(variant) not in known]
    with multiprocessing.get_context("spawn").Pool(PROCESSES, prepare) as pool:
        try:
            for verdict in pool.imap_unordered(examine, left):
                verdicts.append(verdict)
                note(verdict, begun)
                print(f"{len(verdicts)}/{len(todo)} {verdict}", flush=True)  # noqa: T201
        except KeyboardInterrupt:
            pool.terminate()
            print("stopped; the same command goes on, and the page stays as it was")  # noqa: T201
    for name, count in Counter(one.verdict for one in verdicts).most_common():
        print(f"{name}: {count}")  # noqa: T201
    if len(verdicts) < len(todo):
        return 130
    if not sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(sorted(verdicts, key=lambda one: str(one.variant))))
        write_in_short()
        begun.unlink(missing_ok=True)
    return int(any(one.verdict in FAILURES for one in verdicts))


if __name__ == "__main__":
    sys.exit(main())
