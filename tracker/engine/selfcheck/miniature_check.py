"""A check of an architecture's sharing on a small model, before anything of it is believed.

Texts of random tokens are made to cross whatever the model's configuration counts tokens by: short
and long ones in one row, branches, a beginning that is kept, answers longer than a window, lengths
on both sides of each threshold, in one order and its reverse. They are scored with every ablation,
shared and on models that were really changed.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.documents import Document, Request
from tracker.core.errors import CellError
from tracker.core.grouping import grouped
from tracker.core.kinds import Action, Component
from tracker.core.model_parts import one_experts
from tracker.core.provenance import content_hash, file_hash, machine, package_versions
from tracker.engine.forward.layer import RandomReplacement
from tracker.engine.refusal import refused, tried
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, NO_PREFIX, ONE_BY_ONE, PLAIN, Sharing
from tracker.engine.scoring.score import SHORTEST
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.quirks import STEPS, as_removed, find_quirks, find_switches, shortened
from tracker.engine.selfcheck.reference import (
    Comparison,
    Reference,
    Verdict,
    in_words,
    less,
    of_difference,
    of_refusal,
)
from tracker.models.layers import find_layers
from tracker.models.miniature import NumberPath, miniature, numbers
from tracker.models.sources import parts_of

FIRST = 2
"""The first token id that is drawn; those before are special in many a vocabulary."""
_Tokens = Callable[[int], tuple[int, ...]]
"""Draws as many tokens, or as many as a model reads."""
_Content = tuple[tuple[int, ...], Sequence[tuple[int, ...]]]
"""A context, and its answers."""


def probe_calls(vocabulary: int, longest: int) -> list[list[Document]]:
    """Draw texts of up to `longest` tokens, grouped as blocks of a cell are scored.

    `vocabulary` is how many token ids there are.
    """
    tokens = _drawing(vocabulary, longest - 1)
    # Texts that end just before every second threshold, and go on.
    return [
        _branches(tokens),
        _documents([(tokens(n - 1), [tokens(n // 8), (3,)]) for n in STEPS[1::2]]),
        *(_shared(tokens, min(common, longest - 12)) for common in (SHORTEST + 4, SHORTEST + 1)),
    ]


def reaching_calls(
    vocabulary: int, longest: int, nodes: int, widest: int, sharing: Sharing
) -> list[list[Document]]:
    """Draw texts of every order of length up to `longest`, and rows of so many nodes.

    `vocabulary` is how many token ids there are. Rows of several texts have up to so many `nodes`,
    those of one document up to `widest`, and more than any text has tokens. What `sharing` would
    not do to a text needs none.
    """
    tokens = _drawing(vocabulary)

    def doubled(common: tuple[int, ...], context: int) -> _Content:
        # Asked alone, the one-token answer takes a call half as long as the one that both share.
        more = tokens(context + 2)
        return common + tokens(context), [more[:1], more]

    halves = [(longest >> times) - 1 for times in range(1, longest.bit_length() - 1)]
    beginning = tokens(longest // 2)
    branches = max(2, -(-(widest - longest // 4) // max(1, longest // 2)))
    wide = tokens(longest // 4), [tokens(longest // 2) for _ in range(branches)]
    full = [(tokens(13), [tokens(3)]) for _ in range(nodes // 16)]
    contents: list[Sequence[_Content]] = [
        [doubled((), half) for half in halves],
        full,
        [wide] if sharing.tokens else [],
        # Long and short; all lengths are crossed above.
        [doubled(beginning, half) for half in halves[1::3]]
        + [(beginning + context, answers) for context, answers in full]
        if sharing.prefix
        else [],
    ]
    return [_documents(texts) for texts in contents if texts]


def switching_calls(vocabulary: int, switches: Sequence[int], widest: int) -> list[list[Document]]:
    """Draw texts on both sides of some lengths, of a document's nodes too where it has so many.

    `vocabulary` is how many token ids there are, and `widest` how many nodes a document has.
    """
    tokens = _drawing(vocabulary)
    contents: list[_Content] = []
    for switch in switches:
        contents.append((tokens(switch - 3), [tokens(1), tokens(6)]))
        branches = [tokens(switch // 3) for _ in range(2 if switch <= widest else 1)]
        contents.append((tokens(switch // 2), branches))
    return [_documents(contents)]


def _drawing(vocabulary: int, most: int | None = None) -> _Tokens:
    """Begin to draw texts, the same ones each time, of at most so many tokens."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(FIRST, vocabulary) for _ in range(count)[:most])

    return tokens


