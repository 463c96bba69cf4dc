"""Define the facts about a saved model, for its model card and the file `tracker.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from tracker.export.serving import ServingFigure
from tracker.schema.changes import Ablation, Change
from tracker.schema.estimates import Estimate
from tracker.schema.formats import count_text, join_words, ties_text
from tracker.schema.identities import ModelIdentity
from tracker.schema.prune_records import CalibrationSet
from tracker.schema.records import CellRecord
from tracker.schema.text_templates import TextTemplate

FACT_TEXTS = TextTemplate("tracker.export", "facts", estimate=Estimate, ties_text=ties_text)


@dataclass(frozen=True)
class Accuracy:
    """A benchmark's metric, e.g. accuracy (from 0 to 1), before and after a change of a model.

    Attributes:
        benchmark: The benchmark's name.
        num_fewshot: The number of few-shot examples in the benchmark's prompts.
        metric: The metric's name.
        documents: Description of the measured documents.
        n: The number of documents.
        before: The metric of the intact model.
        after: The metric of the changed model.
        unit: `%` for an accuracy, otherwise the unit of the loss.
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
    """Number of layers, number of parameters and bytes of weights; tied weights count once."""

    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Proof:
    """Result of comparing the saved files with the changed model, in a fresh process.

    Attributes:
        texts: The number of compared texts.
        difference: The largest difference between logits of the saved files and of the changed
            model in memory.
        tasks: The tasks that lm-eval scored; empty without a benchmark.
        documents: The number of documents that lm-eval scored.
        figure: Name of the metric → lm-eval's value. Empty unless lm-eval scored exactly the
            measured documents of a single task.
        loglikelihood: The largest difference between lm-eval's and tracker's log-likelihood of the
            same request, in nats.
        ties: Number of documents whose metric differs because two answers are nearly equal.
        versions: The versions of transformers and lm-eval.
        measured: The measured value of the metric in `figure`; None without `figure`.
        unit: The unit of both values: `%` for an accuracy, otherwise empty.
        is_half: Whether the model computes in half precision.
        data_set: The hub id of the task's data set; empty for documents from elsewhere.
    """

    texts: int
    difference: float
    tasks: tuple[str, ...] = ()
    documents: int = 0
    figure: dict[str, float] = field(default_factory=dict)
    loglikelihood: float | None = None
    ties: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    measured: float | None = None
    unit: str = "%"
    is_half: bool = False
    data_set: str = ""

    def sentences(self) -> list[str]:
        """Return one or two sentences for the model card about the result of the comparison."""
        return FACT_TEXTS.render_all("proof", self)

    @property
    def ties_text(self) -> str:
        """Text that compares the measured value with the value of lm-eval.

        The text also states for how many documents the metric differs because of rounding.
        """
        return FACT_TEXTS.render("ties", self)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file of a saved model.

    Attributes:
        path: The path of the file.
        bytes: The size of the file.
        difference: The largest difference between llama.cpp's logits with unrounded activations
            and the logits of the changed model in memory, on `PROOF_TEXTS`.
        equal_tokens: Number of tokens in `PROOF_TEXTS` after which llama.cpp with rounded
            activations (its default) predicts the same next token as the changed model.
        tokens: Number of tokens in `PROOF_TEXTS`.
    """

    path: Path
    bytes: int
    difference: float
    equal_tokens: int
    tokens: int

    @property
    def text(self) -> str:
        """The file, its size and the result of its check."""
        return FACT_TEXTS.render("gguf", self)


_TAGS = {
    "pruned": ("pruned", "layer-pruning"),
    "repeated": ("self-merge", "repeated-layers"),
    "quantised": ("quantised", "mixed-precision"),
}
"""Tags of model cards by the kind of change."""


@dataclass(frozen=True)
class ModelChange:
    """A change of an exported model, and how the change was chosen.

    Attributes:
        ablation: The change: removed layers or parts of layers, repeated layers, or weights rounded
            to formats.
        order: The removed layers, in the order in which they were chosen; empty if no layers are
            removed.
        strategy: The strategy that chose the layers; None if a user named them.
        calibration: Description of the documents on which the change was chosen; None if no
            documents were used.
        tested: Metrics before and after the change, measured on documents that were not used to
            choose the change, except for how much is removed within a budget of accuracy.
        chosen_by: Records of the measurements that chose the change.
        documents: The documents on which the change was chosen.
        recommendation: The paragraph of the search that recommends the change; empty if none does.
    """

    ablation: Ablation
    order: tuple[int, ...] = ()
    strategy: str | None = None
    calibration: str | None = None
    tested: tuple[Accuracy, ...] = ()
    chosen_by: tuple[CellRecord, ...] = field(default=(), repr=False)
    documents: tuple[CalibrationSet, ...] = field(default=(), repr=False)
    recommendation: str = ""

    @property
    def kind(self) -> str:
        """The kind of change: `pruned`, `repeated` or `quantised`."""
        if self.ablation.roundings:
            return "quantised"
        return "repeated" if self.ablation.repetitions else "pruned"

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the model on the Hugging Face hub, such as `layer-pruning`."""
        return ("pruned", "structured-pruning") if self.ablation.parts else _TAGS[self.kind]

    @property
    def stretch(self) -> Change | None:
        """The repetition of a range of layers; None if no layers are repeated."""
        return next(iter(self.ablation.repetitions), None)

    @property
    def parts_text(self) -> str:
        """Numbers of removed parts, such as `2 layers and 30 groups of heads`.

        Empty if only whole layers or nothing is removed.
        """
        counts = Counter(change.plural for change in self.ablation.parts)
        texts = [f"{n} {plural}" for plural, n in counts.items()]
        if counts and (n_layers := len(self.ablation.removed())):
            texts.insert(0, count_text(n_layers, "layer"))
        return join_words(texts)

    @property
    def clause(self) -> str:
        """The change in words, as part of a sentence on the model card."""
        if self.stretch is not None:
            return self.stretch.clause
        if formats := Counter(unit.intervention for unit in self.ablation.roundings):
            counts = join_words([f"{count} to {name}" for name, count in formats.most_common()])
            return f"the weights of {count_text(formats.total(), 'unit')} are rounded: {counts}"
        if self.ablation.parts:
            layer = "remaining layer" if self.ablation.removed() else "layer"
            return f"{self.parts_text} are removed, an equal number from each {layer}"
        layers = self.ablation.removed()
        subject = "layers {} are" if len(layers) > 1 else "layer {} is"
        return f"{subject.format(', '.join(map(str, layers)))} removed"


