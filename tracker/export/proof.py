"""Compare saved files with the measured model, in a fresh process that imports no tracker code."""

from __future__ import annotations

import json
import math
import subprocess
import sys
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
from tracker.core.changes import INTACT, Ablation
from tracker.core.config import CellRequest
from tracker.core.errors import WorkError
from tracker.core.estimates import Estimate
from tracker.engine.selfcheck.check import HALF, SINGLE
from tracker.export.facts import Proof
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC
from tracker.models.load import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXTS = (
    "The capital of France is Paris, and that of Japan is",
    "Question: Which organ pumps the blood through the body?\nAnswer:",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) +",
    "Im Jahre 1969 betrat der erste Mensch den Mond; 月に初めて",
)
"""Texts that both the saved model and the really changed one read."""
_REFERENCE = Path(__file__).parents[1] / "benchmarks" / "reference_process.py"
_MAX_ERROR_CHARACTERS = 600


@dataclass(frozen=True)
class ExpectedAnswers:
    """Answers of the really changed model in this process.

    Attributes:
        tokens: The tokens of each of `TEXTS`.
        logits: The logits of each of them, in float32.
        parameters: The number of the model's parameters.
        half: Whether it computes in half precision.
        device: The device that computed them.
        threads: The number of threads.
    """

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    parameters: int
    half: bool
    device: str
    threads: int


def expected(loaded: LoadedModel, model: PreTrainedModel, device: str) -> ExpectedAnswers:
    """Compute the answers of a really changed copy of a loaded model."""
    tokens = [loaded.tokenizer(text).input_ids for text in TEXTS]
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
    )


@dataclass(frozen=True)
class MeasuredCell:
    """Documents of a benchmark that were measured under the saved change.

    Attributes:
        request: The model and the benchmark.
        store: The outcomes.
        ablation: The change.
    """

    request: CellRequest
    store: CellStore
    ablation: Ablation

    @property
    def metric(self) -> str:
        """The requested metric."""
        return self.store.views.of(self.request).metric

    @cached_property
    def documents(self) -> Mapping[str, Sequence[int]]:
        """Task → the numbers of its documents."""
        return self.store.wanted(self.request.extent)

    @property
    def n(self) -> int:
        """The number of documents."""
        return sum(map(len, self.documents.values()))

    @cached_property
    def level(self) -> Estimate:
        """The metric under the change."""
        return self._level(self.ablation)

    @property
    def baseline(self) -> Estimate:
        """The metric of the intact model."""
        return self._level(INTACT)

    def _level(self, ablation: Ablation) -> Estimate:
        intact = self.store.views.of(self.request).model_copy(update={"removed": (), "runs": ()})
        outcomes = AlignedOutcomes(self.store, intact, besides=[self.ablation])
        return outcomes.by_metric([ablation]).level(0)


def prove(
    checkpoint: Path,
    wanted: ExpectedAnswers,
    measured: MeasuredCell | None,
    trust_remote_code: bool,
) -> Proof:
    """Load a checkpoint in a fresh process, and compare its answers with the expected ones.

    Args:
        checkpoint: The folder.
        wanted: The answers of the really changed model.
        measured: The measurement on a benchmark; None for the texts alone.
        trust_remote_code: Whether code in the folder may run.

    Returns:
        The proof.

    Raises:
        WorkError: It does not load, or is another model; the message states the difference.
        BenchmarkError: Plain lm-eval cannot run the benchmark.
    """
    from safetensors.torch import load_file

    with TemporaryDirectory() as name:
        folder = Path(name)
        question: dict[str, Any] = {
            "checkpoint": str(checkpoint.absolute()),
            "trust_remote_code": trust_remote_code,
            "device": wanted.device,
            "threads": wanted.threads,
            "texts": TEXTS,
            "tokens": wanted.tokens,
            "logits": str(folder / "logits.safetensors"),
            "answer": str(folder / "answer.json"),
            "benchmark": None,
        }
        if measured is not None:
            tasks = write_tasks(measured.request, measured.documents, folder / "tasks")
            question["benchmark"] = tasks
        answer = _ask(question, folder)
        logits = load_file(question["logits"])
        _refuse_other_model(answer, wanted)
        difference = _compare_logits([logits[str(n)] for n in range(len(TEXTS))], wanted)
    proof = Proof(len(TEXTS), difference, versions={"transformers": version("transformers")})
    if measured is None:
        return proof
    nats, ties = _compare_outcomes(answer, measured, wanted.half)
    return replace(
        proof,
        tasks=tuple(measured.documents),
        documents=measured.n,
        figure={} if question["benchmark"]["only"] else _figure(answer, measured, ties),
        loglikelihood=nats,
        ties=ties,
        versions={**proof.versions, "lm-eval": answer["lm_eval"]},
    )