def _branches(tokens: _Tokens) -> list[Document]:
    """Branches and single letters, long before short."""
    letters = [(tokens(n), [(3,), (4,)]) for n in (44, 33, 12, 26, 9)]
    spoken = [(tokens(n), [tokens(k) for k in (1, 1, 3, 6)]) for n in (7, 15)]
    long = [(tokens(5), [tokens(30), tokens(28)])]
    return _documents([*letters, *spoken, *long])


def _shared(tokens: _Tokens, length: int) -> list[Document]:
    """Texts with a beginning that is read apart."""
    common = tokens(length)
    return _documents([(common + tokens(n), [(3,), (4, 5, 6)]) for n in (5, 2, 8)])


def _documents(contents: Sequence[_Content]) -> list[Document]:
    return [
        Document("probe", number, requests, number % len(requests), len(requests))
        for number, (context, answers) in enumerate(contents)
        for requests in [tuple(Request(context, tuple(answer)) for answer in answers)]
    ]


WAYS = (FULL, NO_PREFIX, DEPTH_ONLY, PLAIN)
"""From the most sharing to the least."""
TOLERANCE = 2e-4, 1e-5
"""Nats, and share of itself, by which an answer of a miniature may differ."""
ANSWERS = 128
"""How many answers are compared besides the baseline's, which are all."""
SOME = 4
"""How many of each ablation at least."""
FEW = 16
"""Up to how many ablations are asked in both orders."""
OFTEN = 0.02
"""Share of answers at a discontinuity of the model from which sharing is left alone."""
ROW_TOKENS = 40
"""Nodes of a row: several short texts share one, a long one has its own."""
MAX_LENGTH = 96
LONGEST_REACH = 1024
"""Tokens up to which a miniature is asked every length: of more, calls would be no cheap matter."""
TEXTS = 5
"""Texts that are asked in two orders, besides the longest."""
DRAWN = 128
"""Of so many heads or stretches each is asked; of more, these are drawn."""
_Place = tuple[Ablation, int, int, int]
"""Which ablation, and the number of a call, a document and a request."""


def miniature_key(
    model: PreTrainedModel,
    ablations: Sequence[Ablation],
    paths: Sequence[NumberPath],
    rows: tuple[int, int, int] | None,
    blank: bool,
) -> str:
    """Name a check by all that its verdict follows from, as SHA-256 in hexadecimal.

    That is the configuration, what is removed, the numbers in reach (`paths`), how long the texts
    are (`rows`, of `check_longer_texts`; None = short), whether they hold a `blank` token,
    versions, machine, this code and the model's own, which its checkpoint may bring; not the
    weights.
    """
    here = Path(__file__).parents[2]
    its_own = Path(inspect.getfile(type(model))).parent
    ours = (path for room in ("engine", "models") for path in (here / room).rglob("*.py"))
    code = file_hash([*ours, *its_own.glob("*.py")])
    config = model.config.to_dict()
    for name in ("_name_or_path", "quantization_config", "dtype"):
        config.pop(name, None)
    # Which kernels compute it; `to_dict` leaves them out.
    kernels = [
        getattr(model.config, f"_{part}_implementation", None) for part in ("attn", "experts")
    ]
    names = [ablation.name for ablation in ablations]
    of_the_model = [type(model).__name__, config, kernels]
    texts = [paths, rows, blank]
    return content_hash([of_the_model, names, texts, package_versions(), machine(), code])


def reachable(model: PreTrainedModel, reach: int) -> tuple[NumberPath, ...]:
    """List the paths of a configuration's numbers that rows of up to `reach` tokens can reach."""
    return tuple(p for p, value in numbers(model.config.get_text_config()) if value <= reach)