_FACTS = ("before", "after", "serving", "speed_on", "recipes", "resized", "accuracy", "proof")
"""Fields of a saved model that are written to JSON unchanged."""


@dataclass(frozen=True)
class ExportedModel:
    """A changed model that was saved as a checkpoint, with facts about it.

    Attributes:
        folder: The folder of the checkpoint.
        base: The identity of the original model.
        change: The change of the model, and how the change was chosen.
        kept_layers: For each layer of the saved model, the number of the original layer, e.g. for
            later distillation.
        before: The size of the original model.
        after: The size of the saved model. Bytes are counted with each weight in its quantised
            format.
        serving: Speed and memory of the saved model and of the original model.
        speed_on: Description of the hardware of the timing, or the reason why it failed; empty if
            speed was not measured.
        recipes: Tool → recipe to make the same model with this tool; empty if no tool can make the
            model.
        resized: Names of changed configuration entries, except for the number of layers.
        formats: Path of each rounded weight → its format.
        gguf: The GGUF file of the saved model; None if none was requested. If there is a GGUF file,
            `serving` contains the speed of this file.
        problems: Tool → reason why this tool cannot make the model with these formats.
        accuracy: Metrics before and after the change.
        proof: Result of the check that the saved files give the measured results.
        locations: Tracking backend → location of the published model.
        unpublished: Tracking backend → error, for each backend that failed.
    """

    folder: Path
    base: ModelIdentity
    change: ModelChange
    kept_layers: tuple[int, ...]
    before: Size
    after: Size
    serving: tuple[ServingFigure, ...] = ()
    speed_on: str = ""
    recipes: dict[str, str] = field(default_factory=dict)
    resized: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    gguf: GgufFile | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    accuracy: tuple[Accuracy, ...] = ()
    proof: Proof = Proof(texts=0, difference=0.0)
    locations: dict[str, str] = field(default_factory=dict)
    unpublished: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the saved model."""
        suffix = f"{self.after.layers}-of-{self.before.layers}-layers"
        if self.change.ablation.parts:
            suffix = f"without-{self.change.parts_text.replace(',', '').replace(' ', '-')}"
        elif self.change.stretch is not None:
            suffix = str(self.change.stretch).replace(":", "-")
        elif self.formats:
            suffix = "-".join(sorted(set(self.formats.values())))
        return f"{self.base.name}-{suffix}"

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 = success, 1 = saved, but not published to every backend."""
        return int(bool(self.unpublished))

    @property
    def size(self) -> str:
        """One line with the sizes of the original model and the saved model."""
        base_size, size = asdict(self.before), asdict(self.after)
        if size["layers"] > base_size["layers"]:
            return "; ".join(f"{size[n]:,} {n} instead of {base_size[n]:,}" for n in base_size)
        return "; ".join(f"{size[n]:,} of {base_size[n]:,} {n}" for n in base_size)

    @property
    def speed_title(self) -> str:
        """Heading of the lines about speed and memory on the model card.

        If speed and memory are unknown, the heading states why.
        """
        hardware = reason = self.speed_on
        if not self.serving:
            return f"Speed and memory are not known: {reason}"
        tool = "Speed and memory with plain transformers" if self.gguf is None else "Speed"
        return f"{tool} ({hardware}):"

    def figures(self) -> dict[str, float]:
        """Return sizes, speeds and metrics of base and saved model, e.g. `base/parameters`."""
        kind = self.change.kind
        figures: dict[str, float] = {
            f"{name}/{quantity}": number
            for name, size in (("base", self.before), (kind, self.after))
            for quantity, number in asdict(size).items()
        }
        if self.gguf is not None:
            figures[f"{kind}/gguf_bytes"] = self.gguf.bytes
        for figure in self.serving:
            figures |= {
                f"base/{figure.name}": figure.base[0],
                f"{kind}/{figure.name}": figure.model[0],
            }
        for row in self.accuracy:
            metric = f"{row.benchmark}/{row.metric.replace(',', ' ')}"
            for name, level in (("base", row.before), (kind, row.after)):
                if level.value is not None:
                    figures[f"{name}/{metric}"] = level.value
        return figures

    def as_json(self) -> dict[str, Any]:
        """Return the facts about the model as JSON values, for the file `tracker.json`."""
        change = self.change
        facts = {
            "name": self.name,
            "removed": change.ablation.removed(),
            "removed_in_order": change.order,
            "repeated": [str(span) for span in change.ablation.repetitions],
            "change": change.clause,
            "strategy": change.strategy,
            "calibration": change.calibration,
            "chosen_by": [cell.key for cell in change.chosen_by],
            "base": self.base,
            "kept": self.kept_layers,
            **{name: getattr(self, name) for name in _FACTS},
        }
        if self.formats:
            facts |= {"formats": self.formats, "no_recipes": self.problems}
        facts |= {"removed_parts": [*map(str, parts)]} if (parts := change.ablation.parts) else {}
        if self.gguf is not None:
            facts["gguf"] = self.gguf
        json_values: dict[str, Any] = to_jsonable_python(facts)
        return json_values
