"""An attack on the sharing of an architecture, before anything of a model is believed.

Texts of random tokens are made to cross whatever the model's configuration counts tokens by: short
and long ones in one row, branches, a beginning that is kept, answers longer than a window, lengths
on both sides of each threshold, in one order and its reverse. They are scored with every ablation,
shared and on models that were really changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch

from tracker.ablations import INTACT, Ablation
from tracker.documents import Document, Request
from tracker.engine.habits import STEPS, Path, find_habits, shortened
from tracker.engine.prefix import SHORTEST
from tracker.engine.refusal import refused
from tracker.engine.rows import Lengths
from tracker.engine.sweep import DEPTH_ONLY, FULL, NO_PREFIX, PLAIN, Engine, Habits, Sharing
from tracker.engine.truth import Comparison, Truth
from tracker.errors import CellError
from tracker.models.layers import find_layers
from tracker.models.miniature import miniature, numbers
from tracker.models.pruned import remember
from tracker.provenance import content_hash, file_hash, machine, package_versions

WAYS = ((FULL, "documents"), (NO_PREFIX, "tokens"), (DEPTH_ONLY, "depth"))
"""From the most sharing to the least, with what is lost where it is not exact."""
TOLERANCE = 2e-4, 1e-5
"""Nats, and share of itself, by which an answer of a miniature may differ."""
WHOLE = 6
"""Ablations besides the baseline that are compared on every text; the others on `SOME`."""
SOME = 4
OFTEN = 0.02
"""Share of answers at a discontinuity of the model from which sharing is left alone."""
ROW_TOKENS = 40
"""Nodes of a row: several short texts share one, a long one has its own."""
MAX_LENGTH = 96


@dataclass(frozen=True)
class Verdict:
    """What an attack has shown of an architecture.

    Attributes:
        sharing: As much as is exact.
        lost: One line that says which sharing was lost and why; None when none was.
        difference: The largest difference that was left, in nats.
        compared: Log-likelihoods behind it.
        unsteady: How many of them differ by more, while the model itself moves as far by rounding.
        lengths: Numbers of the configuration at which the length of a call matters, with whether
            beyond it every length is another; the empty path for a model to which it always does.
        leftovers: Names of attributes that one call leaves changed for the next.
        first: Where in the model is what the first call changes for good: module, attribute.
        stay: Whether removed layers stay in their places, because the model cannot be cut.
        attacked: `a miniature`, or `the model` where none can be built.
    """

    sharing: Sharing
    lost: str | None
    difference: float
    compared: int
    unsteady: int = 0
    lengths: tuple[tuple[Path, bool], ...] = ()
    leftovers: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()
    stay: bool = False
    attacked: str = "a miniature"

    def habits(self, model: Any) -> Habits:
        """Apply it to a model that no call has changed yet.

        Args:
            model: A model of the architecture.

        Returns:
            What the engine must know of it.
        """
        values = dict(numbers(model.config.get_text_config()))
        thresholds = tuple(int(values[path]) for path, _ in self.lengths if path in values)
        first = remember(model, {name for _, name in self.first})
        return Habits(
            lengths=Lengths(thresholds, each=any(each for _, each in self.lengths)),
            leftovers=remember(model, self.leftovers) if self.leftovers else {},
            first={place: first[place] for place in self.first if place in first},
            stay=self.stay,
            unsteady=bool(self.unsteady),
        )


def attack_key(model: Any, ablations: Sequence[Ablation], paths: Sequence[Path]) -> str:
    """Name an attack by all that its verdict follows from: not the weights.

    Args:
        model: A model of the architecture.
        ablations: All that will be removed.
        paths: Numbers of the configuration that the cell's texts can reach.

    Returns:
        SHA-256 in hexadecimal.
    """
    here = FilePath(__file__).parents[1]
    code = file_hash([*(here / "engine").glob("*.py"), *(here / "models").glob("*.py")])
    config = model.config.to_dict()
    for name in ("_name_or_path", "quantization_config", "dtype"):
        config.pop(name, None)
    names = [ablation.name for ablation in ablations]
    return content_hash(
        [type(model).__name__, config, names, paths, package_versions(), machine(), code]
    )


def reachable(model: Any, reach: int) -> tuple[Path, ...]:
    """List the numbers of a configuration that a cell's texts can reach.

    Args:
        model: A causal language model of transformers.
        reach: Tokens of the cell's longest row.

    Returns:
        Their paths.
    """
    found = numbers(model.config.get_text_config())
    return tuple(path for path, value in found if value <= reach)


def attack(engine: Engine, ablations: Sequence[Ablation], paths: Sequence[Path]) -> Verdict:
    """Attack the architecture of an engine's model.

    Args:
        engine: The engine; no call has changed its model yet.
        ablations: All that will be removed, with the baseline.
        paths: Numbers of the configuration that the cell's texts can reach.

    Returns:
        What may be shared.

    Raises:
        CellError: The model cannot be measured: it is not causal, or not without some layer.
    """
    name = type(engine.loaded.model).__name__
    small = miniature(engine.loaded.model)
    if small is None:
        return _attack_itself(engine, ablations, name)
    with _one_thread():
        return _attack_small(engine, small, ablations, paths, name)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models as small as miniatures only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _attack_small(
    engine: Engine, small: Any, ablations: Sequence[Ablation], paths: Sequence[Path], name: str
) -> Verdict:
    """Experiment with a miniature, and attack it with long windows and with short ones."""
    found = find_habits(small, paths)
    if not found.causal:
        raise CellError(
            f"{name} is not causal: what it says of a token depends on later tokens of the same "
            "call, so no two ways to ask it agree"
        )
    lengths = (*found.by_call, *([((), True)] if found.every_call else []))
    verdict = Verdict(
        FULL,
        None,
        0.0,
        0,
        lengths=lengths,
        leftovers=tuple(sorted(found.leftovers)),
        first=tuple(sorted(found.first)),
    )
    models = [small, *shortened(small, found.matters)]
    verdict = _as_cut(_engine(engine, small, verdict), ablations, verdict, name)
    for each in models:
        verdict = _attacked(_engine(engine, each, verdict), ablations, verdict, name)
    return verdict


def _engine(engine: Engine, model: Any, verdict: Verdict) -> Engine:
    """An engine for a miniature."""
    device = torch.device("cpu")
    loaded = replace(engine.loaded, model=model, layers=find_layers(model), device=device)
    most = min(MAX_LENGTH, engine.max_length)
    habits = verdict.habits(model)
    return Engine(loaded, most, row_tokens=ROW_TOKENS, memory=2**30, habits=habits)


def _attack_itself(engine: Engine, ablations: Sequence[Ablation], name: str) -> Verdict:
    """Attack a model that has no miniature: every length is taken for a matter of its own."""
    verdict = Verdict(
        DEPTH_ONLY,
        "no miniature of the model can be built on which sharing over tokens could be proven",
        0.0,
        0,
        lengths=(((), True),),
        attacked="the model",
    )
    engine = replace(engine, habits=verdict.habits(engine.loaded.model))
    verdict = _as_cut(engine, ablations, verdict, name)
    engine = replace(engine, habits=verdict.habits(engine.loaded.model))
    return _attacked(engine, ablations, verdict, name)


def _attacked(
    engine: Engine, ablations: Sequence[Ablation], verdict: Verdict, name: str
) -> Verdict:
    """Lower a verdict to what this model computes exactly."""
    vocabulary = engine.loaded.model.get_input_embeddings().num_embeddings
    if verdict.attacked == "the model":
        calls = [_texts(random.Random(0), vocabulary, (), engine.max_length)[:4]]
        asked = list(_asked(calls, ablations, whole=1, some=1))
    else:
        calls = _calls(vocabulary, engine.max_length)
        asked = list(_asked(calls, ablations, WHOLE, SOME))
    truth = Truth(engine)

    def compare(sharing: Sharing) -> Comparison:
        found = _compared(engine.with_sharing(sharing), calls, ablations, asked, truth)
        if sharing == PLAIN and found.wrong:
            # Nothing is shared: what differs is the miniature, by the shape of the call.
            return replace(found, unsteady=found.unsteady + 1, wrong=None)
        if sharing != PLAIN and found.unsteady > OFTEN * found.compared:
            return replace(found, wrong="too often discontinuous")
        return found

    sharing, found, reasons = most_sharing(verdict.sharing, name, compare)
    return replace(
        verdict,
        sharing=sharing,
        lost="; ".join(dict.fromkeys(filter(None, (verdict.lost, *reasons)))) or None,
        difference=max(found.difference, verdict.difference),
        compared=verdict.compared + found.compared,
        unsteady=verdict.unsteady + found.unsteady,
    )


def most_sharing(
    start: Sharing, name: str, compare: Callable[[Sharing], Comparison]
) -> tuple[Sharing, Comparison, list[str]]:
    """Find the most sharing that gives the numbers of the really pruned model.

    Args:
        start: The most that is tried.
        name: The model's class.
        compare: Compares some answers that are computed with such sharing.

    Returns:
        The sharing, what was compared with it, and why more was lost.

    Raises:
        CellError: The model does not run even with nothing shared.
    """
    reasons = []
    first = next((i for i, (way, _) in enumerate(WAYS) if way == start), len(WAYS))
    for sharing, what in WAYS[first:]:
        try:
            found = compare(sharing)
        except Exception as error:
            why = refused(error)
            if why is None:
                raise
            reasons.append(f"sharing over {what} is refused by the model ({why})")
            continue
        if found.wrong is None:
            return sharing, found, reasons
        said = f"sharing over {what} changes a log-likelihood by {found.difference:.3g} nats"
        if found.unsteady:
            said += f", mostly where the model is discontinuous ({found.unsteady} answers)"
        reasons.append(said)
    try:
        return PLAIN, compare(PLAIN), reasons
    except Exception as error:
        why = refused(error)
        if why is None:
            raise
        raise CellError(f"{name} cannot be asked one request at a time: {why}") from error


_Place = tuple[int, int, int, int]
"""Which ablation, call, document and request."""


def _asked(
    calls: Sequence[Sequence[Document]], ablations: Sequence[Ablation], whole: int, some: int
) -> Iterator[_Place]:
    """What is compared: of `whole` ablations every request, of each other `some`."""
    every = [
        (c, d, r)
        for c, documents in enumerate(calls)
        for d, document in enumerate(documents)
        for r in range(len(document.requests))
    ]
    draw = random.Random(0)
    step = max(1, len(ablations) // whole)
    for number in range(len(ablations)):
        chosen = every if number % step == 0 else draw.sample(every, min(some, len(every)))
        for place in chosen:
            yield (number, *place)


def _compared(
    engine: Engine,
    calls: Sequence[Sequence[Document]],
    ablations: Sequence[Ablation],
    asked: Sequence[_Place],
    truth: Truth,
) -> Comparison:
    """Score all calls in order and then in reverse, and compare."""
    found = Comparison()
    for step in (1, -1):
        scores = {
            c: engine.score(calls[c][::step], ablations)[::step] for c in range(len(calls))[::step]
        }
        for number, c, d, r in asked:
            ours = scores[c][d].responses[number][r].loglikelihood
            found += truth.compare(ours, ablations[number], calls[c][d].requests[r], *TOLERANCE)
            if found.wrong:
                return found
    return found


def _calls(vocabulary: int, longest: int) -> list[list[Document]]:
    """Texts, grouped as blocks of a cell are scored."""
    draw = random.Random(0)
    kept = SHORTEST + 4
    return [
        _texts(draw, vocabulary, (), longest),
        _texts(draw, vocabulary, STEPS, longest),
        _shared(draw, vocabulary, kept, longest),
        _shared(draw, vocabulary, kept - 3, longest),
    ]


def _texts(
    draw: random.Random, vocabulary: int, lengths: Sequence[int], longest: int
) -> list[Document]:
    """Branches and single letters, long before short; then both sides of each length."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(min(count, longest - 1)))

    if not lengths:
        letters = [(tokens(n), [(3,), (4,)]) for n in (44, 33, 12, 26, 9)]
        spoken = [(tokens(n), [tokens(k) for k in (1, 1, 3, 6)]) for n in (7, 15)]
        long = [(tokens(5), [tokens(30), tokens(28)])]
        return _documents([*letters, *spoken, *long])
    pairs = zip(lengths[1::2], lengths[::2], strict=False)
    return _documents([(tokens(n - 1), [tokens(k // 6), (3,)]) for n, k in pairs])


def _shared(draw: random.Random, vocabulary: int, kept: int, longest: int) -> list[Document]:
    """Texts with a beginning that is read apart."""
    kept = min(kept, longest - 12)
    common = tuple(draw.randrange(2, vocabulary) for _ in range(kept))
    tails = [tuple(draw.randrange(2, vocabulary) for _ in range(n)) for n in (5, 2, 8)]
    return _documents([(common + tail, [(3,), (4, 5, 6)]) for tail in tails])


def _documents(
    contents: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]],
) -> list[Document]:
    return [
        Document(
            "attack",
            number,
            tuple(Request(context, tuple(answer)) for answer in answers),
            number % len(answers),
            len(answers),
        )
        for number, (context, answers) in enumerate(contents)
    ]


@torch.inference_mode()
def _as_cut(engine: Engine, ablations: Sequence[Ablation], verdict: Verdict, name: str) -> Verdict:
    """Find out what the model without a layer is; raises CellError where it does not run.

    It is what a checkpoint without the layer would be. Nearly always that is the model whose layer
    hands on its input, and streams that skip the layer compute it. Where it is another model (what
    layers do depends on their places), nothing is shared over depth; it must then be what its own
    configuration and weights make of it. Where no checkpoint can be cut, the layer stays in its
    place and hands on its input.
    """
    cut = replace(engine, habits=replace(engine.habits, stay=False))
    still = replace(engine, habits=replace(engine.habits, stay=True))
    wrong: list[tuple[Ablation, str]] = []
    by_nature = False
    for ablation in dict.fromkeys(Ablation(a.layers) for a in ablations if a.layers):
        one, why = _text_under(cut, ablation)
        other, why_not = _text_under(still, ablation)
        if one is not None and other is not None and _alike(one, other):
            continue
        if one is not None and _is_its_own_checkpoint(cut, ablation, one):
            by_nature = True
            continue
        if other is None and one is None:
            raise CellError(
                f"{name} does not run without {_named(ablation)} ({why or why_not}); leave it out "
                "of 'layer'"
            )
        wrong.append((ablation, why or "it is not the model that it was without the layer"))
    if wrong and by_nature:
        ablation, why = wrong[0]
        raise CellError(
            f"{name} cannot be cut to be without {_named(ablation)} ({why}); leave it out of "
            "'layer'"
        )
    if by_nature:
        lost = "a checkpoint without a layer is not the model that skips it, so nothing is shared"
        return replace(verdict, sharing=PLAIN, lost=lost)
    return replace(verdict, stay=bool(wrong))


def _named(ablation: Ablation) -> str:
    plural = "s" if len(ablation.layers) > 1 else ""
    return f"layer{plural} {', '.join(map(str, ablation.layers))}"


def _text_under(engine: Engine, ablation: Ablation) -> tuple[torch.Tensor | None, str | None]:
    """What a changed model says of a text [tokens, vocabulary], or why it says nothing."""
    ids = torch.arange(12, device=engine.loaded.device)[None] * 5 % 29 + 2
    try:
        return engine.without(ablation).loaded.model(ids, use_cache=False).logits[0], None
    except Exception as error:
        why = refused(error)
        if why is None:
            raise
        return None, why


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    within = 1e-6 if one.dtype == torch.float64 else 1e-3 if one.dtype == torch.float32 else 0.5
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=within, atol=within, equal_nan=True
    )


def _is_its_own_checkpoint(engine: Engine, ablation: Ablation, said: torch.Tensor) -> bool:
    """Whether a model made of the cut configuration, given the cut weights, says the same."""
    model = engine.without(ablation).loaded.model
    if sum(p.numel() for p in model.parameters()) > 10**8:
        return False
    try:
        again = type(model)(model.config).to(model.dtype).eval()
        again.load_state_dict(model.state_dict())
    except Exception:  # noqa: BLE001 - a class that cannot be made of this configuration
        return False
    fresh = replace(engine, loaded=replace(engine.loaded, model=again, layers=find_layers(again)))
    found, _ = _text_under(replace(fresh, habits=Habits()), INTACT)
    return found is not None and _alike(found, said)
