"""A stranger's own tasks: YAML, Python beside it, and documents, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.helpers.lm_eval import write_rows

PAINT_ROWS = [
    {"thing": "pump", "colours": ["red", "blue"], "right": 0},
    {"thing": "animal", "colours": ["brown", "green", "grey"], "right": 2},
    {"thing": "bolt", "colours": ["grey", "pink"], "right": 0},
    {"thing": "heart", "colours": ["white", "red"], "right": 1},
]
PAINT_TASK = """\
task: paint
tag: hues
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
    train: {data}
test_split: test
fewshot_split: train
output_type: multiple_choice
description: "Name the colour.\\n\\n"
doc_to_text: !function asking.ask
doc_to_target: right
doc_to_choice: colours
process_docs: !function asking.prepare
metric_list:
  - metric: acc
"""
ASKING_MODULE = """\
import words

def ask(doc):
    return f"{words.LEAD} {doc['thing']}? It is"

def prepare(docs):
    return docs.filter(lambda doc: doc["thing"] != "bolt")
"""
SAYS_TASK = """\
include: paint.yaml
task: says
tag: hues
output_type: generate_until
doc_to_target: thing
doc_to_choice: null
process_docs: null
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
GROUP_TASK = "group: both\ntask:\n  - paint\n  - says\n"


def write_tasks(parent: Path) -> Path:
    """Write a task with Python, one that includes it, a group and a tag; returns the folder."""
    data = write_rows(parent, paint=PAINT_ROWS) / "paint.jsonl"
    folder = parent / "mine"
    folder.mkdir()
    (folder / "paint.yaml").write_text(PAINT_TASK.format(data=data))
    (folder / "says.yaml").write_text(SAYS_TASK)
    (folder / "both.yaml").write_text(GROUP_TASK)
    (folder / "asking.py").write_text(ASKING_MODULE)
    (folder / "words.py").write_text('LEAD = "Which colour has a"\n')
    return folder


def write_choices(folder: Path, name: str, rows: Path, question: str, **settings: Any) -> Path:
    """Write a task that asks a question about rows, with two colours to choose from; its file."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": question,
        "doc_to_choice": ["red", "blue"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task | settings))
    return file


def write_pair(parent: Path) -> Path:
    """Write two tasks that ask about the same rows, each in its own words; returns the folder."""
    rows = [{"q": f"Number {n}", "a": n % 2} for n in range(20)]
    folder = write_rows(parent / "pair", rows=rows)
    for name, template in (("one", "{{q}}?"), ("other", "{{q}}, or what?")):
        write_choices(folder, name, folder / "rows.jsonl", template, tag="both")
    return folder