def check_miniature(
    engine: Engine, ablations: Sequence[Ablation], paths: Sequence[NumberPath], blank: bool
) -> Verdict:
    """Check the architecture of an engine's model with short texts.

    Args:
        engine: The engine; no call has changed its model yet.
        ablations: All that will be removed, with the baseline.
        paths: Numbers of the configuration that the cell's texts can reach.
        blank: Whether a token of the cell's texts has an embedding of zeros. What such a token asks
            of the others are ties, which fall to one by its place in the row.

    Returns:
        What may be shared.

    Raises:
        CellError: The model cannot be measured: it is not causal, or not without some layer.
    """
    small = miniature(engine.loaded.model)
    if small is None:
        return _check_itself(engine, some_of(ablations))
    ablations = _of_its_parts(small, some_of(ablations))

    def truth_of(model: PreTrainedModel, verdict: Verdict) -> Reference:
        return Reference(_engine(engine, model, verdict, MAX_LENGTH, ROW_TOKENS), miniature=True)

    with _threads_for_a_text(miniature=True):
        found = find_quirks(small, paths)
    if not found.causal:
        raise CellError(
            f"{engine.class_name} is not causal: what it says of a token depends on later tokens "
            "of the same call, so no two ways to ask it agree"
        )
    leftovers, first = tuple(sorted(found.leftovers)), tuple(sorted(found.first))
    verdict = Verdict(FULL, lengths=found.lengths, leftovers=leftovers, first=first)
    models = [small, *shortened(small, found.matters)]
    if blank:
        for each in models:
            _blank(each)
    truth = truth_of(small, verdict)
    with _threads_for_a_text(miniature=True):
        verdict = as_removed(truth, ablations, verdict)
    calls = probe_calls(_vocabulary(small), min(MAX_LENGTH, engine.max_length))
    asked = list(_asked(calls, ablations, max(SOME, ANSWERS // len(ablations))))
    for each in models:
        if each is not small or verdict.stay or verdict.loaded:
            truth = truth_of(each, verdict)
        verdict = _checked(truth, ablations, verdict, calls, asked)
    return verdict


def check_longer_texts(
    engine: Engine,
    ablations: Sequence[Ablation],
    verdict: Verdict,
    rows: tuple[int, int, int],
    blank: bool,
) -> Verdict:
    """Check it with texts as long as a cell's: some count tokens that no number tells of.

    Args:
        engine: The engine; no call has changed its model yet.
        ablations: All that will be removed, with the baseline.
        verdict: What short texts have shown.
        rows: Up to how many tokens a text of the cell has, and nodes a row of several texts, and
            one document.
        blank: As for `check_miniature`.

    Returns:
        What may be shared.

    Raises:
        CellError: The model cannot be measured.
    """
    if verdict.tried_on == "the model":
        return verdict
    small = miniature(engine.loaded.model)
    if blank:
        _blank(small)
    longest, nodes, widest = rows
    some = _of_its_parts(small, (INTACT, ablations[len(ablations) // 2]))

    def checked(calls: Sequence[Sequence[Document]], tokens: int) -> Verdict:
        asked = list(_asked(calls, some, SOME))
        truth = Reference(_engine(engine, small, verdict, tokens, nodes), miniature=True)
        return _checked(truth, some, verdict, calls, asked)

    switches, each = _switches(engine, small, verdict, max(longest, widest))
    if switches:
        verdict = replace(verdict, switches=tuple((tokens, each) for tokens in switches))
        verdict = checked(switching_calls(_vocabulary(small), switches, widest), 2 * max(switches))
    longest, widest = (min(tokens, LONGEST_REACH) for tokens in (longest, widest))
    reached = min(longest, engine.max_length)
    calls = reaching_calls(_vocabulary(small), reached, nodes, widest, verdict.sharing)
    return checked(calls, longest)


def _switches(
    engine: Engine, small: PreTrainedModel, verdict: Verdict, longest: int
) -> tuple[tuple[int, ...], bool]:
    """Find at which lengths of a call, beyond those that are all asked, something changes.

    With them comes whether every length from the first one on is another.
    """
    if longest <= LONGEST_REACH:
        return (), False
    doubled = (LONGEST_REACH << times for times in range(longest.bit_length()))
    lengths = {t for t in (*doubled, engine.max_length) if LONGEST_REACH <= t < longest}
    known = verdict.quirks(small).lengths
    found = find_switches(small, known, {*lengths, longest})
    return found.thresholds[len(known.thresholds) :], found.each


def some_of(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Leave out most of what is done to parts, or with stretches, where that are very many.

    A model has hundreds of heads and thousands of stretches, which all go the same ways; which ones
    are asked is drawn. What removes layers stays.
    """
    many = [
        ablation
        for ablation in ablations
        if ablation.parts or ablation.repeated or (ablation.rounded and not ablation.ends)
    ]
    if len(many) <= DRAWN:
        return list(ablations)
    out = set(many) - set(random.Random(0).sample(many, DRAWN))
    return [ablation for ablation in ablations if ablation not in out]


def _of_its_parts(small: PreTrainedModel, ablations: Sequence[Ablation]) -> list[Ablation]:
    """Take a miniature's few heads for the many of its model; no ablation twice.

    Of sets no more than half of a layer's are left: a router chooses two of a miniature's four.
    """
    parts = parts_of(small.config.get_text_config())

    def of_miniature(change: Change) -> Change:
        part = change.part
        if isinstance(part, int):
            count = parts.numbered(change.component)
            return replace(change, part=part % count) if count else change
        if change.action is not Action.ROUNDED:
            return change
        if part is not None and parts.expert and (expert := one_experts(part)):
            holder, _, name = expert[0].rpartition(".")
            part = f"{holder}.{expert[1] % parts.expert}.{name}"
        # Rows of a miniature fill no blocks of most formats; few bits show what is wrong.
        return replace(change, intervention="int4_row", part=part)

    def smaller(ablation: Ablation) -> Ablation:
        changes = Ablation.of(*map(of_miniature, ablation.changes))
        rest, of_layers = changes.changes - {*changes.parts}, grouped(changes.parts, _place)
        for (_, component), own in of_layers.items():
            rest |= {*own[: max(1, (parts.numbered(component) or 2 * len(own)) // 2)]}
        return Ablation(rest)

    return list(dict.fromkeys(map(smaller, ablations)))


def _place(part: Change) -> tuple[int, Component]:
    return part.layer, part.component


@contextmanager
def _threads_for_a_text(miniature: bool) -> Iterator[None]:
    """A second thread hardly helps a miniature with one text, and where others compute it waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if miniature else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _blank(model: PreTrainedModel) -> None:
    """Let a token that texts are drawn from have an embedding of zeros."""
    model.get_input_embeddings().weight[FIRST] = 0


def _vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model both reads and says: Moshi reads one more."""
    head = model.get_output_embeddings()
    read = int(model.get_input_embeddings().num_embeddings)
    return read if head is None else min(read, int(head.weight.shape[0]))


def _engine(
    engine: Engine, model: PreTrainedModel, verdict: Verdict, longest: int, nodes: int
) -> Engine:
    """An engine for a miniature that reads so many tokens, in rows of so many nodes."""
    device = torch.device("cpu")
    loaded = replace(engine.loaded, model=model, layers=find_layers(model), device=device)
    most = min(longest, engine.max_length)
    replacements = _random_replacements(loaded.layers)
    # Some streams pass a layer after others, as they do where texts are long or streams many.
    return Engine(
        loaded,
        most,
        verdict.quirks(model),
        memory=2**30,
        at_once=2 * nodes,
        replacements=replacements,
        row_tokens=nodes,
    )


def _random_replacements(layers: torch.nn.ModuleList) -> dict[int, RandomReplacement]:
    """Make replacements of layers before any are fitted, which takes a checked model."""
    return {layer: RandomReplacement(layer) for layer in range(len(layers))}


def _check_itself(engine: Engine, ablations: Sequence[Ablation]) -> Verdict:
    """Check a model that has no miniature: every length is taken for a matter of its own."""
    verdict = Verdict(
        DEPTH_ONLY,
        "no miniature of the model can be built on which sharing over tokens could be proven",
        lengths=(((), True),),
        tried_on="the model",
    )
    verdict = as_removed(Reference(engine), ablations, verdict)
    quirks = verdict.quirks(engine.loaded.model)
    engine = replace(engine, quirks=quirks, replacements=_random_replacements(engine.loaded.layers))
    calls = [probe_calls(_vocabulary(engine.loaded.model), engine.max_length)[0][:4]]
    return _checked(Reference(engine), ablations, verdict, calls, [*_asked(calls, ablations, 1)])


def _checked(
    truth: Reference,
    ablations: Sequence[Ablation],
    verdict: Verdict,
    calls: Sequence[Sequence[Document]],
    asked: Sequence[_Place],
) -> Verdict:
    """Lower a verdict to what the truth's model computes exactly."""
    engine = truth.engine
    if not truth.is_half:  # an accelerator need not add up in one order
        with _threads_for_a_text(truth.miniature):
            _refuse_memory(engine, calls)

    def compare(sharing: Sharing) -> Comparison:
        found = compare_both_ways(engine.with_sharing(sharing), calls, ablations, asked, truth)
        if sharing.calls and found.unsteady > OFTEN * found.compared:
            return replace(found, wrong="too often discontinuous")
        return found

    sharing, found, why = most_sharing(verdict.sharing, engine, compare)
    return replace(
        verdict,
        sharing=sharing,
        lost=less(verdict.lost, sharing, why),
        difference=max(found.difference, verdict.difference),
        compared=verdict.compared + found.compared,
        unsteady=verdict.unsteady + found.unsteady,
    )


def _refuse_memory(engine: Engine, calls: Sequence[Sequence[Document]]) -> None:
    """Ask one copy of a model texts of rising length, another of falling: do both say the same?

    If not, there is no truth: what the model says of a text depends on the texts before it.
    """
    ordered = sorted((d.requests[-1] for call in calls for d in call), key=lambda r: r.length)
    texts = [*ordered[:: -(-len(ordered) // TEXTS)], ordered[-1]]
    rising, falling = engine.without(INTACT), engine.without(INTACT)
    nats, share = TOLERANCE

    def both_orders() -> list[tuple[float, float]]:
        after_shorter = [rising.answer(text).loglikelihood for text in texts]
        after_longer = [falling.answer(text).loglikelihood for text in reversed(texts)][::-1]
        return list(zip(after_shorter, after_longer, strict=True))

    # What it does not say in any way is told of by `most_sharing`.
    for one, other in tried(both_orders)[0] or ():
        both_nan = math.isnan(one) and math.isnan(other)
        if not both_nan and not math.isclose(one, other, rel_tol=share, abs_tol=nats):
            raise CellError(
                f"{engine.class_name} contradicts itself: it says {one:.6g} nats of a text after "
                f"shorter ones, and {other:.6g} after longer ones"
            )


def most_sharing(
    start: Sharing, engine: Engine, compare: Callable[[Sharing], Comparison]
) -> tuple[Sharing, Comparison, str | None]:
    """Find the most sharing that gives the numbers of the really pruned model.

    Args:
        start: The most that is tried.
        engine: Names the model, and makes the copy that is called to see why something is lost.
        compare: Compares some answers that are computed with such sharing.

    Returns:
        The sharing, what was compared with it, and why more was lost, if it was.

    Raises:
        CellError: The model does not run even with nothing shared, or contradicts itself.
    """
    name = engine.class_name
    why: Callable[[], str] | None = None
    ways = (*WAYS, ONE_BY_ONE)
    for sharing in ways[ways.index(start) :]:
        try:
            found = compare(sharing)
        except Exception as error:  # a model may refuse this way of sharing
            said = refused(error)
            if said is None:
                raise
            if sharing == ONE_BY_ONE:
                raise CellError(f"{name} cannot be asked one request at a time: {said}") from error
            why = partial(of_refusal, sharing, in_words(error, sharing, name), engine)
            continue
        if found.wrong is None:
            return sharing, found, None if why is None else why()
        if sharing == ONE_BY_ONE:
            raise CellError(f"{name} contradicts itself: {found.wrong}")
        why = partial(of_difference, sharing, found, engine)
    raise AssertionError("the last way returns or raises")


def _asked(
    calls: Sequence[Sequence[Document]], ablations: Sequence[Ablation], some: int
) -> Iterator[_Place]:
    """What is compared: every answer of the baseline, and `some` of each other ablation.

    They are drawn from one call after the other, since each is made to break something else.
    """
    every = [
        [(c, d, r) for d, document in enumerate(call) for r in range(len(document.requests))]
        for c, call in enumerate(calls)
    ]
    draw = random.Random(0)
    for ablation in ablations:
        drawn = zip_longest(*(draw.sample(places, len(places)) for places in every))
        chosen = [place for places in drawn for place in places if place is not None]
        # In order, so that answers to one text stand together.
        for place in sorted(chosen if ablation == INTACT else chosen[:some]):
            yield (ablation, *place)


def compare_both_ways(
    engine: Engine,
    calls: Sequence[Sequence[Document]],
    ablations: Sequence[Ablation],
    asked: Sequence[_Place],
    truth: Reference,
) -> Comparison:
    """Score all calls in order and then in reverse, and compare until something is wrong.

    Of more than `FEW` ablations half are scored in order and half in reverse, since what order may
    change is what all of them are made of; the baseline is scored both times. Which are is drawn:
    kinds of layers may alternate.
    """
    found = Comparison()
    removed = [ablation for ablation in ablations if ablation != INTACT]
    orders = removed, removed
    if len(removed) > FEW:
        drawn = random.Random(0).sample(removed, len(removed))
        orders = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    for step, some in zip((1, -1), orders, strict=True):
        places = {ablation: place for place, ablation in enumerate((INTACT, *some))}
        for number in range(len(calls))[::step]:
            call = calls[number]
            scores = engine.score(call[::step], list(places))[::step]
            mine = [(a, d, r) for a, c, d, r in asked if c == number and a in places]
            with _threads_for_a_text(truth.miniature):
                for ablation, d, r in mine:
                    ours = scores[d].responses[places[ablation]][r].loglikelihood
                    found += truth.compare(ours, ablation, call[d].requests[r], *TOLERANCE)
                    if found.wrong:
                        return found
    return found
