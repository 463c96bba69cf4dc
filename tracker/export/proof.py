"""Compare saved files with the measured model, in a fresh process that imports no tracker code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from tracker.analysis.aligned import AlignedOutcomes
from tracker.benchmarks.standalone import write_tasks
from tracker.engine.selfcheck.check import HALF_TOLERANCE, SINGLE_TOLERANCE
from tracker.export.facts import Proof
from tracker.export.serving import run_program
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.models.load import LoadedModel
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.config import CellRequest
from tracker.schema.errors import WorkError
from tracker.schema.estimates import Estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROOF_TEXTS = (
    "The capital of France is Paris, and that of Japan is",
    "Question: Which organ pumps the blood through the body?\nAnswer:",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) +",
    "Im Jahre 1969 betrat der erste Mensch den Mond; 月に初めて",
)
"""Texts that both the saved model and the changed model in memory read."""
_REFERENCE_PROGRAM = Path(__file__).parents[1] / "benchmarks" / "reference_process.py"
Answer = Mapping[str, Any]
"""The answers of the fresh process."""


@dataclass(frozen=True)
class ExpectedAnswers:
    """Tokens and logits of the changed model in memory, which the saved files must reproduce.

    Attributes:
        tokens: The token ids of each text in `PROOF_TEXTS`.
        logits: The logits of each text in `PROOF_TEXTS`, in float32.
        n_parameters: The number of the model's parameters.
        is_half: True if the model computes in half precision.
        device: The device that computed the logits.
        n_threads: The number of CPU threads that computed the logits.
        max_length: The maximum number of tokens that the model reads; None if unlimited.
    """

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    n_parameters: int
    is_half: bool
    device: str
    n_threads: int
    max_length: int | None


def expected_answers(loaded: LoadedModel, model: PreTrainedModel, device: str) -> ExpectedAnswers:
    """Compute the tokens and logits of `PROOF_TEXTS` with a changed copy of a loaded model."""
    tokens = [loaded.tokenizer(text).input_ids for text in PROOF_TEXTS]
    logits = []
    with torch.inference_mode():
        for ids in tokens:
            batch = torch.tensor([ids], device=loaded.device)
            logits.append(model(input_ids=batch, use_cache=False).logits[0].float().cpu())
    return ExpectedAnswers(
        tokens,
        logits,
        model.num_parameters(),
        model.dtype not in (torch.float32, torch.float64),
        "spread" if device == "spread" else str(loaded.device),
        torch.get_num_threads(),
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


@dataclass(frozen=True)
class MeasuredCell:
    """Measured results of the changed model on a benchmark.

    Attributes:
        request: The model and the benchmark.
        store: The stored results.
        ablation: The change of the model that is saved.
    """

    request: CellRequest
    store: CellStore
    ablation: Ablation

    @property
    def metric(self) -> str:
        """Name of the requested metric, by default the benchmark's own metric."""
        return self.store.views.view_of(self.request).metric

    @property
    def unit(self) -> str:
        """The unit of the metric: `%` for an accuracy, otherwise empty."""
        task = self.store.identity.benchmark.tasks[0]
        return "%" if task.higher_is_better.get(self.metric, True) else ""

    @cached_property
    def documents(self) -> Mapping[str, Sequence[int]]:
        """Task → numbers of the task's measured documents."""
        return self.store.task_documents(self.request.extent)

    @property
    def n(self) -> int:
        """Number of measured documents of all tasks."""
        return sum(map(len, self.documents.values()))

    @cached_property
    def level(self) -> Estimate:
        """The value of the metric for the changed model."""
        return self._level(self.ablation)

    @property
    def baseline(self) -> Estimate:
        """The value of the metric for the intact model."""
        return self._level(INTACT)

    def _level(self, ablation: Ablation) -> Estimate:
        """Return the requested metric of the model under an ablation."""
        view = self.store.views.view_of(self.request).model_copy(update={"removed": (), "runs": ()})
        outcomes = AlignedOutcomes(self.store, view, extra_ablations=[self.ablation])
        return outcomes.metric_outcomes([ablation]).level(0)


