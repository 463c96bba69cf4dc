"""Test shared computation between ablations on a tiny model of the same architecture.

The tiny model (miniature) reads texts of random tokens, longer and shorter than each length in the
model's configuration (e.g. the attention window). The log-likelihoods with shared computation are
compared with the log-likelihoods of changed copies of the model.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from tracker.engine.forward.layer import RandomReplacement
from tracker.engine.forward.streams import Ablations
from tracker.engine.refusal import refusal_reason, try_model
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, NO_PREFIX, ONE_BY_ONE, PLAIN, Sharing
from tracker.engine.scoring.rows import Documents
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.quirks import (
    SMALL_NUMBERS,
    build_shortened,
    find_quirks,
    find_removed_model,
    find_switches,
)
from tracker.engine.selfcheck.reference import (
    STATE,
    Comparison,
    Reference,
    SharingVerdict,
    describe_difference,
    describe_error,
    extend_sharing_note,
    keeps_state,
)
from tracker.models.layers import find_layers
from tracker.models.miniature import NumberPath, build_miniature, find_numbers
from tracker.models.sources import parts_of_config
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.documents import Document, Request
from tracker.schema.errors import CellError
from tracker.schema.grouping import group_by
from tracker.schema.kinds import Action
from tracker.schema.model_parts import split_expert_map
from tracker.schema.provenance import content_hash, describe_machine, file_hash, package_versions

FIRST_TOKEN = 2
"""The smallest token id that is drawn; smaller ids are special in many vocabularies."""
_Tokens = Callable[[int], tuple[int, ...]]
"""Function that draws a given number of tokens, at most as many as a model reads."""
_Content = tuple[tuple[int, ...], Sequence[tuple[int, ...]]]
"""A context and its answers."""


def draw_short_documents(vocabulary: int, longest: int) -> list[list[Document]]:
    """Draw short documents of random tokens for the self-check.

    The engine scores each returned list of documents in one call. `vocabulary` is the number of
    token ids, and `longest` is about the maximum number of tokens of a text.
    """
    tokens = _make_token_source(vocabulary, longest - 1)
    # Texts that end just before every second threshold, and continue beyond it.
    return [
        _branch_documents(tokens),
        _make_documents([(tokens(n - 1), [tokens(n // 8), (3,)]) for n in SMALL_NUMBERS[1::2]]),
        _shared_documents(tokens, min(MIN_PREFIX + 4, longest - 12)),
        _shared_documents(tokens, min(MIN_PREFIX + 1, longest - 12)),
    ]


def draw_long_documents(
    vocabulary: int, longest: int, nodes: int, widest: int, sharing: Sharing
) -> list[list[Document]]:
    """Draw documents of random tokens for the self-check, with up to `longest` tokens per text.

    Each text is about twice as long as the previous text.

    Args:
        vocabulary: Number of token ids.
        longest: Number of tokens of the longest text.
        nodes: Approximate number of tokens in a prefix tree of several documents.
        widest: Approximate number of tokens in the prefix tree of the largest document.
        sharing: The kinds of shared computation to test.

    Returns:
        Lists of documents; the engine scores each list in one call.
    """
    tokens = _make_token_source(vocabulary)

    def make_doubled(beginning: tuple[int, ...], context: int) -> _Content:
        # Alone, the one-token answer takes a call half as long as the one that both share.
        answer = tokens(context + 2)
        return beginning + tokens(context), [answer[:1], answer]

    halves = [(longest >> times) - 1 for times in range(1, longest.bit_length() - 1)]
    beginning = tokens(longest // 2)
    branches = max(2, -(-(widest - longest // 4) // max(1, longest // 2)))
    wide_content = tokens(longest // 4), [tokens(longest // 2) for _ in range(branches)]
    short = [(tokens(13), [tokens(3)]) for _ in range(nodes // 16)]
    contents: list[Sequence[_Content]] = [[make_doubled((), half) for half in halves], short]
    if sharing.tokens:
        contents.append([wide_content])
    if sharing.prefix:
        # Long and short; all lengths are crossed above.
        long_texts = [make_doubled(beginning, half) for half in halves[1::3]]
        contents.append(long_texts + [(beginning + context, answers) for context, answers in short])
    return [_make_documents(texts) for texts in contents if texts]


def draw_switch_documents(
    vocabulary: int, switches: Sequence[int], widest: int
) -> list[list[Document]]:
    """Draw random documents that are shorter and longer than each length in `switches`.

    The model's computation changes at these lengths. `vocabulary` is the number of token ids.
    `widest` is the maximum number of tokens in the prefix tree of one document. The result is a
    single list of documents, which the engine scores in one call.
    """
    tokens = _make_token_source(vocabulary)
    contents: list[_Content] = []
    for switch in switches:
        contents.append((tokens(switch - 3), [tokens(1), tokens(6)]))
        branches = [tokens(switch // 3) for _ in range(2 if switch <= widest else 1)]
        contents.append((tokens(switch // 2), branches))
    return [_make_documents(contents)]


def _make_token_source(vocabulary: int, max_tokens: int | None = None) -> _Tokens:
    """Return a function that draws random tokens, at most `max_tokens` per call."""
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(FIRST_TOKEN, vocabulary) for _ in range(count)[:max_tokens])

    return tokens


def _branch_documents(tokens: _Tokens) -> list[Document]:
    """Build documents with several answers per context; answers have one token or many tokens."""
    letters = [(tokens(n), [(3,), (4,)]) for n in (44, 33, 12, 26, 9)]
    texts = [(tokens(n), [tokens(k) for k in (1, 1, 3, 6)]) for n in (7, 15)]
    return _make_documents([*letters, *texts, (tokens(5), [tokens(30), tokens(28)])])


def _shared_documents(tokens: _Tokens, length: int) -> list[Document]:
    """Build documents with a common prefix of `length` tokens, to test the prefix cache."""
    common_tokens = tokens(length)
    return _make_documents([(common_tokens + tokens(n), [(3,), (4, 5, 6)]) for n in (5, 2, 8)])


def _make_documents(contents: Sequence[_Content]) -> list[Document]:
    return [
        Document("probe", number, requests, number % len(requests), len(requests))
        for number, (context, answers) in enumerate(contents)
        for requests in [tuple(Request(context, tuple(answer)) for answer in answers)]
    ]


SHARING_LEVELS = (FULL, NO_PREFIX, DEPTH_ONLY, PLAIN)
"""Levels of sharing, from the most to the least."""
MINI_TOLERANCE = 2e-4, 1e-5
"""Tolerances of a miniature's answers: nats, and share of the answer."""
MAX_ANSWERS = 128
"""Number of answers compared in addition to all answers of the baseline."""
MIN_ANSWERS = 4
"""Minimum number of answers compared per ablation."""
BOTH_ORDERS_LIMIT = 16
"""Maximum number of ablations that are scored in both orders."""
MAX_UNSTEADY_SHARE = 0.02
"""Share of answers at discontinuities of the model above which sharing is rejected."""
MINI_ROW_TOKENS = 40
"""Number of nodes of a row: several short texts share a row, a long text has its own."""
MAX_LENGTH = 96
LONGEST_REACH = 1024
"""Number of tokens up to which a miniature is tested at every length; longer calls are too slow."""
MEMORY_TEXTS = 5
"""Number of texts that are read in two orders, in addition to the longest text."""
MAX_PART_ABLATIONS = 128
"""Maximum number of heads or spans that are compared; if there are more, a sample is drawn."""


