"""Holds saved files against what was measured, in a fresh process that knows nothing of tracker."""

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
from typing import Any

import torch

from tracker.benchmarks.standalone import write_tasks
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest
from tracker.core.errors import WorkError
from tracker.core.estimates import Estimate
from tracker.engine.selfcheck.check import HALF, SINGLE
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC
from tracker.models.load import LoadedModel
from tracker.pruning.export.facts import Proof

TEXTS = (
    "The capital of France is Paris, and that of Japan is",
    "Question: Which organ pumps the blood through the body?\nAnswer:",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) +",
    "Im Jahre 1969 betrat der erste Mensch den Mond; 月に初めて",
)
"""What the saved model and the really changed one both read."""
_REFERENCE = Path(__file__).parents[2] / "benchmarks" / "reference_process.py"
_SAID = 600


@dataclass(frozen=True)
class ExpectedAnswers:
    """What the really changed model says, here.

    Attributes:
        tokens: Of each of `TEXTS`.
        logits: Of each of them, in float32.
        parameters: How many the model has.
        half: Whether it computes in half precision.
        device: Where.
        threads: On how many threads.
    """

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    parameters: int
    half: bool
    device: str
    threads: int


def expected(loaded: LoadedModel, twin: Any, device: str) -> ExpectedAnswers:
    """Ask the really changed copy of a loaded model."""
    tokens = [loaded.tokenizer(text).input_ids for text in TEXTS]
    logits = []
    with torch.inference_mode():
        for ids in tokens:
            asked = torch.tensor([ids], device=loaded.device)
            logits.append(twin(input_ids=asked, use_cache=False).logits[0].float().cpu())
    return ExpectedAnswers(
        tokens,
        logits,
        twin.num_parameters(),
        twin.dtype not in (torch.float32, torch.float64),
        "spread" if device == "spread" else str(loaded.device),
        torch.get_num_threads(),
    )


@dataclass(frozen=True)
class MeasuredCell:
    """Documents of a benchmark that were measured under the change that was saved.

    Attributes:
        request: The model and the benchmark.
        store: Where the outcomes are.
        ablation: The change.
    """

    request: CellRequest
    store: CellStore
    ablation: Ablation

    @cached_property
    def level(self) -> Estimate:
        """The metric under the change."""
        intact = self.store.views.of(self.request).model_copy(update={"removed": (), "runs": ()})
        outcomes = AlignedOutcomes(self.store, intact, besides=[self.ablation])
        return outcomes.by_metric([self.ablation]).level(0)


