"""Facts about a changed model that was saved, as its card and `tracker.json` state them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from tracker.core.changes import Ablation, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, listed
from tracker.core.identities import ModelIdentity
from tracker.core.prune_records import Calibrated
from tracker.core.records import CellRecord


@dataclass(frozen=True)
class Accuracy:
    """A benchmark before and after; fractions where it is an accuracy.

    Attributes:
        benchmark: The benchmark's name.
        num_fewshot: The number of examples in its prompts.
        metric: The metric's name.
        documents: The documents, in words.
        n: The number of documents.
        before: The metric of the intact model.
        after: The metric of the changed model.
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
class Size:
    """A model's size: layers, and parameters and bytes of weights, tied ones once."""

    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Proof:
    """Result of loading the saved files with plain transformers and lm-eval in a fresh process.

    Attributes:
        texts: The number of texts that both models read.
        difference: The largest difference of a logit from the model that was really changed here.
        tasks: The tasks that lm-eval scored; empty without a benchmark.
        documents: The number of documents that lm-eval scored.
        figure: lm-eval's own figure, by the metric's name, where it scored just these documents of
            one task: what was measured, to the digit.
        loglikelihood: The largest difference of a log-likelihood, in nats.
        ties: Documents that the two judge differently, since answers lie within rounding.
        versions: The versions of transformers and lm-eval.
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
        """Write in sentences what was proved."""
        off = self.difference
        how = "bit by bit" if off == 0 else f"to within {off:.1e} (rounding)"
        sentences = [
            f"Loaded in a fresh process by plain AutoModelForCausalLM, {self.texts} texts have the "
            f"logits of the model that was really changed, {how}."
        ]
        if self.tasks:
            name = self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
            figure = "".join(f": {metric} {value!r}" for metric, value in self.figure.items())
            but = f", but for {self.ties} whose answers lie within rounding of each other"
            sentences.append(
                f"Scored there by plain lm-eval, each of {self.documents:,} documents of {name} is "
                f"judged as was measured{but if self.ties else ''}{figure}."
            )
        return sentences


_TAGS = {
    "pruned": ("pruned", "layer-pruning"),
    "repeated": ("self-merge", "repeated-layers"),
    "quantised": ("quantised", "mixed-precision"),
}
"""Tags of model cards by the kind of change."""


@dataclass(frozen=True)
class ModelChange:
    """A change of a model that an export saves, and how it was chosen.

    Attributes:
        ablation: Whole layers that are removed, layers that are passed again, or weights that have
            the values of formats.
        order: The removed layers in the order in which they were chosen; empty where none go.
        strategy: How layers were chosen; None where somebody just named them.
        calibration: The documents that chose them, in words; None where none did.
        tested: What the change cost on documents that chose nothing.
        chosen_by: The cells whose outcomes chose: trackers lead from the model to them.
        documents: The documents that chose.
    """

    ablation: Ablation
    order: tuple[int, ...] = ()
    strategy: str | None = None
    calibration: str | None = None
    tested: tuple[Accuracy, ...] = ()
    chosen_by: tuple[CellRecord, ...] = field(default=(), repr=False)
    documents: tuple[Calibrated, ...] = field(default=(), repr=False)

    @property
    def kind(self) -> str:
        """The prefix of the model's figures in trackers, and the section of its card."""
        if self.ablation.rounded:
            return "quantised"
        return "repeated" if self.ablation.repeated else "pruned"

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the model card."""
        return _TAGS[self.kind]

    @property
    def stretch(self) -> Change | None:
        """The layers that are passed again; None where none are."""
        return next(iter(self.ablation.repeated), None)

    @property
    def clause(self) -> str:
        """The change in words."""
        if self.stretch is not None:
            return self.stretch.clause
        if formats := Counter(unit.intervention for unit in self.ablation.rounded):
            counts = listed([f"{count} to {name}" for name, count in formats.most_common()])
            return f"the weights of {counted(formats.total(), 'unit')} are rounded: {counts}"
        layers = self.ablation.removed()
        are = "layers {} are" if len(layers) > 1 else "layer {} is"
        return f"{are.format(', '.join(map(str, layers)))} removed"


_FACTS = (
    *("base", "kept", "before", "after", "faster", "speed_on"),
    *("recipes", "resized", "accuracy", "proof"),
)
"""Fields of a saved model that machines get as they are."""


@dataclass(frozen=True)
class Exported:
    """A changed model that was saved, and what is known of it.

    Attributes:
        folder: The folder of the checkpoint.
        base: The model that it was made of.
        change: What was changed, and how that was chosen.
        kept: The original layer of each layer, in order: what healing by distillation needs.
        before: The base's size.
        after: The saved model's size, in a file of its formats.
        faster: How many times as fast as the base it reads, by turns: the median of all turns, and
            the ends of their middle half; None where other work on the machine kept it from being
            seen.
        speed_on: The hardware and the texts of that, in words; empty where it was not measured.
        recipes: What makes the same model elsewhere, by tool; nothing where something is resized.
        resized: Entries of the configuration that differ, besides the number of layers.
        formats: The format of each weight that is rounded, by its path.
        accuracy: What the change costs; first what was measured for this export.
        proof: What was proved of the files.
        locations: Where it was published, by backend.
        unpublished: Backend → why it does not have it.
    """

    folder: Path
    base: ModelIdentity
    change: ModelChange
    kept: tuple[int, ...]
    before: Size
    after: Size
    faster: tuple[float, float, float] | None
    speed_on: str
    recipes: dict[str, str]
    resized: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    accuracy: tuple[Accuracy, ...] = ()
    proof: Proof = Proof(texts=0, difference=0.0)
    locations: dict[str, str] = field(default_factory=dict)
    unpublished: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the model."""
        suffix = f"{self.after.layers}-of-{self.before.layers}-layers"
        if self.change.stretch is not None:
            suffix = str(self.change.stretch).replace(":", "-")
        elif self.formats:
            suffix = "-".join(sorted(set(self.formats.values())))
        return f"{self.base.name}-{suffix}"

    @property
    def exit_code(self) -> int:
        """0 = all done, 1 = it is saved, and a tracker does not have it."""
        return int(bool(self.unpublished))

    @property
    def size(self) -> str:
        """The model's size beside the base's, in a line."""
        before, after = asdict(self.before), asdict(self.after)
        if after["layers"] > before["layers"]:
            return "; ".join(f"{after[n]:,} {n} instead of {before[n]:,}" for n in before)
        return "; ".join(f"{after[n]:,} of {before[n]:,} {n}" for n in before)

    @property
    def speed(self) -> str:
        """The speed beside the base's, in a sentence."""
        if self.faster is None:
            return "Its speed could not be measured: other work on the machine disturbed the timing"
        middle, low, high = self.faster
        return (
            f"It reads {middle:.2f} times as fast as the base, in the middle half of all turns "
            f"{low:.2f} to {high:.2f}"
        )

    def figures(self) -> dict[str, float]:
        """Return the numbers of the model, by names that every backend takes."""
        kind = self.change.kind
        figures: dict[str, float] = {
            f"{name}/{quantity}": number
            for name, size in (("base", self.before), (kind, self.after))
            for quantity, number in asdict(size).items()
        }
        if self.faster is not None:
            figures[f"{kind}/times_as_fast"] = self.faster[0]
        for row in self.accuracy:
            metric = f"{row.benchmark}/{row.metric.replace(',', ' ')}"
            for name, level in (("base", row.before), (kind, row.after)):
                if level.value is not None:
                    figures[f"{name}/{metric}"] = level.value
        return figures

    def as_json(self) -> dict[str, Any]:
        """Return the facts that the model carries, as plain values."""
        change = self.change
        facts = {
            "name": self.name,
            "removed": change.ablation.removed(),
            "removed_in_order": change.order,
            "repeated": [str(span) for span in change.ablation.repeated],
            "change": change.clause,
            "strategy": change.strategy,
            "calibration": change.calibration,
            "chosen_by": [cell.key for cell in change.chosen_by],
            **{name: getattr(self, name) for name in _FACTS},
        }
        facts |= {"formats": self.formats} if self.formats else {}
        plain: dict[str, Any] = to_jsonable_python(facts)
        return plain
