"""What is known of a pruned or deepened model: how it was chosen, and what was measured of it.

They stand in its model card, and beside it for machines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from tracker.core.changes import Change
from tracker.core.estimates import Estimate
from tracker.core.hub import check_name
from tracker.core.identities import ModelIdentity
from tracker.core.prune_records import Calibrated
from tracker.core.records import CellRecord
from tracker.core.text import as_code, as_markdown
from tracker.pruning.export.recipes import by_other_tools, why_none
from tracker.pruning.search.figures import level_text

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
        after: Of the changed model.
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
    """Which layers are to go, or are passed again, and what is known of the choice.

    Attributes:
        removed: The layers, 0-based, in the order in which they were chosen.
        strategy: How they were chosen; None where somebody just named them.
        calibration: The documents that chose them, in words; None where none did.
        tested: What it cost on documents that chose nothing.
        chosen_by: The cells whose outcomes chose: trackers lead from the model to them.
        documents: The documents that chose.
        repeated: The layers that are passed again; then none go.
    """

    removed: tuple[int, ...]
    strategy: str | None = None
    calibration: str | None = None
    tested: tuple[Accuracy, ...] = ()
    chosen_by: tuple[CellRecord, ...] = field(default=(), repr=False)
    documents: tuple[Calibrated, ...] = field(default=(), repr=False)
    repeated: Change | None = None

    @property
    def stretches(self) -> tuple[Change, ...]:
        """The stretches that are passed again: one, or none."""
        return () if self.repeated is None else (self.repeated,)


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
        difference: the largest difference of a logit from the model that was really changed here.
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
            f"logits of the model that was really changed, {how}."
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
    """A pruned or deepened model that was saved, and what is known of it.

    Attributes:
        folder: Where it is.
        base: The model that it was made of.
        pruning: What was removed, or is repeated, and why.
        kept: The original layer of each layer, in order: what healing by distillation needs.
        before: The base's size.
        after: The saved model's.
        faster: How many times as fast as the base it reads, by turns: the median of all turns, and
            the ends of their middle half; None where other work on the machine kept it from being
            seen.
        speed_on: On what that was measured, in words.
        recipes: What makes the same model elsewhere, by tool; nothing where something is resized.
        resized: What the configuration says anew besides how many layers there are.
        accuracy: What the change costs; first what was measured for this export.
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
        repeated = self.pruning.repeated
        if repeated is not None:
            return f"{self.base.name}-{str(repeated).replace(':', '-')}"
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
            "repeated": [str(span) for span in pruning.stretches],
            "change": _change(pruning),
            "strategy": pruning.strategy,
            "calibration": pruning.calibration,
            "chosen_by": [cell.key for cell in pruning.chosen_by],
        }
        plain: dict[str, Any] = to_jsonable_python(
            facts | {name: getattr(self, name) for name in _AS_THEY_ARE}
        )
        return plain


