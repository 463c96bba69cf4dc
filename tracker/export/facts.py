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
        difference: The largest difference of a logit from the really changed model.
        tasks: The tasks that lm-eval scored; empty without a benchmark.
        documents: The number of documents that lm-eval scored.
        figure: lm-eval's own figure, by the metric's name, if it scored exactly these documents of
            one task; it equals the measured one to the digit.
        loglikelihood: The largest difference of a log-likelihood, in nats.
        ties: Number of documents judged differently, since answers lie within rounding.
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
        """Describe the proof in sentences."""
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
        ablation: The change: removed layers, repeated layers, or weights with the values of
            formats.
        order: The removed layers in the order in which they were chosen; empty if none are.
        strategy: How layers were chosen; None if a user named them.
        calibration: Description of the documents that chose them; None if none did.
        tested: The cost of the change on documents that chose nothing.
        chosen_by: The cells whose outcomes chose, to which trackers link the model.
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
        """The repeated layers; None if none are."""
        return next(iter(self.ablation.repeated), None)

    @property
    def clause(self) -> str:
        """A description of the change."""
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
"""Fields of a saved model that are written to JSON unchanged."""


@dataclass(frozen=True)
class Exported:
    """A changed model that was saved, with facts about it.

    Attributes:
        folder: The folder of the checkpoint.
        base: The original model.
        change: The change, and how it was chosen.
        kept: The original layer of each layer, in order, for healing by distillation.
        before: The base's size.
        after: The saved model's size, in a file of its formats.
        faster: Its reading speed relative to the base, by turns: the median of all turns, and the
            ends of their middle half; None if other work on the machine disturbed the timing.
        speed_on: Description of the hardware and the texts of the timing; empty if not measured.
        recipes: Recipes for the same model by tool; empty if entries are resized.
        resized: Entries of the configuration that differ, besides the number of layers.
        formats: The format of each weight that is rounded, by its path.
        accuracy: The cost of the change; first what was measured for this export.
        proof: The proof of the files.
        locations: Its locations after publication, by backend.
        unpublished: Backend → the reason why it does not have the model.
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
        """The exit code: 0 = all done, 1 = saved, but missing in a tracker."""
        return int(bool(self.unpublished))

    @property
    def size(self) -> str:
        """The model's size beside the base's, in one line."""
        before, after = asdict(self.before), asdict(self.after)
        if after["layers"] > before["layers"]:
            return "; ".join(f"{after[n]:,} {n} instead of {before[n]:,}" for n in before)
        return "; ".join(f"{after[n]:,} of {before[n]:,} {n}" for n in before)

    @property
    def speed(self) -> str:
        """The speed beside the base's, in one sentence."""
        if self.faster is None:
            return "Its speed could not be measured: other work on the machine disturbed the timing"
        middle, low, high = self.faster
        return (
            f"It reads {middle:.2f} times as fast as the base, in the middle half of all turns "
            f"{low:.2f} to {high:.2f}"
        )

    def figures(self) -> dict[str, float]:
        """Return the numbers of the model, under names that every backend accepts."""
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
