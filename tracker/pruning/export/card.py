"""The model card of a pruned model, and the same facts for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracker.core.hub import check_name
from tracker.core.text import as_markdown
from tracker.pruning.export.facts import Accuracy, Exported, Size
from tracker.pruning.export.recipes import by_other_tools, why_none
from tracker.pruning.search.figures import level_text

FACTS = "tracker.json"
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
        tags=["pruned", "layer-pruning", "layer-tracker"],
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
    base, chosen = model.base, model.pruning.removed
    gone = tuple(sorted(chosen))
    order = "" if chosen == gone else f", in the order {_listed(chosen)}"
    revision = f" at revision `{base.revision}`" if base.revision else ""
    parts = [
        f"# {as_markdown(model.name)}",
        f"`{base.source}`{revision} ({base.architecture}, {base.dtype}) without "
        f"{len(gone)} of its {model.before.layers} layers, and not trained since.",
        _USE,
        "## What was removed",
        f"Layers {_listed(gone)} (0-based){order}. {_chosen(model)}",
        "Layer of this model → layer of the base, for healing by distillation:",
        f"`{json.dumps(list(model.kept))}`",
        "## What it costs",
        accuracy_table(model.accuracy) if model.accuracy else "Not measured.",
        "## What it saves",
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
    """Lay out what the removal costs, with 95 % intervals."""
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
    """Lay out what the removal saves."""
    lines = ["| | base | this model | change |", "|---|---|---|---|"]
    heads = {"layers": "layers", "parameters": "parameters", "bytes": "bytes of weights"}
    for name, head in heads.items():
        before, after = (getattr(size, name) for size in (model.before, model.after))
        share = 100 * (after / before - 1)
        lines.append(f"| {head} | {before:,} | {after:,} | {share:+.0f} % |")
    return "\n".join(lines)


def saved(one: Size, other: Size) -> str:
    """Say in a line what a removal saves."""
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
