"""YAML that is no larger than it looks, and wrong values in messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tracker.core.distribution import EXAMPLES
from tracker.core.errors import ExperimentError, did_you_mean
from tracker.core.text import HALF, is_writable

_MAX_BYTES = 1_000_000
_MAX_NODES = 30_000
"""Values in one experiment file, each as often as an anchor repeats it: more were not meant, and
take long to read."""
_TOO_MANY = f"it holds more than {_MAX_NODES:,} values"

SHOWN = 80
"""Characters of a wrong value that a message repeats."""


def read_yaml(path: Path) -> tuple[Any, str]:
    """Read what stands in an experiment file, and its exact text.

    ExperimentError if it is missing, cannot be read, or is not YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ExperimentError(f"{path} is larger than any experiment file")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ExperimentError(f"there is no experiment file {path}.{like_file(path)}") from None
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ExperimentError(f"{path} cannot be read: it is no UTF-8 text") from None
    return parsed(text, str(path)), text


def like_file(path: Path) -> str:
    """Name the experiment file that is nearest to one that is not there, as `did_you_mean`."""
    there = [p for f in (path.parent, path.parent / "experiments") for p in f.glob("*.yaml")]
    by_name = {each.name: each for each in reversed(there)}
    near = did_you_mean(path.name, by_name)
    for name, each in by_name.items():
        near = near.replace(repr(name), repr(str(each)))
    if not near and (EXAMPLES / f"{path.stem}.yaml").exists():
        return " 'tracker init' writes the example experiments."
    return near


def parsed(text: str, name: str) -> Any:
    """Read YAML; ExperimentError, under a name, if it is none."""
    try:
        return _parse(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        raise ExperimentError(
            f"{name}{line}: not valid YAML: {problem or 'it cannot be parsed'}"
        ) from None
    except RecursionError:
        raise ExperimentError(f"{name}: not valid YAML: it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # What YAML's constructors make of '!!int abc' or of a month 13.
        raise ExperimentError(f"{name}: not valid YAML: {short(error)}") from None


def _parse(text: str) -> Any:
    """Read YAML that is not larger than it looks: anchors can make a few lines endless."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _count(root, {})
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    r"""Count the values that a node stands for, each as often as an anchor repeats it.

    Too many are refused, and a key that is given twice, and texts with a half of a character,
    `"\ud83d"`: no file and no hash takes it. Python reads one where JSON writes a character as two
    halves, so that it is not meant.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _problem("it holds itself, by an anchor", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0  # until it is counted
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise _problem(f"the key {key.value!r} is given twice", key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            inside += (key, value)
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    elif not is_writable(node.value):
        raise _problem(f"{short(node.value)} holds {HALF}", node.start_mark)
    sizes[id(node)] = count = 1 + sum(_count(part, sizes) for part in inside)
    if count > _MAX_NODES:
        raise _problem(_TOO_MANY, node.start_mark)
    return count


def _problem(what: str, mark: yaml.Mark | None) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=what, problem_mark=mark)


def short(value: object) -> str:
    """Show a wrong value in a message, however long it is."""
    text = str(value) if isinstance(value, Exception) else _repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _repr(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses too many values."""

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.composed += 1
        if self.composed > _MAX_NODES:
            raise _problem(_TOO_MANY, self.get_mark())
        return super().compose_node(parent, index)