def prove(
    checkpoint: Path, expected: ExpectedAnswers, cell: MeasuredCell | None, trust_remote_code: bool
) -> Proof:
    """Load a checkpoint in a fresh process, and compare its results with the changed model.

    Args:
        checkpoint: The folder of the checkpoint.
        expected: The tokens and logits of the changed model in memory.
        cell: The measured results on a benchmark, which lm-eval must reproduce with the checkpoint;
            None to compare only logits.
        trust_remote_code: True if code in the checkpoint's folder is trusted and can run.

    Returns:
        The result of the comparison.

    Raises:
        WorkError: The checkpoint does not load, or gives other results; the message states the
            difference.
        BenchmarkError: Plain lm-eval cannot run the benchmark.
    """
    from safetensors.torch import load_file

    with TemporaryDirectory() as name:
        folder = Path(name)
        question: dict[str, Any] = {
            "checkpoint": str(checkpoint.absolute()),
            "trust_remote_code": trust_remote_code,
            "device": expected.device,
            "threads": expected.n_threads,
            "texts": PROOF_TEXTS,
            "tokens": expected.tokens,
            "logits": str(folder / "logits.safetensors"),
            "benchmark": None,
        }
        if cell is not None:
            tasks = write_tasks(cell.request, cell.documents, folder / "tasks")
            question["benchmark"] = tasks
        answer = _run_reference(question)
        logits = load_file(question["logits"])
        _refuse_other_model(answer, expected)
        difference = compare_logits([logits[str(n)] for n in range(len(PROOF_TEXTS))], expected)
    proof = Proof(len(PROOF_TEXTS), difference, versions={"transformers": version("transformers")})
    if cell is None:
        return proof
    nats, ties = _compare_outcomes(answer, cell, expected.is_half)
    figure = {} if question["benchmark"]["only"] else _read_lm_eval_metric(answer, cell, ties)
    return replace(
        proof,
        tasks=tuple(cell.documents),
        documents=cell.n,
        data_set=tasks["data_sets"][0] if cell.store.identity.benchmark.is_shared else "",
        figure=figure,
        measured=cell.level.value if figure else None,
        unit=cell.unit,
        is_half=expected.is_half,
        loglikelihood=nats,
        ties=ties,
        versions={**proof.versions, "lm-eval": answer["lm_eval"]},
    )


def _run_reference(question: Mapping[str, Any]) -> dict[str, Any]:
    """Load a checkpoint in a fresh process, and return its logits and lm-eval's results.

    The process reads the request `question`. Raises WorkError if the process imports code of
    tracker.
    """
    problem = "the saved checkpoint does not load in a fresh process, or lm-eval cannot score it"
    answer: dict[str, Any] = run_program(question, [str(_REFERENCE_PROGRAM)], problem)
    if answer["ours"]:
        raise WorkError(
            "internal error, please report it: the fresh process must not use tracker's code, but "
            f"it has imported {answer['ours'][0]}"
        )
    return answer


def _refuse_other_model(answer: Answer, expected: ExpectedAnswers) -> None:
    """Raise WorkError unless the saved model has the expected weights and tokenizer."""
    if names := answer["not_as_saved"]:
        raise WorkError(
            f"the saved checkpoint, or its model in plain transformers, lacks the weight {names[0]}"
        )
    if answer["parameters"] != expected.n_parameters:
        raise WorkError(
            f"plain transformers loads {answer['parameters']:,} parameters, but the model in "
            f"memory has {expected.n_parameters:,}"
        )
    tokens = zip(PROOF_TEXTS, answer["tokens"], expected.tokens, strict=True)
    for text, saved_tokens, expected_tokens in tokens:
        if saved_tokens != expected_tokens:
            raise WorkError(f"the saved tokenizer splits {text!r} into different tokens")


def compare_logits(
    logits: Sequence[torch.Tensor], expected: ExpectedAnswers, tool: str = "plain transformers"
) -> float:
    """Compare logits of a tool with the expected logits, and return the largest difference.

    Raises WorkError if the difference is larger than rounding errors; `tool` is the program's name
    in the message.
    """
    max_nats, max_share = HALF_TOLERANCE if expected.is_half else SINGLE_TOLERANCE
    largest = 0.0
    for text, their_logits, our_logits in zip(PROOF_TEXTS, logits, expected.logits, strict=True):
        difference = float((their_logits - our_logits).abs().max())
        if not difference <= max_nats + max_share * float(our_logits.abs().max()):
            raise WorkError(
                f"{tool} loads a different model: logits of {text!r} differ by {difference:.3g} "
                "from the logits of the model in memory"
            )
        largest = max(largest, difference)
    return largest


