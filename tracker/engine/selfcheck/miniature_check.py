"""Test computation sharing for an architecture on a tiny model before relying on it.

Texts of random tokens cross all lengths that the model's configuration defines. There are short and
long ones in one row, branches, a kept beginning, and answers longer than a window. Lengths lie on
both sides of each threshold, in one order and its reverse. They are scored with every ablation,
shared and on really changed models.
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
"""The first token id that is drawn; smaller ones are special in many vocabularies."""
_Tokens = Callable[[int], tuple[int, ...]]
"""Function that draws so many tokens, or as many as a model reads."""
_Content = tuple[tuple[int, ...], Sequence[tuple[int, ...]]]
"""A context and its answers."""


def probe_calls(vocabulary: int, longest: int) -> list[list[Document]]:
    """Draw texts of up to `longest` tokens, grouped like the blocks of a cell.

    `vocabulary` is the number of token ids.
    """
    tokens = _drawing(vocabulary, longest - 1)
    # Texts that end just before every second threshold, and continue beyond it.
    return [
        _branches(tokens),
        _documents([(tokens(n - 1), [tokens(n // 8), (3,)]) for n in STEPS[1::2]]),
        *(_shared(tokens, min(common, longest - 12)) for common in (SHORTEST + 4, SHORTEST + 1)),
    ]


def reaching_calls(
    vocabulary: int, longest: int, nodes: int, widest: int, sharing: Sharing
) -> list[list[Document]]:
    """Draw texts of every order of length up to `longest`, and rows of so many nodes.

    `vocabulary` is the number of token ids. Rows of several texts have up to `nodes` nodes, those
    of one document up to `widest`, which is more than any text has tokens. Texts that test sharing
    beyond `sharing` are left out.
    """
    tokens = _drawing(vocabulary)

    def doubled(common: tuple[int, ...], context: int) -> _Content:
        # Alone, the one-token answer takes a call half as long as the one that both share.
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
    """Draw texts on both sides of some lengths, and of a document's nodes if it has so many.

    `vocabulary` is the number of token ids, and `widest` the number of nodes of a document.
    """
    tokens = _drawing(vocabulary)
    contents: list[_Content] = []
    for switch in switches:
        contents.append((tokens(switch - 3), [tokens(1), tokens(6)]))
        branches = [tokens(switch // 3) for _ in range(2 if switch <= widest else 1)]
        contents.append((tokens(switch // 2), branches))
    return [_documents(contents)]


def _drawing(vocabulary: int, most: int | None = None) -> _Tokens:
    """Return a function that draws texts, the same ones each time, of at most so many tokens."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(FIRST, vocabulary) for _ in range(count)[:most])

    return tokens


def _branches(tokens: _Tokens) -> list[Document]:
    """Build documents with branches and single-letter answers, long before short."""
    letters = [(tokens(n), [(3,), (4,)]) for n in (44, 33, 12, 26, 9)]
    spoken = [(tokens(n), [tokens(k) for k in (1, 1, 3, 6)]) for n in (7, 15)]
    long = [(tokens(5), [tokens(30), tokens(28)])]
    return _documents([*letters, *spoken, *long])


def _shared(tokens: _Tokens, length: int) -> list[Document]:
    """Build documents with a beginning that is read separately."""
    common = tokens(length)
    return _documents([(common + tokens(n), [(3,), (4, 5, 6)]) for n in (5, 2, 8)])


def _documents(contents: Sequence[_Content]) -> list[Document]:
    return [
        Document("probe", number, requests, number % len(requests), len(requests))
        for number, (context, answers) in enumerate(contents)
        for requests in [tuple(Request(context, tuple(answer)) for answer in answers)]
    ]


WAYS = (FULL, NO_PREFIX, DEPTH_ONLY, PLAIN)
"""Ways of sharing, from the most to the least."""
TOLERANCE = 2e-4, 1e-5
"""Tolerances of a miniature's answers: nats, and share of the answer."""
ANSWERS = 128
"""Number of answers compared besides all of the baseline's."""
SOME = 4
"""Minimum number of answers compared per ablation."""
FEW = 16
"""Maximum number of ablations that are scored in both orders."""
OFTEN = 0.02
"""Share of answers at discontinuities of the model above which sharing is rejected."""
ROW_TOKENS = 40
"""Nodes of a row: several short texts share one, a long one has its own."""
MAX_LENGTH = 96
LONGEST_REACH = 1024
"""Tokens up to which a miniature is tested at every length; longer calls would be too slow."""
TEXTS = 5
"""Number of texts that are read in two orders, besides the longest."""
DRAWN = 128
"""Number of heads or spans up to which all are compared; of more, this many are drawn."""
_Place = tuple[Ablation, int, int, int]
"""An ablation, and the number of a call, a document and a request."""


