"""Read a request from a file, a model's name, a dict, keywords, or a mixture.

All commands and Python functions that take an experiment read it here, as one experiment file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import ValidationError

from tracker.core.errors import ExperimentError, RequestError
from tracker.core.experiment import ALL, EVALUATE, Experiment, Sweep
from tracker.core.fields import first_problem
from tracker.core.model_parts import Counting
from tracker.core.safe_yaml import parsed, read_yaml, short

S = TypeVar("S", bound=Sweep)
Given = str | os.PathLike[str] | Mapping[str, Any] | None
"""An experiment file, a model's name or folder, a dict of the file's shape, or nothing."""
NAMELESS = "the experiment"
"""The name in messages of an experiment without a file."""


@dataclass(frozen=True)
class ExperimentInput(Generic[S]):
    """A request in the form of an experiment file.

    Attributes:
        file: The parsed experiment file.
        text: The text of the experiment file.
        name: The file's name in a results folder.
        source: The file's name in messages.
        typed: The arguments that request it again on the command line; empty for a dict.
    """

    file: S
    text: str = field(repr=False)
    name: str
    source: str
    typed: tuple[str, ...]


@dataclass(frozen=True)
class FileKind(Generic[S]):
    """A kind of experiment file.

    Attributes:
        schema: The class of its contents.
        expand: Function that expands its grid; raises RequestError for an invalid value.
        new: Default contents of a file that is built from keywords.
        is_other: Function that checks whether a file's contents are of another kind.
        other: Message about a file of another kind; ends with the command for it.
    """

    schema: type[S]
    expand: Callable[[S], object]
    new: Mapping[str, Any]
    is_other: Callable[[Any], bool]
    other: str

    @property
    def keys(self) -> list[str]:
        """The keys under `parameters`."""
        parameters: Any = self.schema.model_fields["parameters"].annotation
        return list(parameters.model_fields)


def load_experiment(
    given: Given, settings: Mapping[str, Any] | None = None, count: Counting | None = None
) -> ExperimentInput[Experiment]:
    """Read and check an experiment.

    Args:
        given: The file, a model's name, a dict, or None.
        settings: Keys of the file with their values, as for `with_settings`.
        count: Function that counts the parts of a cell's model, for `layer: {value: all}`; None
            where the experiment is only checked.

    Returns:
        The request.

    Raises:
        ExperimentError: The file is missing, is not YAML, or has unknown contents.
    """
    asked = read_input(given, settings or {}, REMOVALS)
    asked.file._count = count
    return asked


def names_model(given: Given) -> bool:
    """Check whether an input names a model: a GGUF file, or no existing file and not YAML."""
    if given is None or isinstance(given, Mapping):
        return False
    path = Path(given)
    try:
        is_file = path.exists() and not path.is_dir()
    except OSError:  # no file system holds that name
        is_file = False
    return path.suffix not in (".yaml", ".yml") and (path.suffix == ".gguf" or not is_file)


def with_model(given: Given, settings: Mapping[str, Any]) -> tuple[Given, dict[str, Any]]:
    """Move a model into the settings; raise ExperimentError where they name another one."""
    if given is None or isinstance(given, Mapping) or not names_model(given):
        return given, dict(settings)
    model = os.fspath(given)
    if settings.get("model", model) != model:
        raise ExperimentError(f"two models are given, {model} and {settings['model']}")
    return None, {**settings, "model": model}


def read_input(given: Given, settings: Mapping[str, Any], kind: FileKind[S]) -> ExperimentInput[S]:
    """Read and check a request of any kind of file, as `load_experiment` does."""
    given, settings = with_model(given, settings)
    path = None if given is None or isinstance(given, Mapping) else Path(given)
    raw: Any = given
    text, source = "", NAMELESS
    if path is not None:
        raw, text = read_yaml(path)
        source = str(path)
        if kind.is_other(raw):
            raise ExperimentError(f"{path} {kind.other} {path}")
    name = source
    if settings and raw is not None:
        name = f"{source} with {', '.join(_assignments(settings))}"
    is_new = path is None or bool(settings)
    if is_new:
        if raw is not None:
            _refuse_shape(raw, source, kind)
        raw, text = _written(with_settings(raw, settings, kind), name)
    file = _checked(raw, name, kind)
    typed = () if isinstance(given, Mapping) else _typed(path, settings)
    called = _file_name(file, text) if is_new or path is None else path.name
    return ExperimentInput(file, text, called, source, typed)


def _checked(raw: Any, name: str, kind: FileKind[S]) -> S:
    _refuse_shape(raw, name, kind)
    try:
        _refuse_sweeps(raw)
        file = kind.schema.model_validate(raw)
        kind.expand(file)
    except ValidationError as error:
        raise ExperimentError(f"{name}: {first_problem(error, kind.schema)}") from None
    except RequestError as error:
        raise ExperimentError(f"{name}: {error}") from None
    return file


def _refuse_shape(raw: Any, name: str, kind: FileKind[S]) -> None:
    """Raise ExperimentError if it is no mapping, or has keys at the wrong level."""
    if not isinstance(raw, dict):
        raise ExperimentError(
            f"{name} holds no mapping; an experiment file starts with 'method: grid'"
        )
    flat = {key: value for key, value in raw.items() if key in kind.keys}
    if flat and "parameters" not in raw:
        shape = yaml.safe_dump(
            with_settings(None, flat, kind), sort_keys=False, default_flow_style=None
        )
        raise ExperimentError(
            f"{name}: {', '.join(map(repr, flat))} at the top belong under 'parameters'. "
            f"Write:\n\n{shape}"
        )


def _written(said: Mapping[str, Any], name: str) -> tuple[Any, str]:
    """Write contents as YAML, and read them back as from a file."""
    try:
        text = yaml.safe_dump(dict(said), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ExperimentError(
            f"{name} holds what no file can hold: {short(error.args[-1])}. Write texts, numbers "
            "and lists"
        ) from None
    return parsed(text, name), text


def with_settings(
    raw: Mapping[str, Any] | None, settings: Mapping[str, Any], kind: FileKind[S]
) -> dict[str, Any]:
    """Build an experiment from keywords, or change one by keywords.

    Args:
        raw: The contents of a file; None for no file.
        settings: Keys of the file with a value or a list of values; None removes the key from
            `raw`. `limit` and `sample` replace each other.
        kind: The kind of file; its `new` holds the defaults where `raw` is None.

    Returns:
        The contents of the file.
    """
    made = dict(kind.new if raw is None else raw)
    said = made.get("parameters")
    parameters = dict(said) if isinstance(said, Mapping) else {}
    for name, value in settings.items():
        if value is not None and (name in kind.keys or name not in Sweep.model_fields):
            other = _INSTEAD.get(name)
            if other and other not in settings:
                parameters.pop(other, None)
            parameters[name] = _as_in_the_file(name, value)
        elif value is not None:
            made[name] = value
        elif raw is not None:
            parameters.pop(name, None)
    if raw is None:  # the order of keywords must not change the file
        order = {key: place for place, key in enumerate(kind.keys)}
        parameters = dict(sorted(parameters.items(), key=lambda one: order.get(one[0], len(order))))
    return {**made, "parameters": parameters}


_INSTEAD = {"limit": "sample", "sample": "limit"}
"""Setting → the file's key that it replaces, since both limit the documents."""
_LISTS: Mapping[str, type | tuple[type, ...]] = {
    "removed": int,
    "include_path": str,
    "calibrate": str,
    "protect": (int, str),
    "among": (int, str),
}
"""Key whose values are lists → the type of their items."""