def _compare_outcomes(answer: Answer, cell: MeasuredCell, is_half: bool) -> tuple[float, int]:
    """Compare lm-eval's results for each document with the measured results.

    Returns the largest difference of log-likelihoods in nats, and the number of documents on which
    rounding changed the metric. Raises WorkError if the metric of a document differs for another
    reason.
    """
    frame = cell.store.read()
    rows = frame[frame["ablation"] == cell.ablation.name].set_index(["task", "doc"])
    largest, ties, keys = 0.0, set(), set()
    for sample in answer["samples"]:
        task, number = key = sample["task"], sample["doc"]
        # Some samples are only needed for the examples drawn before them.
        if number not in cell.documents[task]:
            continue
        keys.add(key)
        row, name_filter = rows.loc[key], sample["filter"]
        nats = _answer_difference(row, sample["answers"])
        largest = max(largest, nats)
        for metric, saved_value in sample["metrics"].items():
            name = metric if name_filter == "none" else f"{metric},{name_filter}"
            value = row.get(METRIC_PREFIX + name)
            if value is None or _values_agree(value, saved_value):
                continue
            if nats and nats <= _rounding_limit(row, is_half):
                ties.add(key)
                continue
            raise WorkError(
                f"document {number} of {task}: lm-eval finds {name} {saved_value} for the saved "
                f"model, but {value} was measured (log-likelihoods differ by up to {nats:.3g} nats)"
            )
    if n_missing := cell.n - len(keys):
        raise WorkError(f"lm-eval has no results for {n_missing} of the measured documents")
    return largest, len(ties)


def _read_lm_eval_metric(answer: Answer, cell: MeasuredCell, ties: int) -> dict[str, float]:
    """Return {name: value} of the metric that lm-eval computed for the saved model.

    The dict is empty if lm-eval scored several tasks or did not compute the metric. `ties` is the
    number of documents on which rounding changed the metric. If `ties` is 0 and tracker measured
    another value, the function raises WorkError.
    """
    if len(answer["results"]) != 1:
        return {}
    (row,) = answer["results"].values()
    metric, level = cell.metric, cell.level.value
    value = row.get(metric if "," in metric else f"{metric},none")
    if value is None:
        return {}
    if not ties and level is not None and not _is_close(level, value):
        raise WorkError(f"lm-eval finds {metric} {value!r} on what was saved; measured: {level!r}")
    return {metric: value}


def _answer_difference(row: Mapping[str, Any], answers: Sequence[Any]) -> float:
    """Return the largest difference between lm-eval's and tracker's log-likelihoods of a document.

    `row` contains tracker's log-likelihoods, and `answers` contains lm-eval's log-likelihoods.
    """
    if answers and isinstance(answers[0], str):
        return 0.0
    values = [float(answer[0] if isinstance(answer, list) else answer) for answer in answers]
    own_values = [float(value) for value in row["loglikelihoods"]]
    if len(own_values) != len(values):  # windows of a whole text
        own_values, values = [sum(own_values)], [sum(values)]
    return max((abs(a - b) for a, b in zip(own_values, values, strict=True)), default=0.0)


def _rounding_limit(row: Mapping[str, Any], is_half: bool) -> float:
    """Return the largest difference of log-likelihoods (in nats) that counts as rounding error."""
    max_nats, max_share = HALF_TOLERANCE if is_half else SINGLE_TOLERANCE
    return max_nats + max_share * max(abs(float(value)) for value in row["loglikelihoods"])


def _values_agree(a: Any, b: Any) -> bool:
    """Return whether two metric values are equal up to rounding; `a` can be JSON text of a list."""
    if isinstance(a, str):
        pair = json.loads(a)
        return len(pair) == len(b) and all(map(_is_close, pair, b))
    return _is_close(float(a), float(b))


def _is_close(a: float, b: float) -> bool:
    """Return whether two values agree to five digits; two NaN values agree too."""
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))