def miniature_key(
    model: PreTrainedModel,
    ablations: Sequence[Ablation],
    paths: Sequence[NumberPath],
    rows: tuple[int, int, int] | None,
    blank: bool,
) -> str:
    """Return the key of a check: SHA-256 in hexadecimal of all that its verdict depends on.

    That is the configuration, the ablations, the numbers in reach (`paths`), the lengths of the
    texts (`rows`, of `check_longer_texts`; None = short), whether they hold a `blank` token,
    versions, machine, this code and the model's own, which its checkpoint may bring. The weights
    do not count.
    """
    here = Path(__file__).parents[2]
    its_own = Path(inspect.getfile(type(model))).parent
    ours = (path for room in ("engine", "models") for path in (here / room).rglob("*.py"))
    code = file_hash([*ours, *its_own.glob("*.py")])
    config = model.config.to_dict()
    for name in ("_name_or_path", "quantization_config", "dtype"):
        config.pop(name, None)
    # The kernels that compute the model; `to_dict` leaves them out.
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
        ablations: All ablations of the cell, with the baseline.
        paths: Numbers of the configuration that the cell's texts can reach.
        blank: Whether a token of the cell's texts has an embedding of zeros. Attention scores of
            such a token are ties, which its place in the row decides.

    Returns:
        The verdict, with the sharing that is exact.

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
    """Check the architecture with texts as long as a cell's, for thresholds in the model's code.

    Args:
        engine: The engine; no call has changed its model yet.
        ablations: All ablations of the cell, with the baseline.
        verdict: The verdict on short texts.
        rows: Maximum tokens of a text of the cell, and maximum nodes of a row of several texts and
            of one document.
        blank: Whether a token of the texts has an embedding of zeros, as for `check_miniature`.

    Returns:
        The verdict, with the sharing that is exact.

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
    """Find the lengths of a call at which something changes, beyond those that are all tested.

    Also returns whether every length from the first one on differs from every other.
    """
    if longest <= LONGEST_REACH:
        return (), False
    doubled = (LONGEST_REACH << times for times in range(longest.bit_length()))
    lengths = {t for t in (*doubled, engine.max_length) if LONGEST_REACH <= t < longest}
    known = verdict.quirks(small).lengths
    found = find_switches(small, known, {*lengths, longest})
    return found.thresholds[len(known.thresholds) :], found.each


def some_of(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Reduce ablations of parts and of spans to a drawn selection, where there are very many.

    A model has hundreds of heads and thousands of spans, which all take the same code paths.
    Ablations that remove layers stay.
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
    """Map the parts of a model to the few of its miniature; return no ablation twice.

    Sets keep at most half of a layer's parts: a router chooses two of a miniature's four.
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
        # Rows of a miniature fill no blocks of most formats; few bits reveal errors.
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
    """Use one thread for a miniature until exit: a second one hardly helps, and may wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if miniature else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _blank(model: PreTrainedModel) -> None:
    """Set the embedding of a token that texts are drawn from to zeros."""
    model.get_input_embeddings().weight[FIRST] = 0


def _vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model both reads and predicts: Moshi reads one more."""
    head = model.get_output_embeddings()
    read = int(model.get_input_embeddings().num_embeddings)
    return read if head is None else min(read, int(head.weight.shape[0]))


def _engine(
    engine: Engine, model: PreTrainedModel, verdict: Verdict, longest: int, nodes: int
) -> Engine:
    """Build an engine for a miniature that reads so many tokens, in rows of so many nodes."""
    device = torch.device("cpu")
    loaded = replace(engine.loaded, model=model, layers=find_layers(model), device=device)
    most = min(longest, engine.max_length)
    replacements = _random_replacements(loaded.layers)
    # Streams pass a layer in several batches, as they do with long texts or many streams.
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
    """Build random replacements of layers: fitting them takes a checked model."""
    return {layer: RandomReplacement(layer) for layer in range(len(layers))}


def _check_itself(engine: Engine, ablations: Sequence[Ablation]) -> Verdict:
    """Check a model without a miniature, on the assumption that every length matters."""
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
    """Lower a verdict to the sharing that is exact on the reference's model."""
    engine = truth.engine
    if not truth.is_half:  # the order of summation on an accelerator may vary
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
    """Raise CellError if a model's answers depend on the texts before them.

    One copy of the model reads texts of rising length, another of falling; both must agree. If
    not, there is no reference to compare with.
    """
    ordered = sorted((d.requests[-1] for call in calls for d in call), key=lambda r: r.length)
    texts = [*ordered[:: -(-len(ordered) // TEXTS)], ordered[-1]]
    rising, falling = engine.without(INTACT), engine.without(INTACT)
    nats, share = TOLERANCE

    def both_orders() -> list[tuple[float, float]]:
        after_shorter = [rising.answer(text).loglikelihood for text in texts]
        after_longer = [falling.answer(text).loglikelihood for text in reversed(texts)][::-1]
        return list(zip(after_shorter, after_longer, strict=True))

    # `most_sharing` reports texts that the model cannot answer in any way.
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
    """Find the most sharing that gives the results of the really changed model.

    Args:
        start: The most sharing to test.
        engine: The engine that names the model and makes the copy that explains a loss.
        compare: Function that compares answers computed with some sharing.

    Returns:
        The sharing, its comparison, and the reason why more was lost, if it was.

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
    """Yield the answers to compare: all of the baseline, and `some` of each other ablation.

    They are drawn from one call after the other, since each call tests something else.
    """
    every = [
        [(c, d, r) for d, document in enumerate(call) for r in range(len(document.requests))]
        for c, call in enumerate(calls)
    ]
    draw = random.Random(0)
    for ablation in ablations:
        drawn = zip_longest(*(draw.sample(places, len(places)) for places in every))
        chosen = [place for places in drawn for place in places if place is not None]
        # Sorted, so that answers to one text follow each other.
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

    Of more than `FEW` ablations, half are scored in order and half in reverse, since order affects
    a state that all of them share. The baseline is scored both times. The halves are drawn,
    because kinds of layers may alternate.
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
