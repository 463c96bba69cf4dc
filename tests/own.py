"""A stranger's own tasks: YAML, Python beside it, and documents, in a folder."""

from __future__ import annotations

import json
from pathlib import Path

PAINT = [
    {"thing": "pump", "colours": ["red", "blue"], "right": 0},
    {"thing": "animal", "colours": ["brown", "green", "grey"], "right": 2},
    {"thing": "bolt", "colours": ["grey", "pink"], "right": 0},
    {"thing": "heart", "colours": ["white", "red"], "right": 1},
]
YAML = """\
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
ASKING = """\
import words

def ask(doc):
    return f"{words.LEAD} {doc['thing']}? It is"

def prepare(docs):
    return docs.filter(lambda doc: doc["thing"] != "bolt")
"""
SAYS = """\
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
GROUP = "group: both\ntask:\n  - paint\n  - says\n"


def write_tasks(place: Path) -> Path:
    """Write a task with Python, one that includes it, a group and a tag; returns the folder."""
    data = place / "paint.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAINT))
    folder = place / "mine"
    folder.mkdir()
    (folder / "paint.yaml").write_text(YAML.format(data=data))
    (folder / "says.yaml").write_text(SAYS)
    (folder / "both.yaml").write_text(GROUP)
    (folder / "asking.py").write_text(ASKING)
    (folder / "words.py").write_text('LEAD = "Which colour has a"\n')
    return folder


def write_pair(place: Path) -> Path:
    """Write two tasks that ask about the same rows, each in its own words; returns the folder."""
    folder = place / "pair"
    folder.mkdir()
    rows = [json.dumps({"q": f"Number {n}", "a": n % 2}) for n in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    for name, words in (("one", "{{q}}?"), ("other", "{{q}}, or what?")):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ntag: both\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {folder}/rows.jsonl\noutput_type: multiple_choice\ntest_split: test\n"
            f"doc_to_text: '{words}'\ndoc_to_choice: [red, blue]\ndoc_to_target: a\n"
            "metric_list:\n  - metric: acc\n"
        )
    return folder