FACTS = "tracker.json"
_TAGS = (["pruned", "layer-pruning"], ["self-merge", "repeated-layers"])
_USE = """In the folder of this card, or with its path or its name on the hub instead of the dot:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""


def write_card(model: Exported, folder: Path) -> None:
    """Write `README.md`, as the hub shows it, and `tracker.json`."""
    from huggingface_hub import ModelCard

    front = _front_matter(model).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{front}\n---\n\n{text(model)}")
    card.save(folder / "README.md")
    facts = json.dumps(model.as_json(), indent=2, ensure_ascii=False)
    (folder / FACTS).write_text(facts + "\n", encoding="utf-8")


def _front_matter(model: Exported) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=each.benchmark,
            dataset_name=f"{each.benchmark}, {each.num_fewshot}-shot, {each.documents}",
            metric_type=each.metric,
            metric_value=each.after.value,
        )
        for each in model.accuracy
        if each.after.value is not None
    ]
    return ModelCardData(
        base_model=model.base.source if _is_on_the_hub(model) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS[model.pruning.repeated is not None], "layer-tracker"],
        model_name=model.name if results else None,
        eval_results=results or None,
    )


def _is_on_the_hub(model: Exported) -> bool:
    try:
        check_name(model.base.source)
    except ValueError:
        return False
    return model.base.revision is not None


def text(model: Exported) -> str:
    """Write what the card says below its front matter."""
    base, stretch = model.base, model.pruning.repeated
    revision = f" at revision `{base.revision}`" if base.revision else ""
    told = _removed(model) if stretch is None else _repeated(model, stretch)
    parts = [
        f"# {as_markdown(model.name)}",
        f"{as_code(base.source)}{revision} ({base.architecture}, {base.dtype}) {told.short}, and "
        "not trained since.",
        _USE,
        f"## {told.heading}",
        told.what,
        "Layer of this model → layer of the base, for healing by distillation:",
        f"`{json.dumps(list(model.kept))}`",
        f"## {told.accuracy}",
        accuracy_table(model.accuracy) if model.accuracy else "Not measured.",
        f"## {told.size}",
        size_table(model),
        f"{speed(model)} ({model.speed_on}).",
        "## What was proved",
        "\n".join(f"- {sentence}" for sentence in model.proof.sentences()),
        "- With " + ", ".join(f"{n} {v}" for n, v in model.proof.versions.items()) + ".",
        "## The same model by other tools",
        *_by_other_tools(model),
        f"`{FACTS}` holds these facts for machines.",
    ]
    return "\n\n".join(parts) + "\n"


class _Told(NamedTuple):
    """What a card says of one way to change a model."""

    short: str
    what: str
    heading: str
    accuracy: str
    size: str


def _removed(model: Exported) -> _Told:
    chosen = model.pruning.removed
    gone = tuple(sorted(chosen))
    order = "" if chosen == gone else f", in the order {_listed(chosen)}"
    return _Told(
        f"without {len(gone)} of its {model.before.layers} layers",
        f"Layers {_listed(gone)} (0-based){order}. {_chosen(model)}",
        "What was removed",
        "What it costs",
        "What it saves",
    )


def _repeated(model: Exported, stretch: Change) -> _Told:
    clause = f"{stretch.clause[0].upper()}{stretch.clause[1:]}"
    on = model.pruning.calibration
    known = f" It was tried on {as_markdown(on)}, which may have chosen it." if on else ""
    return _Told(
        f"with {stretch.layer_words} of its {model.before.layers} passed {stretch.times}",
        f"{clause} (0-based): {stretch.repeats} copies, each with its own weights, stand one "
        f"behind the other. The stretch was named by hand.{known}",
        "What is repeated",
        "What it is worth",
        "What it takes",
    )


def _change(pruning: Pruning) -> str:
    """Say in a clause what was done."""
    if pruning.repeated is not None:
        return pruning.repeated.clause
    are = "layers {} are" if len(pruning.removed) > 1 else "layer {} is"
    return f"{are.format(_listed(sorted(pruning.removed)))} removed"


def _by_other_tools(model: Exported) -> list[str]:
    if not model.recipes:
        return [why_none(model.resized)]
    said = []
    for words, language, program in by_other_tools(model.recipes):
        said += [words, f"```{language}\n{program}\n```"]
    return said


def _chosen(model: Exported) -> str:
    strategy, by = model.pruning.strategy, model.pruning.calibration
    if strategy is None:
        return "They were named by hand."
    return f"The strategy `{strategy}` chose them" + (f" on {as_markdown(by)}." if by else ".")


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def accuracy_table(rows: Sequence[Accuracy]) -> str:
    """Lay out what the change costs, with 95 % intervals."""
    lines = [
        "| benchmark | metric | documents | before (95 % interval) | after (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {as_markdown(each.benchmark)}, {each.num_fewshot}-shot | {as_markdown(each.metric)} "
        f"| {as_markdown(each.documents)} | "
        f"{level_text(each.before, each.unit)} | {level_text(each.after, each.unit)} |"
        for each in rows
    ]
    return "\n".join(lines)


def size_table(model: Exported) -> str:
    """Lay out what the change saves, or takes."""
    lines = ["| | base | this model | change |", "|---|---|---|---|"]
    heads = {"layers": "layers", "parameters": "parameters", "bytes": "bytes of weights"}
    for name, head in heads.items():
        before, after = (getattr(size, name) for size in (model.before, model.after))
        share = 100 * (after / before - 1)
        lines.append(f"| {head} | {before:,} | {after:,} | {share:+.0f} % |")
    return "\n".join(lines)


def saved(one: Size, other: Size) -> str:
    """Say in a line what a change saves, or takes."""
    if other.layers > one.layers:
        return (
            f"{other.layers} layers instead of {one.layers}; {other.parameters:,} parameters "
            f"instead of {one.parameters:,}; {other.bytes:,} bytes instead of {one.bytes:,}"
        )
    return (
        f"{other.layers} of {one.layers} layers; {other.parameters:,} of {one.parameters:,} "
        f"parameters; {other.bytes:,} of {one.bytes:,} bytes"
    )


def speed(model: Exported) -> str:
    """Say how much faster than the base it reads."""
    if model.faster is None:
        return "Its speed could not be measured: other work on the machine disturbed the timing"
    middle, low, high = model.faster
    return (
        f"It reads {middle:.2f} times as fast as the base, in the middle half of all turns "
        f"{low:.2f} to {high:.2f}"
    )
