"""Measure documents of a cell on a loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from tracker.benchmarks.base import Benchmark
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.config import CellRequest, ModelSpec, all_ablations
from tracker.core.documents import Document, Response
from tracker.core.errors import CellError
from tracker.core.identities import BenchmarkIdentity, ModelIdentity
from tracker.core.provenance import TOKENISATION, WEIGHTS, machine, package_versions
from tracker.ledger.outcomes import CHECKPOINT, TOKENS_DIGEST, outcome_row
from tracker.ledger.texts import text_row
from tracker.measuring.calibrate import CalibrationTexts, calibration, computed_twice
from tracker.measuring.prepare import check_range
from tracker.models.devices import describe
from tracker.models.sources import find_model, parts_of, stored_format

if TYPE_CHECKING:
    from tracker.engine.forward.layer import Replacement
    from tracker.engine.scoring.sweep import DocumentScores, Engine
    from tracker.engine.selfcheck.check import Kept
    from tracker.engine.selfcheck.reference import Comparison, Reference
    from tracker.measuring.job import Options
    from tracker.measuring.scorer import Scorer
    from tracker.models.load import LoadedModel

Place = tuple[str, int]
"""A document: its task, and its number in the task's split."""
Advance = Callable[[int], None]
"""Function that is called with the number of responses since its last call."""


@dataclass(frozen=True)
class Model:
    """A loaded model with the spec of its weights."""

    spec: ModelSpec
    loaded: LoadedModel


def open_model(spec: ModelSpec, options: Options) -> Model:
    """Load a model; raise ModelError if it cannot be found or read."""
    from tracker.models.devices import keep_freed_memory
    from tracker.models.load import load_model

    keep_freed_memory()
    source = find_model(spec, options.trust_remote_code)
    how = (options.device, options.weights, options.offload)
    return Model(spec, load_model(source, spec.dtype, *how))


@dataclass(frozen=True)
class Facts:
    """Facts about a cell that are known once its model is loaded.

    Attributes:
        model: Identity of the weights.
        benchmark: Identity of the documents.
        provenance: Versions and machine.
        responses: Document → number of its responses under one ablation.
        digests: Document → digest of its tokens.
        offloaded: Description of offloaded weights; empty if all fit on the device.
        is_fresh: True if the model was loaded for this cell.
    """

    model: ModelIdentity
    benchmark: BenchmarkIdentity
    provenance: dict[str, str]
    responses: dict[Place, int]
    digests: dict[Place, str]
    offloaded: str = ""
    is_fresh: bool = False


@dataclass(frozen=True)
class Measured:
    """Measured outcomes of some documents.

    Attributes:
        rows: One mapping per (document, ablation), as from `outcomes.outcome_row`.
        metadata: Details of the measurement, with versions, machine and device.
        texts: One mapping per document with its text, as from `texts.text_row`.
        notes: The engine's messages during the measurement.
    """

    rows: list[dict[str, object]]
    metadata: dict[str, object]
    texts: list[dict[str, object]]
    notes: list[str]