def _as_in_the_file(name: str, value: object) -> dict[str, Any]:
    own = {"value", "values", "min", "max", "kind"}
    if name in ("protect", "among"):  # whose one value may be a mapping
        own = {"value", "values"}
    if isinstance(value, Mapping) and value.keys() <= own:
        return dict(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list | tuple | range):
        value = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in value]
        single = _LISTS.get(name, ())
        if not value or not all(isinstance(each, single) for each in value):
            return {"values": value}
    return {"value": dict(value) if isinstance(value, Mapping) else value}


def _assignments(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings in the form of `--set`."""
    for name, value in settings.items():
        said = _as_in_the_file(name, value)
        only = next(iter(said.values()), said)
        if _as_in_the_file(name, only) != said:  # a stretch, a kind, or several lists
            only = said
        yield f"{name}={only if isinstance(only, str) else json.dumps(only, default=str)}"


def _typed(path: Path | None, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the arguments that request it on the command line."""
    sets = (word for each in _assignments(settings) for word in ("--set", each))
    return (*([] if path is None else [str(path)]), *sets)


def _file_name(file: Any, text: str) -> str:
    """Return a unique file name for an experiment that was not given as a file."""
    first: Mapping[str, Any] = file.parameters.options
    name = file.name or f"{first['model'][0]}-{first['benchmark'][0]}"
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")[-60:]
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"


def asks_for_searches(given: Given, settings: Mapping[str, Any]) -> bool:
    """Check whether an experiment requests searches, as for `tracker prune`.

    A file that cannot be read raises ExperimentError.
    """
    given, settings = with_model(given, settings)
    raw = given if given is None or isinstance(given, Mapping) else read_yaml(Path(given))[0]
    said = {name for name, value in settings.items() if value is not None}
    return is_of_searches({"parameters": dict.fromkeys(_parameter_names(raw) | said)})


def is_of_searches(raw: object) -> bool:
    """Check whether a file's contents request searches, as for `tracker prune`."""
    return "layer" not in _parameter_names(raw) and bool(_OF_SEARCHES & _parameter_names(raw))


def is_of_removals(raw: object) -> bool:
    """Check whether a file's contents name the removed layers, as for `tracker run`."""
    return "layer" in _parameter_names(raw) and not _OF_SEARCHES & _parameter_names(raw)


_OF_SEARCHES = {"remove", "keep", "strategy"}


def _parameter_names(raw: object) -> set[Any]:
    parameters = raw.get("parameters") if isinstance(raw, Mapping) else None
    return set(parameters) if isinstance(parameters, Mapping) else set()


def _refuse_sweeps(raw: Mapping[Any, Any]) -> None:
    """Raise ExperimentError for keys of W&B sweeps that an ablation study does not support."""
    if raw.get("method") in _NO_GRID:
        raise ExperimentError(
            f"'method': {raw['method']} searches for the best run and leaves the others out; here "
            "each run is a result, and all layers are measured together, which costs little more "
            "than one. Write 'method: grid'; for fewer runs give fewer values, or 'run_cap'"
        )
    if "early_terminate" in raw:
        raise ExperimentError(
            "'early_terminate': it stops runs that look bad halfway; here each run is a result, a "
            "cell's runs are measured together, and one that is stopped saves nothing. Leave it out"
        )


_NO_GRID = ("bayes", "random")

REMOVALS = FileKind(
    Experiment,
    Experiment.cells,
    {"method": "grid", "command": EVALUATE, "parameters": {"layer": {"value": ALL}}},
    is_of_searches,
    "asks for searches ('remove', 'keep' and 'strategy' say so): tracker prune",
)