class _Probe(NamedTuple):
    """Documents and ablations of a self-check, and the log-likelihoods to compare.

    Attributes:
        calls: The documents of each call of `Engine.score`.
        ablations: The ablations, with the baseline.
        keys: The log-likelihoods to compare, each as (ablation, index of call, index of document,
            index of request).
    """

    calls: Sequence[Documents]
    ablations: Ablations
    keys: Sequence[tuple[Ablation, int, int, int]]


def miniature_key(
    model: PreTrainedModel,
    ablations: Ablations,
    paths: Sequence[NumberPath],
    rows: tuple[int, int, int] | None,
    blank: bool,
) -> str:
    """Compute the storage key for a self-check on a miniature model.

    The key is a SHA-256 hash of the arguments, package versions, the machine, and the code of this
    package and of the model. The key does not depend on the model's weights.

    Args:
        model: The full model.
        ablations: The ablations of the check.
        paths: Paths of the numbers in the configuration that the self-check replaces.
        rows: Maximum numbers of tokens, as for `check_longer_texts`; None for a check on short
            texts.
        blank: True if any token of the measured texts has a zero embedding.

    Returns:
        The key as hexadecimal text.
    """
    package, model_folder = Path(__file__).parents[2], Path(inspect.getfile(type(model))).parent
    folders = (package / "engine", package / "models")
    engine_paths = (path for folder in folders for path in folder.rglob("*.py"))
    code = file_hash([*engine_paths, *model_folder.glob("*.py")])
    config = model.config.to_dict()
    for name in ("_name_or_path", "quantization_config", "dtype"):
        config.pop(name, None)
    # The kernels that compute the model; `to_dict` leaves them out.
    names = ("_attn_implementation", "_experts_implementation")
    kernels = [getattr(model.config, name, None) for name in names]
    model_inputs = [type(model).__name__, config, kernels]
    cell_inputs = [[ablation.name for ablation in ablations], paths, rows, blank]
    system = [package_versions(), describe_machine(), code]
    return content_hash([*model_inputs, *cell_inputs, *system])


