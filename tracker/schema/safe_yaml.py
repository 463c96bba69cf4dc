"""Read YAML files with a size limit, and shorten values for error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tracker.schema.distribution import EXAMPLES_FOLDER
from tracker.schema.errors import ExperimentError, did_you_mean
from tracker.schema.text import HALF_CHARACTER, is_writable

_MAX_BYTES = 1_000_000
_MAX_NODES = 30_000
"""Maximum number of values in one experiment file, including repetitions by anchors. Reading more
values would take too long."""
_TOO_MANY = f"the YAML text has more than {_MAX_NODES:,} values"

MAX_VALUE_LENGTH = 80
"""Maximum number of characters of a value in an error message."""


def read_yaml(path: Path) -> tuple[Any, str]:
    """Read an experiment file, and return the parsed contents and the exact text.

    Raises ExperimentError if the file is missing, cannot be read, or is not YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ExperimentError(f"{path} is too large for an experiment file")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ExperimentError(f"there is no experiment file {path}.{suggest_file(path)}") from None
    except OSError as error:
        raise ExperimentError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ExperimentError(f"{path} cannot be read: it is not UTF-8 text") from None
    return parse_yaml(text, str(path)), text


def suggest_file(path: Path) -> str:
    """Return a sentence that suggests an experiment file with a similar name.

    The text is empty if no file has a similar name.
    """
    paths = [p for f in (path.parent, path.parent / "experiments") for p in f.glob("*.yaml")]
    paths_by_name = {candidate.name: str(candidate) for candidate in reversed(paths)}
    suggestion = did_you_mean(path.name, paths_by_name)
    for name, text in paths_by_name.items():
        suggestion = suggestion.replace(repr(name), repr(text))
    if not suggestion and (EXAMPLES_FOLDER / f"{path.stem}.yaml").exists():
        return " 'tracker init' writes the example experiments."
    return suggestion


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text; raise ExperimentError if it is invalid.

    The argument `name` is the name of the file in the error message.
    """
    try:
        return _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None)
        name, problem = f"{name}{line}", reason or "it cannot be parsed"
    except RecursionError:
        problem = "it is nested too deeply"
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # YAML's constructors raise these for '!!int abc' or a month 13.
        problem = short_text(error)
    raise ExperimentError(f"{name}: not valid YAML: {problem}")


def _parse(text: str) -> Any:
    """Parse YAML text with limits on its number of values.

    YAMLError is raised for invalid YAML, or if anchors (`&x`, `*x`) expand to too many values.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _count_values(root, {})
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, sizes: dict[int, int]) -> int:
    r"""Count the values of a parsed YAML node, including repetitions by anchors.

    The dict `sizes` caches the counts of nodes by their `id`. YAMLError is raised for too many
    values, for duplicate keys and for texts with invalid characters.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _yaml_error("the value contains itself through an anchor (&x)", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0  # until it is counted
    inner_nodes: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise _yaml_error(f"the key {key.value!r} is given twice", key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            inner_nodes += (key, value)
    elif isinstance(node, yaml.SequenceNode):
        inner_nodes = node.value
    elif not is_writable(node.value):
        raise _yaml_error(f"{short_text(node.value)}: {HALF_CHARACTER}", node.start_mark)
    sizes[id(node)] = count = 1 + sum(_count_values(part, sizes) for part in inner_nodes)
    if count > _MAX_NODES:
        raise _yaml_error(_TOO_MANY, node.start_mark)
    return count


def _yaml_error(problem: str, mark: yaml.Mark | None) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)


def short_text(value: object) -> str:
    """Format a value for an error message, truncated to `MAX_VALUE_LENGTH` characters."""
    text = str(value) if isinstance(value, Exception) else _repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}…"


def _repr(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "an integer with too many digits to show"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with a limit on the number of values."""

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.composed += 1
        if self.composed > _MAX_NODES:
            raise _yaml_error(_TOO_MANY, self.get_mark())
        return super().compose_node(parent, index)
