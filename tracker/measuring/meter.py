"""Measure documents of a cell (one model on one benchmark) with the loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tracker.benchmarks.base import Benchmark
from tracker.ledger.outcomes import CHECKPOINT_KEY, DIGEST_COLUMN, outcome_row
from tracker.ledger.texts import text_row
from tracker.measuring.calibrate import CalibrationTexts, choose_calibration, repeated_documents
from tracker.measuring.prepare import check_possible
from tracker.models.devices import describe_device
from tracker.models.sources import find_model, parts_of_config, stored_format
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.config import CellRequest, ModelSpec, all_ablations
from tracker.schema.documents import Document, GeneratedText, Response
from tracker.schema.identities import BenchmarkIdentity, ModelIdentity
from tracker.schema.provenance import (
    TOKENISATION_KEY,
    WEIGHTS_KEY,
    describe_machine,
    package_versions,
)
from tracker.schema.proxies import EXPERT_PROXIES, PROXIES

if TYPE_CHECKING:
    from tracker.benchmarks.traces import Traces
    from tracker.engine.forward.layer import Replacement
    from tracker.engine.scoring.sweep import DocumentScores, Engine
    from tracker.engine.selfcheck.check import VerdictStore
    from tracker.engine.selfcheck.reference import Comparison
    from tracker.measuring.job import Options
    from tracker.measuring.scorer import Scorer
    from tracker.models.load import LoadedModel

DocumentKey = tuple[str, int]
"""Key of a document: the name of its task, and its number in the task's split."""
Advance = Callable[[int], None]
"""Function that is called with the number of responses since its last call."""


@dataclass(frozen=True)
class Model:
    """Loaded model, and the user's specification of this model (e.g. name and dtype)."""

    spec: ModelSpec
    loaded: LoadedModel


def open_model(spec: ModelSpec, options: Options) -> Model:
    """Load a model; raise ModelError if the model cannot be found or read."""
    from tracker.models.devices import keep_freed_memory
    from tracker.models.load import load_model

    keep_freed_memory()
    source = find_model(spec, options.trust_remote_code)
    device_options = (options.device, options.weights, options.offload)
    return Model(spec, load_model(source, spec.dtype, *device_options))


@dataclass(frozen=True)
class CellFacts:
    """Facts about a cell that are known once the cell's model is loaded.

    Attributes:
        model: Identity of the model's weights.
        benchmark: Identity of the benchmark's documents.
        provenance: Versions of packages, and description of the machine.
        responses: Key (task, index) of each document → number of responses per ablation.
        digests: Key (task, index) of each document → digest of the document's tokens.
        offloaded: Description of offloaded weights; empty if all fit on the device.
        is_fresh: True if the model was newly loaded for this cell.
    """

    model: ModelIdentity
    benchmark: BenchmarkIdentity
    provenance: dict[str, str]
    responses: dict[DocumentKey, int]
    digests: dict[DocumentKey, str]
    offloaded: str = ""
    is_fresh: bool = False


@dataclass(frozen=True)
class Measurement:
    """Measured outcomes of a list of documents.

    Attributes:
        rows: One row per document and ablation, built with `outcomes.outcome_row`.
        metadata: Details of the measurement: date, seconds, package versions, machine and device.
        texts: One row per document with its text, built with `texts.text_row`.
        notes: Messages of the engine during the measurement.
    """

    rows: list[dict[str, object]]
    metadata: dict[str, object]
    texts: list[dict[str, object]]
    notes: list[str]