def prove(
    checkpoint: Path,
    wanted: ExpectedAnswers,
    measured: MeasuredCell | None,
    trust_remote_code: bool,
) -> Proof:
    """Load a checkpoint in a fresh process, and hold what it says against what is expected.

    Args:
        checkpoint: The folder.
        wanted: What the really changed model said.
        measured: What was measured on a benchmark; None for the texts alone.
        trust_remote_code: Whether code in the folder may run.

    Returns:
        What was proved.

    Raises:
        WorkError: It does not load, or is another model; says what differs.
        BenchmarkError: The benchmark cannot be given to plain lm-eval.
    """
    from safetensors.torch import load_file

    with TemporaryDirectory() as name:
        folder = Path(name)
        asked: dict[str, Any] = {
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
        documents: dict[str, Sequence[int]] = {}
        if measured is not None:
            documents = measured.store.wanted(measured.request.extent)
            asked["benchmark"] = write_tasks(measured.request, documents, folder / "tasks")
        answer = _ask(asked, folder)
        logits = load_file(asked["logits"])
        _refuse_other_model(answer, wanted)
        difference = _same_logits([logits[str(n)] for n in range(len(TEXTS))], wanted)
    proof = Proof(len(TEXTS), difference, versions={"transformers": version("transformers")})
    if measured is None:
        return proof
    far, ties = _same_outcomes(answer, measured, documents, wanted.half)
    return replace(
        proof,
        tasks=tuple(documents),
        documents=sum(map(len, documents.values())),
        figure={} if asked["benchmark"]["only"] else _figure(answer, measured, ties),
        loglikelihood=far,
        ties=ties,
        versions={**proof.versions, "lm-eval": answer["lm_eval"]},
    )


def _ask(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the program, and read its answer."""
    file = folder / "asked.json"
    file.write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", str(_REFERENCE), str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise WorkError(
            "what was saved does not load in a fresh process, or lm-eval cannot score it: "
            f"{said[:_SAID]}"
        )
    answer: dict[str, Any] = json.loads(Path(asked["answer"]).read_text(encoding="utf-8"))
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


def _same_logits(found: Sequence[torch.Tensor], wanted: ExpectedAnswers) -> float:
    """Refuse logits that differ by more than rounding; gives the largest difference."""
    nats, share = HALF if wanted.half else SINGLE
    far = 0.0
    for text, theirs, ours in zip(TEXTS, found, wanted.logits, strict=True):
        difference = float((theirs - ours).abs().max())
        if not difference <= nats + share * float(ours.abs().max()):
            raise WorkError(
                f"what plain transformers loads is another model: logits of {text!r} differ by "
                f"{difference:.3g}"
            )
        far = max(far, difference)
    return far


def _same_outcomes(
    answer: Mapping[str, Any],
    measured: MeasuredCell,
    documents: Mapping[str, Sequence[int]],
    half: bool,
) -> tuple[float, int]:
    """Refuse documents that lm-eval judges otherwise; the largest difference in nats, and ties."""
    name = measured.ablation.name
    frame = measured.store.read()
    rows = frame[frame["ablation"] == name].set_index(["task", "doc"])
    far, ties, seen = 0.0, set(), set()
    for sample in answer["samples"]:
        task, number = sample["task"], sample["doc"]
        if number not in documents[task]:  # it was only there for the examples drawn before it
            continue
        row, place = rows.loc[(task, number)], (task, number)
        seen.add(place)
        nats = _apart(row, sample["answers"])
        far = max(far, nats)
        for metric, theirs in sample["metrics"].items():
            full = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            if METRIC + full not in row or _agree(row[METRIC + full], theirs):
                continue
            if nats and nats <= _rounding(row, half):
                ties.add(place)
                continue
            raise WorkError(
                f"document {number} of {task}: lm-eval finds {full} {theirs} on what was saved, "
                f"and {row[METRIC + full]} was measured (answers differ by up to {nats:.3g} nats)"
            )
    lacking = sum(map(len, documents.values())) - len(seen)
    if lacking:
        raise WorkError(f"lm-eval left out {lacking} of the documents that were measured")
    return far, len(ties)


def _figure(answer: Mapping[str, Any], measured: MeasuredCell, ties: int) -> dict[str, float]:
    """Take lm-eval's own figure of one task; refuse another one than was measured."""
    metric = measured.store.views.of(measured.request).metric
    ours = measured.level.value
    if len(answer["results"]) != 1:
        return {}
    (row,) = answer["results"].values()
    theirs = row.get(metric if "," in metric else f"{metric},none")
    if theirs is None:
        return {}
    if not ties and ours is not None and not _close(ours, theirs):
        raise WorkError(f"lm-eval finds {metric} {theirs!r} on what was saved; measured: {ours!r}")
    return {metric: theirs}


def _apart(row: Mapping[str, Any], answers: Sequence[Any]) -> float:
    """How far answers lie from the measured ones, in nats; 0 for texts, which have none."""
    if answers and isinstance(answers[0], str):
        return 0.0
    theirs = [float(each[0] if isinstance(each, list) else each) for each in answers]
    ours = [float(value) for value in row["loglikelihoods"]]
    if len(ours) != len(theirs):  # windows of a whole text
        ours, theirs = [sum(ours)], [sum(theirs)]
    return max((abs(one - other) for one, other in zip(ours, theirs, strict=True)), default=0.0)


def _rounding(row: Mapping[str, Any], half: bool) -> float:
    nats, share = HALF if half else SINGLE
    return nats + share * max(abs(float(value)) for value in row["loglikelihoods"])


def _agree(ours: Any, theirs: Any) -> bool:
    """Whether two values of a metric are the same; a pair is kept as JSON."""
    if isinstance(ours, str):
        one, other = json.loads(ours), theirs
        return len(one) == len(other) and all(map(_close, one, other))
    return _close(float(ours), float(theirs))


def _close(one: float, other: float) -> bool:
    same = math.isnan(one) and math.isnan(other)
    return same or math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9)