def reachable_numbers(model: PreTrainedModel, n_tokens: int) -> tuple[NumberPath, ...]:
    """List the numbers in a model's configuration that are at most `n_tokens`, by path."""
    numbers = find_numbers(model.config.get_text_config())
    return tuple(path for path, value in numbers if value <= n_tokens)


def check_miniature(
    engine: Engine, ablations: Ablations, paths: Sequence[NumberPath], blank: bool
) -> SharingVerdict:
    """Test on a miniature model, with short texts, which computation ablations can share.

    Args:
        engine: The engine. Its model must not have been called yet, since calls can change the
            model.
        ablations: All ablations to measure, with the baseline.
        paths: Paths of the numbers in the configuration that do not exceed the length of the
            measured texts, e.g. an attention window.
        blank: True if a token of the measured texts has a zero embedding.

    Returns:
        The result of the self-check, with the computation that can be shared exactly.

    Raises:
        CellError: The model is not causal, or does not run without one of the layers.
    """
    mini = build_miniature(engine.loaded.model)
    if mini is None:
        return _check_model_itself(engine, sample_ablations(ablations))
    ablations = _map_to_miniature(mini, sample_ablations(ablations))

    def make_reference(model: PreTrainedModel, verdict: SharingVerdict) -> Reference:
        mini_engine = _build_engine(engine, model, verdict, MAX_LENGTH, MINI_ROW_TOKENS)
        return Reference(mini_engine, is_miniature=True)

    with _limit_threads(is_miniature=True):
        findings = find_quirks(mini, paths)
    if not findings.causal:
        raise CellError(
            f"{engine.class_name} is not causal: its logits of a token depend on later tokens of "
            "the same call, so no log-likelihood is well-defined"
        )
    leftovers, first = tuple(sorted(findings.leftovers)), tuple(sorted(findings.first))
    verdict = SharingVerdict(FULL, lengths=findings.lengths, leftovers=leftovers, first=first)
    models = [mini, *build_shortened(mini, findings.relevant_numbers)]
    if blank:
        for tested_model in models:
            _zero_embedding(tested_model)
    truth = make_reference(mini, verdict)
    with _limit_threads(is_miniature=True):
        verdict = find_removed_model(truth, ablations, verdict)
    calls = draw_short_documents(_vocabulary(mini), min(MAX_LENGTH, engine.max_length))
    probe = _make_probe(calls, ablations, max(MIN_ANSWERS, MAX_ANSWERS // len(ablations)))
    for tested_model in models:
        if tested_model is not mini or verdict.in_place or verdict.as_loaded:
            truth = make_reference(tested_model, verdict)
        verdict = _limit_sharing(truth, verdict, probe)
    return verdict


def check_longer_texts(
    engine: Engine,
    ablations: Ablations,
    verdict: SharingVerdict,
    rows: tuple[int, int, int],
    blank: bool,
) -> SharingVerdict:
    """Test on a miniature model, with long texts, which computation ablations can share.

    Args:
        engine: The engine. Its model must not have been called yet, since calls can change the
            model.
        ablations: All ablations to measure, with the baseline.
        verdict: The result of `check_miniature`, on short texts.
        rows: Maximum numbers of tokens in the measurement: in a text, in a prefix tree of several
            documents, and in a prefix tree of one document.
        blank: True if a token of the measured texts has a zero embedding, as for `check_miniature`.

    Returns:
        The updated `verdict`.

    Raises:
        CellError: The model cannot be measured.
    """
    if verdict.tested_on == "the model":
        return verdict
    mini = build_miniature(engine.loaded.model)
    if blank:
        _zero_embedding(mini)
    longest, nodes, widest = rows
    tested_ablations = _map_to_miniature(mini, (INTACT, ablations[len(ablations) // 2]))

    def check(calls: Sequence[Documents], n_tokens: int) -> SharingVerdict:
        truth = Reference(_build_engine(engine, mini, verdict, n_tokens, nodes), is_miniature=True)
        return _limit_sharing(truth, verdict, _make_probe(calls, tested_ablations, MIN_ANSWERS))

    switches, all_differ = _find_switch_lengths(engine, mini, verdict, max(longest, widest))
    if switches:
        verdict = replace(verdict, switches=tuple((tokens, all_differ) for tokens in switches))
        verdict = check(
            draw_switch_documents(_vocabulary(mini), switches, widest), 2 * max(switches)
        )
    longest, widest = (min(tokens, LONGEST_REACH) for tokens in (longest, widest))
    max_tokens = min(longest, engine.max_length)
    calls = draw_long_documents(_vocabulary(mini), max_tokens, nodes, widest, verdict.sharing)
    return check(calls, longest)


def _find_switch_lengths(
    engine: Engine, mini: PreTrainedModel, verdict: SharingVerdict, longest: int
) -> tuple[tuple[int, ...], bool]:
    """Find text lengths above `LONGEST_REACH` at which a miniature's computation changes.

    Lengths up to `longest` tokens are searched. Returns these lengths, and a flag. The flag is True
    if every text length from the first known change on may have its own computation.
    """
    if longest <= LONGEST_REACH:
        return (), False
    powers = (LONGEST_REACH << n_doublings for n_doublings in range(longest.bit_length()))
    lengths = {t for t in (*powers, engine.max_length) if LONGEST_REACH <= t < longest}
    old_lengths = verdict.make_quirks(mini).lengths
    switches = find_switches(mini, old_lengths, {*lengths, longest})
    return switches.thresholds[len(old_lengths.thresholds) :], switches.all_differ


def sample_ablations(ablations: Ablations) -> list[Ablation]:
    """Choose the ablations for the self-check; of many similar ablations, draw a sample.

    At most `MAX_PART_ABLATIONS` ablations that remove parts (e.g. heads), repeat layers or quantise
    linear maps are chosen. All other ablations are chosen.
    """
    many = [
        a for a in ablations if a.parts or a.repetitions or (a.roundings and not a.outer_formats)
    ]
    sample = random.Random(0).sample(many, min(len(many), MAX_PART_ABLATIONS))
    omitted = set(many) - set(sample)
    return [ablation for ablation in ablations if ablation not in omitted]


def _map_to_miniature(mini: PreTrainedModel, ablations: Ablations) -> list[Ablation]:
    """Translate ablations of a model to its miniature, which has fewer heads and experts.

    A translated ablation removes at most half of a layer's heads or experts. The result contains no
    duplicates.
    """
    parts = parts_of_config(mini.config.get_text_config())

    def map_change(change: Change) -> Change:
        part = change.part
        if isinstance(part, int):
            n_parts = parts.count_of(change.component)
            return replace(change, part=part % n_parts) if n_parts else change
        if change.action is not Action.ROUNDED:
            return change
        if part is not None and parts.expert and (expert := split_expert_map(part)):
            holder, _, name = expert[0].rpartition(".")
            part = f"{holder}.{expert[1] % parts.expert}.{name}"
        # Rows of a miniature fill no blocks of most formats; few bits reveal errors.
        return replace(change, intervention="int4_row", part=part)

    def map_ablation(ablation: Ablation) -> Ablation:
        mapped = Ablation.from_changes(*map(map_change, ablation.changes))
        changes = mapped.changes - {*mapped.parts}
        groups = group_by(mapped.parts, lambda part: (part.layer, part.component))
        for (_, component), group in groups.items():
            n_parts = parts.count_of(component) or 2 * len(group)
            changes |= {*group[: max(1, n_parts // 2)]}
        return Ablation(changes)

    return list(dict.fromkeys(map(map_ablation, ablations)))


@contextmanager
def _limit_threads(is_miniature: bool) -> Iterator[None]:
    """Limit PyTorch to one thread in a `with` block if the model is a miniature."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if is_miniature else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _zero_embedding(model: PreTrainedModel) -> None:
    """Set the embedding of the token `FIRST_TOKEN` to zeros, in place."""
    model.get_input_embeddings().weight[FIRST_TOKEN] = 0


def _vocabulary(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model can both read and predict."""
    head = model.get_output_embeddings()
    n_embeddings = int(model.get_input_embeddings().num_embeddings)
    return n_embeddings if head is None else min(n_embeddings, int(head.weight.shape[0]))


def _build_engine(
    engine: Engine, model: PreTrainedModel, verdict: SharingVerdict, longest: int, nodes: int
) -> Engine:
    """Build an engine that scores documents with a miniature (`model`) of the engine's model.

    `longest` is the maximum number of tokens of a text, and `nodes` is the maximum number of tokens
    of a row (batch).
    """
    device = torch.device("cpu")
    loaded = replace(engine.loaded, model=model, layers=find_layers(model), device=device)
    return Engine(
        loaded,
        min(longest, engine.max_length),
        verdict.make_quirks(model),
        memory=2**30,
        # Streams pass a layer in several batches, as they do with long texts or many streams.
        pass_tokens=2 * nodes,
        replacements=_random_replacements(loaded.layers),
        row_tokens=nodes,
    )


def _random_replacements(layers: torch.nn.ModuleList) -> dict[int, RandomReplacement]:
    """Build a random function for each layer, to test the replacement of layers."""
    return {layer: RandomReplacement(layer) for layer in range(len(layers))}


def _check_model_itself(engine: Engine, ablations: Ablations) -> SharingVerdict:
    """Test shared computation on the model itself, because no miniature can be built."""
    verdict = SharingVerdict(
        DEPTH_ONLY,
        "no tiny copy of the model can be built for the self-check, so common beginnings of "
        "requests are computed separately",
        lengths=(((), True),),
        tested_on="the model",
    )
    verdict = find_removed_model(Reference(engine), ablations, verdict)
    quirks = verdict.make_quirks(engine.loaded.model)
    engine = replace(engine, quirks=quirks, replacements=_random_replacements(engine.loaded.layers))
    calls = [draw_short_documents(_vocabulary(engine.loaded.model), engine.max_length)[0][:4]]
    return _limit_sharing(Reference(engine), verdict, _make_probe(calls, ablations, 1))


def _limit_sharing(truth: Reference, verdict: SharingVerdict, probe: _Probe) -> SharingVerdict:
    """Share less computation, step by step, until no log-likelihood in `probe` changes.

    Returns `verdict`, the self-check's result so far, with the new sharing. `truth` computes the
    correct log-likelihoods on changed copies of the model.
    """
    engine = truth.engine
    if not truth.is_half:  # the order of summation on an accelerator may vary
        with _limit_threads(truth.is_miniature):
            _refuse_stateful_model(engine, probe.calls)

    def compare(sharing: Sharing) -> Comparison:
        comparison = compare_orders(engine.with_sharing(sharing), truth, probe)
        if sharing.calls and comparison.unsteady > MAX_UNSTEADY_SHARE * comparison.compared:
            return replace(comparison, wrong="too often discontinuous")
        return comparison

    sharing, comparison, reason = find_most_sharing(verdict.sharing, engine, compare)
    return replace(
        verdict,
        sharing=sharing,
        sharing_note=extend_sharing_note(verdict.sharing_note, sharing, reason),
        difference=max(comparison.difference, verdict.difference),
        compared=verdict.compared + comparison.compared,
        unsteady=verdict.unsteady + comparison.unsteady,
    )


def _refuse_stateful_model(engine: Engine, calls: Sequence[Documents]) -> None:
    """Raise CellError if a model's log-likelihoods depend on texts from earlier calls.

    Two copies of the model read the same texts in opposite order.
    """
    requests = sorted((d.requests[-1] for call in calls for d in call), key=lambda r: r.length)
    texts = [*requests[:: -(-len(requests) // MEMORY_TEXTS)], requests[-1]]
    rising_engine, falling_engine = engine.ablate(INTACT), engine.ablate(INTACT)
    abs_tol, rel_tol = MINI_TOLERANCE

    def read_both_orders() -> list[tuple[float, float]]:
        after_shorter = [rising_engine.answer(text).loglikelihood for text in texts]
        after_longer = [falling_engine.answer(text).loglikelihood for text in reversed(texts)]
        return list(zip(after_shorter, after_longer[::-1], strict=True))

    # `find_most_sharing` reports texts that the model cannot answer in any way.
    for x, y in try_model(read_both_orders)[0] or ():
        both_nan = math.isnan(x) and math.isnan(y)
        if not both_nan and not math.isclose(x, y, rel_tol=rel_tol, abs_tol=abs_tol):
            raise CellError(
                f"{engine.class_name} contradicts itself: a text's log-likelihood is {x:.6g} nats "
                f"after shorter texts, but {y:.6g} nats after longer texts"
            )


def find_most_sharing(
    most: Sharing, engine: Engine, compare: Callable[[Sharing], Comparison]
) -> tuple[Sharing, Comparison, str | None]:
    """Find how much computation can be shared without changing results.

    Args:
        most: The level that shares the most computation. Lower levels are tested only if `most`
            changes a result.
        engine: The engine of the model, for messages about failures.
        compare: Function that compares scores at a level of sharing with the reference results.

    Returns:
        The highest level that changes no result, the comparison at this level, and the reason why
        higher levels fail. The reason is None if `most` changes no result.

    Raises:
        CellError: The model does not run, or does not reproduce its own results.
    """
    name = engine.class_name
    lost: tuple[Sharing, str, str] | None = None  # and why, for models without and with a state
    levels = (*SHARING_LEVELS, ONE_BY_ONE)
    for sharing in levels[levels.index(most) :]:
        try:
            comparison = compare(sharing)
        except Exception as error:  # a model may refuse this way of sharing
            message = refusal_reason(error)
            if message is None:
                raise
            if sharing == ONE_BY_ONE:
                text = f"{name} fails even if each batch has only one request: {message}"
                raise CellError(text) from error
            lost = sharing, describe_error(error, sharing, name), STATE
            continue
        if comparison.wrong is None:
            break
        if sharing == ONE_BY_ONE:
            raise CellError(f"{name} contradicts itself: {comparison.wrong}")
        reason = describe_difference(sharing, comparison)
        lost = sharing, reason, reason if comparison.unsteady else f"{STATE}: {reason}"
    if lost is None:
        return sharing, comparison, None
    way, reason, state_reason = lost
    has_state = way == NO_PREFIX and reason != state_reason and keeps_state(engine.copy())
    return sharing, comparison, state_reason if has_state else reason


def _make_probe(calls: Sequence[Documents], ablations: Ablations, n_answers: int) -> _Probe:
    """Choose which log-likelihoods of the documents in `calls` are compared.

    All requests are chosen for the baseline. For each other ablation, `n_answers` random requests
    are drawn, about equally many from each list in `calls`.
    """
    answers_by_call = [
        [(c, d, r) for d, document in enumerate(call) for r in range(len(document.requests))]
        for c, call in enumerate(calls)
    ]
    rng, keys = random.Random(0), []
    for ablation in ablations:
        shuffled = (rng.sample(group, len(group)) for group in answers_by_call)
        drawn_answers = [answer for turn in zip_longest(*shuffled) for answer in turn if answer]
        # Sorted, so that answers to one text follow each other.
        answers = sorted(drawn_answers if ablation == INTACT else drawn_answers[:n_answers])
        keys += [(ablation, *answer) for answer in answers]
    return _Probe(calls, ablations, keys)


def compare_orders(engine: Engine, truth: Reference, probe: _Probe) -> Comparison:
    """Score documents in two opposite orders, and compare each result with `truth`.

    If there are more than `BOTH_ORDERS_LIMIT` ablations, each ablation is scored in one order only.
    The comparison stops at the first wrong log-likelihood.
    """
    comparison = Comparison()
    changes = [ablation for ablation in probe.ablations if ablation != INTACT]
    orders = changes, changes
    if len(changes) > BOTH_ORDERS_LIMIT:
        sample = random.Random(0).sample(changes, len(changes))
        orders = sample[: len(sample) // 2], sample[len(sample) // 2 :]
    for direction, order in zip((1, -1), orders, strict=True):
        column_of = {ablation: column for column, ablation in enumerate((INTACT, *order))}
        for number, call in [*enumerate(probe.calls)][::direction]:
            scores = engine.score(call[::direction], list(column_of))[::direction]
            answers = [(a, d, r) for a, c, d, r in probe.keys if c == number and a in column_of]
            with _limit_threads(truth.is_miniature):
                for ablation, d, r in answers:
                    value = scores[d].responses[column_of[ablation]][r].loglikelihood
                    request = call[d].requests[r]
                    comparison += truth.compare(value, ablation, request, *MINI_TOLERANCE)
                    if comparison.wrong:
                        return comparison
    return comparison
