"""What is known of a pruned model: how it was chosen, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from tracker.core.estimates import Estimate
from tracker.core.identities import ModelIdentity
from tracker.core.prune_records import Calibrated
from tracker.core.records import CellRecord

_AS_THEY_ARE = (
    *("base", "kept", "before", "after", "faster", "speed_on"),
    *("recipes", "resized", "accuracy", "proof"),
)
"""What of a pruned model is told to machines as it stands here."""


@dataclass(frozen=True)
class Accuracy:
    """A benchmark before and after; fractions where it is an accuracy.

    Attributes:
        benchmark: The benchmark's name.
        num_fewshot: How many examples its prompts hold.
        metric: The metric's name.
        documents: Which documents, in words.
        n: How many.
        before: Of the intact model.
        after: Of the pruned model.
        unit: `%` for an accuracy, else that of the loss.
    """

    benchmark: str
    num_fewshot: int
    metric: str
    documents: str
    n: int
    before: Estimate
    after: Estimate
    unit: str = "%"


@dataclass(frozen=True)
class Pruning:
    """Which layers are to go, and what is known of the choice.

    Attributes:
        removed: The layers, 0-based, in the order in which they were chosen.
        strategy: How they were chosen; None where somebody just named them.
        calibration: The documents that chose them, in words; None where none did.
        tested: What it cost on documents that chose nothing.
        chosen_by: The cells whose outcomes chose: trackers lead from the model to them.
        documents: The documents that chose.
    """

    removed: tuple[int, ...]
    strategy: str | None = None
    calibration: str | None = None
    tested: tuple[Accuracy, ...] = ()
    chosen_by: tuple[CellRecord, ...] = field(default=(), repr=False)
    documents: tuple[Calibrated, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Size:
    """A model's size.

    Attributes:
        layers: How many it has.
        parameters: How many it has, tied ones once.
        bytes: What its weights take, tied ones once.
    """

    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Proof:
    """What plain transformers and plain lm-eval said of the saved files, in a fresh process.

    Attributes:
        texts: How many texts were read by both, and
        difference: the largest difference of a logit from the model that was really pruned here.
        task: The tasks that lm-eval scored; empty without a benchmark.
        documents: How many documents.
        figure: lm-eval's own figure, by the metric's name, where it scored just these documents of
            one task: what was measured, to the digit.
        loglikelihood: The largest difference of a log-likelihood, in nats.
        ties: Documents that the two judge differently, since answers lie within rounding.
        versions: Of transformers and lm-eval.
    """

    texts: int
    difference: float
    tasks: tuple[str, ...] = ()
    documents: int = 0
    figure: dict[str, float] = field(default_factory=dict)
    loglikelihood: float | None = None
    ties: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Say what was proved."""
        off = self.difference
        how = "bit by bit" if off == 0 else f"to within {off:.1e} (rounding)"
        said = [
            f"Loaded in a fresh process by plain AutoModelForCausalLM, {self.texts} texts have the "
            f"logits of the model that was really pruned, {how}."
        ]
        if self.tasks:
            name = self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
            figure = "".join(f": {metric} {value!r}" for metric, value in self.figure.items())
            but = f", but for {self.ties} whose answers lie within rounding of each other"
            said.append(
                f"Scored there by plain lm-eval, each of {self.documents:,} documents of {name} is "
                f"judged as was measured{but if self.ties else ''}{figure}."
            )
        return said


@dataclass(frozen=True)
class Exported:
    """A pruned model that was saved, and what is known of it.

    Attributes:
        folder: Where it is.
        base: The model that it was made of.
        pruning: What was removed, and why.
        kept: The original layer of each layer, in order: what healing by distillation needs.
        before: The base's size.
        after: The pruned model's.
        faster: How many times as fast as the base it reads, by turns: the median of all turns, and
            the ends of their middle half; None where other work on the machine kept it from being
            seen.
        speed_on: On what that was measured, in words.
        recipes: What makes the same model elsewhere, by tool; nothing where something is resized.
        resized: What the configuration says anew besides how many layers there are.
        accuracy: What the removal costs; first what was measured for this export.
        proof: What was proved of the files.
        locations: Where it was published, by backend.
        unpublished: Backend → why it does not have it.
    """

    folder: Path
    base: ModelIdentity
    pruning: Pruning
    kept: tuple[int, ...]
    before: Size
    after: Size
    faster: tuple[float, float, float] | None
    speed_on: str
    recipes: dict[str, str]
    resized: tuple[str, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()
    proof: Proof = Proof(texts=0, difference=0.0)
    locations: dict[str, str] = field(default_factory=dict)
    unpublished: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the model is called."""
        return f"{self.base.name}-{self.after.layers}-of-{self.before.layers}-layers"

    @property
    def exit_code(self) -> int:
        """0 = all done, 1 = it is saved, and a tracker does not have it."""
        return int(bool(self.unpublished))

    def as_json(self) -> dict[str, Any]:
        """Give the facts that the model carries, as plain values."""
        pruning = self.pruning
        facts = {
            "name": self.name,
            "removed": sorted(pruning.removed),
            "removed_in_order": pruning.removed,
            "strategy": pruning.strategy,
            "calibration": pruning.calibration,
            "chosen_by": [cell.key for cell in pruning.chosen_by],
        }
        plain: dict[str, Any] = to_jsonable_python(
            facts | {name: getattr(self, name) for name in _AS_THEY_ARE}
        )
        return plain