class Meter:
    """Measures the documents of one cell under all requested ablations, baseline first.

    The requests differ only in their runs. `twice` holds the documents that are computed twice, to
    measure the effect of rounding. RequestError is raised for layers that the model does not have,
    and for a document without a required field.
    """

    def __init__(
        self, requests: Sequence[CellRequest], benchmark: Benchmark, model: Model, options: Options
    ) -> None:
        from tracker.benchmarks.encoder import RequestEncoder
        from tracker.engine.selfcheck.check import watched_documents
        from tracker.measuring.scorer import Scorer
        from tracker.models.parts.anatomy import LayerAnatomy

        loaded, request = model.loaded, requests[0]
        for each in requests:
            check_range(each, parts_of(loaded.model.config.get_text_config()))
        self.ablations = all_ablations(requests, loaded.identity.layers)
        anatomy = LayerAnatomy(loaded.model, loaded.layers, loaded.device)
        anatomy.refuse_formats(self.ablations)
        self._benchmark = benchmark
        self._model = model
        self._memory = options.memory
        self._scorer: Scorer | None = None
        self._noted = 0
        self._encoder = RequestEncoder(loaded.model, loaded.tokenizer, request.benchmark)
        documents = benchmark.documents(self._encoder, request.extent)
        self.documents = {(document.task, document.index): document for document in documents}
        self._watch = watched_documents(documents)
        is_half = loaded.identity.is_half
        self.twice = computed_twice(documents, request.extent.seed) if is_half else set()
        self._calibration: CalibrationTexts | None = None
        if any(each.is_fitted for each in self.ablations):
            width = loaded.model.config.get_text_config().hidden_size
            self._calibration = calibration(benchmark, self._encoder, width)
        weights = stored_format(find_model(request.model, options.trust_remote_code))
        kept = {WEIGHTS: weights} if weights else {}
        kept[TOKENISATION] = self._encoder.tokenisation(bool(request.benchmark.apply_chat_template))
        max_length = self._encoder.max_length
        self.facts = Facts(
            loaded.identity,
            benchmark.identity,
            {**package_versions(), **machine(), **describe(loaded.device), **kept},
            {place: Scorer.responses(each) for place, each in self.documents.items()},
            {place: each.tokens_digest(max_length) for place, each in self.documents.items()},
            "" if loaded.offloaded is None else str(loaded.offloaded),
        )

    @property
    def engine(self) -> Engine:
        """The engine, with as much sharing as `check` found to be exact."""
        assert self._scorer is not None, "check() comes first"
        return self._scorer.engine

    def check(self, kept: Kept | None = None, typical: Sequence[Ablation] = ()) -> list[str]:
        """Test which computation this model can share exactly; must precede `measure`.

        Verdicts on architectures and models are stored in `kept`, if given. `typical` is as for the
        engine's check. The returned lines report disabled sharing and the model's numerical noise.
        """
        from tracker.engine.scoring.sweep import Engine
        from tracker.measuring.scorer import checked_scorer, with_fastest_rows

        loaded = self._model.loaded

        def fit(engine: Engine) -> Mapping[int, Replacement]:
            return self._calibration.fit(engine, self.ablations) if self._calibration else {}

        engine = Engine(loaded, self._encoder.max_length, memory=self._memory)
        engine = with_fastest_rows(engine)
        documents = list(self.documents.values())
        self._scorer, said = checked_scorer(
            engine, loaded.tokenizer, documents, self.ablations, kept, fit, typical
        )
        return [f"{loaded.identity.name}: {line}" for line in said]

    def measure(
        self,
        task: str,
        names: Sequence[str],
        indices: Sequence[int],
        advance: Advance = lambda responses: None,
    ) -> Measured:
        """Measure some documents of one task.

        Args:
            task: The task.
            names: The ablations that the documents lack.
            indices: The documents' positions in the task's split.
            advance: Called with the number of new responses.

        Returns:
            Their outcomes.

        Raises:
            CellError: Shared computation gives another result than a really pruned model.
        """
        from tracker.engine.selfcheck.check import watched_requests
        from tracker.engine.selfcheck.reference import Reference
        from tracker.models.devices import peak_memory

        assert self._scorer is not None, "check() comes first"
        scorer = self._scorer
        named = {ablation.name: ablation for ablation in self.ablations}
        # The baseline rides along for free: every other stream forks from it.
        scored = [INTACT, *(named[name] for name in names if name != INTACT.name)]
        start = time.perf_counter()
        documents = [self.documents[task, i] for i in indices]
        # Only outcomes whose rows are written are compared: the rows hold the comparison.
        some = [each for each in documents if (task, each.index) in self._watch]
        seed, first = self.facts.model.fingerprint, int(INTACT.name not in names)
        truth, asked = Reference(scorer.engine), watched_requests(some, scored, seed, first)
        twice = [each for each in documents if (task, each.index) in self.twice]
        passes: list[Callable[[], Any]] = [
            partial(scorer.score, documents, scored, advance),
            partial(scorer.again, twice, scored),
            partial(truth.ask, asked),
        ]
        taken = [each.expert for each in scored if each.expert is not None]
        passes += [partial(self._loads, documents, taken)] if taken else []
        results, finer, _, *loads = scorer.engine.side_by_side(passes)
        load = dict(zip(indices, loads[0], strict=True)) if loads else {}
        watched = self._watched(truth, results, scored, first)
        again = {each.document.index: each.responses for each in finer}
        rows: list[dict[str, object]] = []
        for result in results:
            other = again.get(result.document.index, [None] * len(scored))
            rows += self._rows(result, names, scored, watched, other, load)
        metadata: dict[str, object] = {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": f"{time.perf_counter() - start:.3f}",
            "peak_bytes": peak_memory(self._model.loaded.device),
            "provenance": self.facts.provenance,
            "sharing": str(scorer.engine.sharing),
        }
        if scorer.which:
            metadata[CHECKPOINT] = scorer.which
        if self._calibration and any(each.is_fitted for each in scored):
            metadata["calibration"] = self._calibration.about
        texts = [
            text_row(each.document, self._benchmark.text(each.document), self._benchmark.public)
            for each in results
        ]
        return Measured(rows, metadata, texts, self._notes())

    def _notes(self) -> list[str]:
        """Return the engine's notes since the last call."""
        name, notes = self.facts.model.name, self.engine.notes[self._noted :]
        self._noted += len(notes)
        return [f"{name}: {line}" for line in notes]

    def _loads(
        self, documents: Sequence[Document], parts: Sequence[Change]
    ) -> list[Mapping[Change, Sequence[float]]]:
        """Observe the intact model's use of some experts for each document."""
        from tracker.engine.observers.layer_proxies import expert_load

        each = (partial(expert_load, self.engine, document, parts) for document in documents)
        return [*self.engine.side_by_side(each)]

    def _watched(
        self,
        truth: Reference,
        results: Sequence[DocumentScores],
        scored: Sequence[Ablation],
        first: int,
    ) -> dict[tuple[Place, Ablation], Comparison]:
        """Compare some of the results with those of really pruned models."""
        assert self._scorer is not None
        some = [r for r in results if (r.document.task, r.document.index) in self._watch]
        seed = self.facts.model.fingerprint
        found = {}
        for result, ablation, comparison in self._scorer.watch(truth, some, scored, seed, first):
            if comparison.wrong is not None:
                raise CellError(
                    f"stopped, because sharing is not exact here: {comparison.wrong}. What was "
                    "measured of this benchmark is not to be trusted; please report this line"
                )
            found[(result.document.task, result.document.index), ablation] = comparison
        return found

    def _rows(
        self,
        result: DocumentScores,
        names: Collection[str],
        scored: Sequence[Ablation],
        watched: Mapping[tuple[Place, Ablation], Comparison],
        again: Sequence[Sequence[Response] | None],
        loads: Mapping[int, Mapping[Change, Sequence[float]]],
    ) -> Iterator[dict[str, object]]:
        """Yield the rows of a document's result for the named ablations."""
        document, sums = result.document, (result.proxy_tokens, result.proxy_sums.tolist())
        for ablation, responses, twice in zip(scored, result.responses, again, strict=True):
            if ablation.name in names:
                metrics = self._benchmark.outcomes(document, responses)
                both = watched.get(((document.task, document.index), ablation))
                compared = (both.compared, both.difference, both.unsteady) if both else None
                proxies = sums if ablation == INTACT else None
                load = loads[document.index][ablation.expert] if ablation.expert else None
                scores = (responses, metrics, proxies, compared, twice, load)
                digest = self.facts.digests[document.task, document.index]
                yield {**outcome_row(document, ablation.name, *scores), TOKENS_DIGEST: digest}