def _ask(question: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the program in a fresh process, and read its answer."""
    file = folder / "asked.json"
    file.write_text(json.dumps(question), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", str(_REFERENCE), str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        error = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise WorkError(
            "what was saved does not load in a fresh process, or lm-eval cannot score it: "
            f"{error[:_MAX_ERROR_CHARACTERS]}"
        )
    answer: dict[str, Any] = json.loads(Path(question["answer"]).read_text(encoding="utf-8"))
    if answer["ours"]:
        raise WorkError(f"the fresh process has imported {answer['ours'][0]}")
    return answer


def _refuse_other_model(answer: Mapping[str, Any], wanted: ExpectedAnswers) -> None:
    if answer["not_as_saved"]:
        raise WorkError(
            f"plain transformers does not find, or has no place for, {answer['not_as_saved'][0]}"
        )
    if answer["parameters"] != wanted.parameters:
        raise WorkError(
            f"plain transformers loads {answer['parameters']:,} parameters, and the model "
            f"here has {wanted.parameters:,}"
        )
    for text, saved, ours in zip(TEXTS, answer["tokens"], wanted.tokens, strict=True):
        if saved != ours:
            raise WorkError(f"the saved tokenizer makes other tokens of {text!r}")


def _compare_logits(logits: Sequence[torch.Tensor], wanted: ExpectedAnswers) -> float:
    """Return the largest difference of logits; raise WorkError if it exceeds rounding."""
    nats, share = HALF if wanted.half else SINGLE
    largest = 0.0
    for text, theirs, ours in zip(TEXTS, logits, wanted.logits, strict=True):
        difference = float((theirs - ours).abs().max())
        if not difference <= nats + share * float(ours.abs().max()):
            raise WorkError(
                f"what plain transformers loads is another model: logits of {text!r} differ by "
                f"{difference:.3g}"
            )
        largest = max(largest, difference)
    return largest


def _compare_outcomes(
    answer: Mapping[str, Any], measured: MeasuredCell, half: bool
) -> tuple[float, int]:
    """Return the difference in nats, and ties; raise WorkError if lm-eval judges otherwise."""
    frame = measured.store.read()
    rows = frame[frame["ablation"] == measured.ablation.name].set_index(["task", "doc"])
    largest, ties, seen = 0.0, set(), set()
    for sample in answer["samples"]:
        task, number = key = sample["task"], sample["doc"]
        if number not in measured.documents[task]:  # only needed for the examples drawn before it
            continue
        seen.add(key)
        row = rows.loc[key]
        nats = _difference(row, sample["answers"])
        largest = max(largest, nats)
        for metric, theirs in sample["metrics"].items():
            full = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            if METRIC + full not in row or _agree(row[METRIC + full], theirs):
                continue
            if nats and nats <= _rounding(row, half):
                ties.add(key)
                continue
            raise WorkError(
                f"document {number} of {task}: lm-eval finds {full} {theirs} on what was saved, "
                f"and {row[METRIC + full]} was measured (answers differ by up to {nats:.3g} nats)"
            )
    if lacking := measured.n - len(seen):
        raise WorkError(f"lm-eval left out {lacking} of the documents that were measured")
    return largest, len(ties)


def _figure(answer: Mapping[str, Any], measured: MeasuredCell, ties: int) -> dict[str, float]:
    """Return lm-eval's own figure of one task; raise WorkError if the measured one differs."""
    metric, ours = measured.metric, measured.level.value
    if len(answer["results"]) != 1:
        return {}
    (row,) = answer["results"].values()
    theirs = row.get(metric if "," in metric else f"{metric},none")
    if theirs is None:
        return {}
    if not ties and ours is not None and not _close(ours, theirs):
        raise WorkError(f"lm-eval finds {metric} {theirs!r} on what was saved; measured: {ours!r}")
    return {metric: theirs}


def _difference(row: Mapping[str, Any], answers: Sequence[Any]) -> float:
    """Return the difference of answers from the measured ones, in nats; 0 for generated texts."""
    if answers and isinstance(answers[0], str):
        return 0.0
    theirs = [float(answer[0] if isinstance(answer, list) else answer) for answer in answers]
    ours = [float(value) for value in row["loglikelihoods"]]
    if len(ours) != len(theirs):  # windows of a whole text
        ours, theirs = [sum(ours)], [sum(theirs)]
    return max((abs(our - their) for our, their in zip(ours, theirs, strict=True)), default=0.0)


def _rounding(row: Mapping[str, Any], half: bool) -> float:
    nats, share = HALF if half else SINGLE
    return nats + share * max(abs(float(value)) for value in row["loglikelihoods"])


def _agree(ours: Any, theirs: Any) -> bool:
    """Return whether two values of a metric are equal; a pair is stored as JSON."""
    if isinstance(ours, str):
        pair = json.loads(ours)
        return len(pair) == len(theirs) and all(map(_close, pair, theirs))
    return _close(float(ours), float(theirs))


def _close(ours: float, theirs: float) -> bool:
    undefined = math.isnan(ours) and math.isnan(theirs)
    return undefined or math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-9)