class Meter:
    """Object that measures a cell's documents under all requested ablations and the baseline.

    The requests must differ only in their ablations. `repeated_keys` are the documents that are
    computed twice, to measure the effect of rounding. RequestError is raised if a request names a
    layer that the model does not have, or if a document lacks a required field.
    """

    def __init__(
        self, requests: Sequence[CellRequest], benchmark: Benchmark, model: Model, options: Options
    ) -> None:
        from tracker.benchmarks.encoder import RequestEncoder
        from tracker.engine.selfcheck.check import draw_watched_documents
        from tracker.measuring.scorer import Scorer
        from tracker.models.parts.anatomy import LayerAnatomy

        loaded, spec = model.loaded, requests[0].benchmark
        config, extent = loaded.model.config.get_text_config(), requests[0].extent
        for request in requests:
            check_possible(request, parts_of_config(config))
        self.ablations = all_ablations(requests, loaded.identity.layers)
        LayerAnatomy(loaded.model, loaded.layers, loaded.device).check_formats(self.ablations)
        self._benchmark, self._model, self._memory = benchmark, model, options.memory
        self._scorer: Scorer | None = None
        self._n_notes = 0
        self._has_checked_traces = False
        self._has_noted_cut_texts = False
        self._encoder = encoder = RequestEncoder(loaded.model, loaded.tokenizer, spec)
        documents = benchmark.documents(encoder, extent)
        self.documents = {document.key: document for document in documents}
        self._checked_keys = draw_watched_documents(documents)
        is_half = loaded.identity.is_half
        self.repeated_keys = repeated_documents(documents, extent.seed) if is_half else set()
        self._calibration: CalibrationTexts | None = None
        if any(ablation.has_replacements for ablation in self.ablations):
            self._calibration = choose_calibration(benchmark, encoder, config.hidden_size)
        provenance = package_versions() | describe_machine() | describe_device(loaded.device)
        if weights := stored_format(find_model(requests[0].model, options.trust_remote_code)):
            provenance[WEIGHTS_KEY] = weights
        has_template = bool(spec.apply_chat_template)
        provenance[TOKENISATION_KEY] = encoder.tokenisation_digest(has_template)
        self.facts = CellFacts(
            loaded.identity,
            benchmark.identity,
            provenance,
            {document.key: Scorer.count_responses(document) for document in documents},
            {document.key: document.tokens_digest(encoder.max_length) for document in documents},
            "" if loaded.offloaded is None else str(loaded.offloaded),
        )

    @property
    def engine(self) -> Engine:
        """Engine that scores documents; it is available after `check` was called.

        The engine computes ablations together only if the self-check allows it.
        """
        assert self._scorer is not None, "check() comes first"
        return self._scorer.engine

    def check(
        self, verdicts: VerdictStore | None = None, typical: Sequence[Ablation] = ()
    ) -> list[str]:
        """Compare the engine's results with pruned models (self-check); return messages.

        This method must be called before `measure`. `verdicts` stores results of the self-check for
        later runs. `typical` lists the ablations that are tested on a small random model; if the
        list is empty, the cell's ablations are tested.
        """
        from tracker.benchmarks.traces import Traces
        from tracker.engine.scoring.sweep import Engine
        from tracker.measuring.scorer import checked_scorer, set_row_size

        loaded = self._model.loaded

        def fit(engine: Engine) -> Mapping[int, Replacement]:
            return self._calibration.fit(engine, self.ablations) if self._calibration else {}

        engine = set_row_size(Engine(loaded, self._encoder.max_length, memory=self._memory))
        documents = list(self.documents.values())
        generating = [INTACT] if isinstance(self._benchmark, Traces) else None
        self._scorer, notes = checked_scorer(
            engine, loaded.tokenizer, documents, self.ablations, verdicts, fit, typical, generating
        )
        return [f"{loaded.identity.name}: {line}" for line in notes]

    def measure(
        self,
        task: str,
        names: Sequence[str],
        indices: Sequence[int],
        traces: Mapping[int, Sequence[str]] = MappingProxyType({}),
        advance: Advance = lambda responses: None,
    ) -> Measurement:
        """Measure a list of documents of one task.

        Args:
            task: Name of the task.
            names: Names of the ablations under which the documents are measured.
            indices: Positions of the documents in the task's split.
            traces: Position of a document → stored texts of the intact model.
            advance: Function that is called with the number of new responses.

        Returns:
            The outcomes of the documents.

        Raises:
            CellError: A spot check finds a result that differs from the pruned model's result.
            BenchmarkError: The task finds no answer in any of the intact model's first texts.
        """
        from tracker.benchmarks.traces import Traces
        from tracker.engine.selfcheck.check import list_watched_requests
        from tracker.engine.selfcheck.reference import Reference
        from tracker.models.devices import peak_memory

        assert self._scorer is not None, "check() comes first"
        scorer, start = self._scorer, time.perf_counter()
        by_name = {ablation.name: ablation for ablation in self.ablations}
        # Scoring the baseline costs nothing extra: every other stream forks from it.
        scored = [INTACT, *(by_name[name] for name in names if name != INTACT.name)]
        documents = [self.documents[task, index] for index in indices]
        if isinstance(self._benchmark, Traces):
            documents = self._build_trace_documents(self._benchmark, documents, traces)
        repeated = [document for document in documents if document.key in self.repeated_keys]
        # Only outcomes whose rows are written are compared: the rows contain the comparison.
        checked = [document for document in documents if document.key in self._checked_keys]
        seed, first_ablation = self.facts.model.fingerprint, int(INTACT.name not in names)
        reference = Reference(scorer.engine)
        passes: list[Callable[[], Any]] = [
            partial(scorer.score, documents, scored, advance),
            partial(scorer.score_again, repeated, scored),
            partial(
                reference.answer_all, list_watched_requests(checked, scored, seed, first_ablation)
            ),
        ]
        # Two ablations have the same part if layers are removed in all runs of one of them.
        if parts := [*dict.fromkeys(a.part for a in scored if a.part is not None)]:
            passes.append(partial(self._compute_part_proxies, documents, parts))
        results, repeated_results, _, *part_sums = scorer.engine.run_lockstep(passes)
        self._note_cut_texts([t for result in results for t in result.responses[0][0].texts])
        compared = [result for result in results if result.document.key in self._checked_keys]
        comparisons = scorer.compare_results(reference, compared, scored, seed, first_ablation)
        repeated_responses = {r.document.index: r.responses for r in repeated_results}
        rows: list[dict[str, object]] = []
        for number, result in enumerate(results):
            responses = repeated_responses.get(result.document.index, [None] * len(scored))
            sums = part_sums[0][number] if part_sums else {}
            rows += self._outcome_rows(result, names, scored, comparisons, responses, sums)
        metadata: dict[str, object] = {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": f"{time.perf_counter() - start:.3f}",
            "peak_bytes": peak_memory(self._model.loaded.device),
            "provenance": self.facts.provenance,
            "sharing": str(scorer.engine.sharing),
        }
        if scorer.checkpoint_note:
            metadata[CHECKPOINT_KEY] = scorer.checkpoint_note
        if self._calibration and any(ablation.has_replacements for ablation in scored):
            metadata["calibration"] = self._calibration.metadata
        text, is_public = self._benchmark.text, self._benchmark.public
        texts = [text_row(document, text(document), is_public) for document in documents]
        scorer.clear_drafts()
        return Measurement(rows, metadata, texts, self._notes())

    def _build_trace_documents(
        self, benchmark: Traces, documents: Sequence[Document], traces: Mapping[int, Sequence[str]]
    ) -> list[Document]:
        """Build documents in which the intact model's texts are scored.

        `traces` contains stored texts of the intact model; missing texts are generated.
        """
        from tracker.benchmarks.traces import FIRST_TRACES

        assert self._scorer is not None, "check() comes first"
        texts, unwritten = dict(traces), [d for d in documents if d.index not in traces]
        for group in (unwritten[:FIRST_TRACES], unwritten[FIRST_TRACES:]):
            written = {d.index: self._scorer.write_texts(d, [INTACT])[0] for d in group}
            self._note_cut_texts([*chain.from_iterable(written.values())])
            texts |= {index: [text.text for text in samples] for index, samples in written.items()}
            if group and not self._has_checked_traces:
                read = [benchmark.read_traces(d, texts[d.index], self._encoder) for d in group]
                benchmark.check_traces(read)
                self._has_checked_traces = True
        return [benchmark.read_traces(d, texts[d.index], self._encoder) for d in documents]

    def _note_cut_texts(self, texts: Sequence[GeneratedText]) -> None:
        """Add one message if most texts of the intact model were cut off at the token limit."""
        n_cut = sum(bool(text.is_cut) for text in texts)
        if 2 * n_cut > len(texts) and not self._has_noted_cut_texts:
            self._has_noted_cut_texts = True
            self.engine.notes.append(
                f"{self._benchmark.identity.name}: {n_cut} of the intact model's first "
                f"{len(texts)} texts were cut off at the token limit, so their answers may be "
                "missing; raise max_gen_toks in gen_kwargs"
            )

    def _notes(self) -> list[str]:
        """Return the new messages of the engine since the last call."""
        name, notes = self.facts.model.name, self.engine.notes[self._n_notes :]
        self._n_notes += len(notes)
        return [f"{name}: {line}" for line in notes]

    def _compute_part_proxies(
        self, documents: Sequence[Document], parts: Sequence[Change]
    ) -> list[dict[Change, dict[str, float]]]:
        """Compute cheap importance scores (proxies) of model parts on each document.

        Returns one dict for each document: part → column name of a proxy → value for the document.
        """
        from tracker.engine.observers.layer_proxies import measure_expert_load
        from tracker.engine.observers.taylor import measure_kl_gradients, measure_taylor

        engine = self.engine
        experts = [part for part in parts if part.component == "expert"]
        sums = [{part: dict[str, float]() for part in parts} for _ in documents]
        if experts:
            measure_load = partial(measure_expert_load, engine)
            loads = engine.run_lockstep(partial(measure_load, doc, experts) for doc in documents)
            for document_sums, load in zip(sums, loads, strict=True):
                for part, expert_sums in load.items():
                    names = (proxy.column for proxy in EXPERT_PROXIES)
                    document_sums[part] |= zip(names, expert_sums, strict=True)
        # Backward passes need all weights in memory.
        if engine.loaded.offloaded is None:
            rounded = [part for part in parts if part.intervention != "remove"]
            terms = {
                "taylor": [measure_taylor(engine, document, parts) for document in documents],
                "kl_gradient": measure_kl_gradients(engine, documents, rounded),
            }
            engine.restore_state()
            for name, document_terms in terms.items():
                for document_sums, values in zip(sums, document_terms, strict=True):
                    for part, value in values.items():
                        document_sums[part][PROXIES[name].column] = value
        return sums

    def _outcome_rows(
        self,
        result: DocumentScores,
        names: Collection[str],
        scored: Sequence[Ablation],
        comparisons: Mapping[tuple[int, Ablation], Comparison],
        repeated: Sequence[Sequence[Response] | None],
        parts: Mapping[Change, Mapping[str, float]],
    ) -> Iterator[dict[str, object]]:
        """Yield a document's outcome rows to store, one for each ablation in `names`.

        Args:
            result: The scores of the document under all ablations in `scored`.
            names: Names of the ablations for which rows are built.
            scored: The ablations, in the order of the responses in `result`.
            comparisons: (Document number, ablation) → comparison with a pruned model.
            repeated: For each ablation in `scored`, the responses of a second computation, if any.
            parts: Part of the model → column name of a proxy → value for the document.

        Yields:
            The row, as column name → value.
        """
        document, sums = result.document, (result.proxy_tokens, result.proxy_sums.tolist())
        digest = self.facts.digests[document.key]
        for ablation, responses, repetition in zip(scored, result.responses, repeated, strict=True):
            if ablation.name in names:
                metrics = self._benchmark.outcomes(document, responses)
                check = comparisons.get((document.index, ablation))
                compared = (check.compared, check.difference, check.unsteady) if check else None
                proxies = sums if ablation == INTACT else None
                part_sums = parts[ablation.part] if ablation.part else None
                scores = (responses, metrics, proxies, compared, repetition, part_sums)
                yield {**outcome_row(document, ablation.name, *scores), DIGEST_COLUMN: digest}
