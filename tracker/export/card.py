"""Write the model card of a changed model, and the same facts for machines."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from tracker.core.formats import level_text
from tracker.core.hub import check_name
from tracker.core.text import as_code, as_markdown
from tracker.export.facts import Exported
from tracker.export.recipes import by_other_tools, why_none

FACTS = "tracker.json"


def write_card(model: Exported, folder: Path) -> None:
    """Write `README.md`, as the hub shows it, and `tracker.json`."""
    from huggingface_hub import ModelCard

    front = _front_matter(model).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{front}\n---\n\n{card_text(model)}")
    card.save(folder / "README.md")
    facts = json.dumps(model.as_json(), indent=2, ensure_ascii=False)
    (folder / FACTS).write_text(facts + "\n", encoding="utf-8")


def card_text(model: Exported) -> str:
    """Write the card below its front matter."""
    recipes, none = by_other_tools(model.recipes), why_none(model.resized)
    return _template().render(model=model, recipes=recipes, why_none=none)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("tracker.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"markdown": as_markdown, "code": as_code, "level": level_text}
    return environment.get_template("card.md.j2")


def _front_matter(model: Exported) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.benchmark,
            dataset_name=f"{row.benchmark}, {row.num_fewshot}-shot, {row.documents}",
            metric_type=row.metric,
            metric_value=row.after.value,
        )
        for row in model.accuracy
        if row.after.value is not None
    ]
    return ModelCardData(
        base_model=model.base.source if _is_on_the_hub(model) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*model.change.tags, "layer-tracker"],
        model_name=model.name if results else None,
        eval_results=results or None,
    )


def _is_on_the_hub(model: Exported) -> bool:
    try:
        check_name(model.base.source)
    except ValueError:
        return False
    return model.base.revision is not None
