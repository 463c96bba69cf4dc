"""Build an experiment from a YAML file, a model's name, a dict or keyword arguments.

All commands and Python functions with an experiment argument use this module.
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

from tracker.schema.errors import ExperimentError, RequestError
from tracker.schema.experiment import ALL_PARTS, EVALUATE_COMMAND, Experiment, Sweep
from tracker.schema.fields import first_problem
from tracker.schema.model_parts import PartsCounter
from tracker.schema.safe_yaml import parse_yaml, read_yaml, short_text

SweepType = TypeVar("SweepType", bound=Sweep)
ExperimentSource = str | os.PathLike[str] | Mapping[str, Any] | None
"""An experiment file, a model's name or folder, a dict with the contents of a file, or None."""
UNNAMED_FILE = "the experiment"
"""Name in messages for an experiment that has no file."""


@dataclass(frozen=True)
class ExperimentInput(Generic[SweepType]):
    """An experiment, read from a file or built from a model's name, a dict or keywords.

    Attributes:
        file: The parsed experiment file.
        text: The text of the experiment file.
        name: File name under which a results folder stores the experiment.
        source: Path of the experiment file for messages; `the experiment` if there is no file.
        command_arguments: Command-line arguments for the same experiment; empty if the experiment
            was given as a dict.
    """

    file: SweepType
    text: str = field(repr=False)
    name: str
    source: str
    command_arguments: tuple[str, ...]


@dataclass(frozen=True)
class FileKind(Generic[SweepType]):
    """A kind of experiment file: for `tracker run`, or for `tracker prune`.

    Attributes:
        schema: The class of the file's contents.
        expand: Function that expands the file's grid; raises RequestError for an invalid value.
        defaults: Default contents of a file that is built from keywords.
        is_other_kind: Function that returns whether a file's contents need the other command.
        other_kind_message: Error text for a file that needs the other command.
    """

    schema: type[SweepType]
    expand: Callable[[SweepType], object]
    defaults: Mapping[str, Any]
    is_other_kind: Callable[[Any], bool]
    other_kind_message: str

    @property
    def keys(self) -> list[str]:
        """The keys that a file of this kind allows under `parameters`."""
        parameters: Any = self.schema.model_fields["parameters"].annotation
        return list(parameters.model_fields)


def load_experiment(
    source: ExperimentSource,
    settings: Mapping[str, Any] | None = None,
    count: PartsCounter | None = None,
) -> ExperimentInput[Experiment]:
    """Load an experiment from a file, a model's name or a dict, and apply `settings`.

    Args:
        source: An experiment file, a model's name, a dict with the contents of a file, or None.
        settings: Keys of the file with new values, in the form that `apply_settings` takes.
        count: Function that counts the layers, heads and experts of a model; None if the experiment
            is only checked.

    Returns:
        The experiment, with the text and the name of its file.

    Raises:
        ExperimentError: The file is missing, is not YAML, or has unknown contents.
    """
    request = read_input(source, settings or {}, REMOVAL_FILES)
    request.file._count = count
    return request


def names_model(source: ExperimentSource) -> bool:
    """Return whether `source` is a model (a name, folder or GGUF file), not an experiment."""
    if source is None or isinstance(source, Mapping):
        return False
    path = Path(source)
    try:
        is_file = path.exists() and not path.is_dir()
    except OSError:  # no file system holds that name
        is_file = False
    return path.suffix not in (".yaml", ".yml") and (path.suffix == ".gguf" or not is_file)


def move_model(
    source: ExperimentSource, settings: Mapping[str, Any]
) -> tuple[ExperimentSource, dict[str, Any]]:
    """Move a model that is given as `source` to the key `model` of the settings.

    If `source` is a model, returns None and the new settings. Otherwise, `source` and `settings`
    are returned unchanged. ExperimentError is raised if the settings already name another model.
    """
    if source is None or isinstance(source, Mapping) or not names_model(source):
        return source, dict(settings)
    model = os.fspath(source)
    if settings.get("model", model) != model:
        raise ExperimentError(f"two models are given, {model} and {settings['model']}; name one")
    return None, {**settings, "model": model}


def read_input(
    experiment: ExperimentSource, settings: Mapping[str, Any], kind: FileKind[SweepType]
) -> ExperimentInput[SweepType]:
    """Read and check an experiment, and apply `settings`.

    The argument `kind` is the expected kind of file: for ablation runs or for pruning searches.
    """
    experiment, settings = move_model(experiment, settings)
    path = None if experiment is None or isinstance(experiment, Mapping) else Path(experiment)
    contents: Any = experiment
    text, file_name = "", UNNAMED_FILE
    if path is not None:
        contents, text = read_yaml(path)
        file_name = str(path)
        if kind.is_other_kind(contents):
            raise ExperimentError(f"{path}: {kind.other_kind_message} {path}")
    name = file_name
    if settings and contents is not None:
        name = f"{file_name} with {', '.join(_set_options(settings))}"
    # Contents from keywords are written and read back, so that they mean what the file will mean.
    is_new = path is None or bool(settings)
    if is_new:
        if contents is not None:
            _check_structure(contents, file_name, kind)
        contents, text = _convert_to_yaml(apply_settings(contents, settings, kind), name)
    file = _check_contents(contents, name, kind)
    arguments = () if isinstance(experiment, Mapping) else _command_arguments(path, settings)
    stored_name = _stored_name(file, text) if is_new or path is None else path.name
    return ExperimentInput(file, text, stored_name, file_name, arguments)


def _check_contents(raw: Any, name: str, kind: FileKind[SweepType]) -> SweepType:
    _check_structure(raw, name, kind)
    try:
        _refuse_skipped_runs(raw)
        file = kind.schema.model_validate(raw)
        kind.expand(file)
    except ValidationError as error:
        raise ExperimentError(f"{name}: {first_problem(error, kind.schema)}") from None
    except RequestError as error:
        raise ExperimentError(f"{name}: {error}") from None
    return file


def _check_structure(raw: object, name: str, kind: FileKind[SweepType]) -> None:
    """Raise ExperimentError if a file is not a mapping, or has settings but no `parameters`."""
    if not isinstance(raw, dict):
        raise ExperimentError(f"{name} contains no mapping; expected e.g. 'method: grid'")
    parameters = {key: value for key, value in raw.items() if key in kind.keys}
    if parameters and "parameters" not in raw:
        contents = apply_settings(None, parameters, kind)
        text = yaml.safe_dump(contents, sort_keys=False, default_flow_style=None)
        raise ExperimentError(
            f"{name}: the top-level keys {', '.join(map(repr, parameters))} belong under "
            f"'parameters'. Write:\n\n{text}"
        )


def _convert_to_yaml(contents: Mapping[str, Any], name: str) -> tuple[Any, str]:
    """Convert the contents of a file to YAML text, and parse the text again.

    Parsing gives values the types that they have in a file. Error messages contain `name`. Returns
    the parsed contents and the text.
    """
    try:
        text = yaml.safe_dump(dict(contents), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        text = f"a file cannot contain {short_text(error.args[-1])}; use texts, numbers or lists"
        raise ExperimentError(f"{name}: {text}") from None
    return parse_yaml(text, name), text


def apply_settings(
    raw: Mapping[str, Any] | None, settings: Mapping[str, Any], kind: FileKind[SweepType]
) -> dict[str, Any]:
    """Return a copy of the contents of an experiment file with changed settings.

    Args:
        raw: The contents of a file; None to start from `kind.defaults`.
        settings: Keys of the file with a value or a list of values; None removes the key from
            `raw`. Setting `limit` removes `sample`, and setting `sample` removes `limit`.
        kind: The kind of file: ablation runs or pruning searches.

    Returns:
        The new contents of the file.
    """
    new_contents = dict(kind.defaults if raw is None else raw)
    raw_parameters = new_contents.get("parameters")
    parameters = dict(raw_parameters) if isinstance(raw_parameters, Mapping) else {}
    for name, value in settings.items():
        if value is not None and (name in kind.keys or name not in Sweep.model_fields):
            replaced_key = _REPLACED_KEYS.get(name)
            if replaced_key and replaced_key not in settings:
                parameters.pop(replaced_key, None)
            parameters[name] = _file_form(name, value)
        elif value is not None:
            new_contents[name] = value
        elif raw is not None:
            parameters.pop(name, None)
    if raw is None:  # the order of keywords must not change the file
        keys = [*(key for key in kind.keys if key in parameters), *parameters]
        parameters = {key: parameters[key] for key in dict.fromkeys(keys)}
    return {**new_contents, "parameters": parameters}


_REPLACED_KEYS = {"limit": "sample", "sample": "limit"}
"""Setting → the key of the file that it replaces; both keys limit the number of documents."""
_LIST_ITEM_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "removed": int,
    "include_path": str,
    "budgets": int,
    "calibrate": str,
    "protect": (int, str),
    "among": (int, str),
}
"""Key whose values are lists → the type of their items."""


def _file_form(name: str, value: object) -> dict[str, Any]:
    allowed_keys = {"value", "values", "min", "max", "kind"}
    if name in ("protect", "among"):  # whose one value may be a mapping
        allowed_keys = {"value", "values"}
    if isinstance(value, Mapping) and value.keys() <= allowed_keys:
        return dict(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, list | tuple | range):
        value = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
        item_types = _LIST_ITEM_TYPES.get(name, ())
        if not value or not all(isinstance(item, item_types) for item in value):
            return {"values": value}
    return {"value": dict(value) if isinstance(value, Mapping) else value}


def _set_options(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield each setting in the format KEY=VALUE of the option `--set`."""
    for name, value in settings.items():
        form = _file_form(name, value)
        text = next(iter(form.values()), form)
        if _file_form(name, text) != form:  # a stretch, a kind, or several lists
            text = form
        yield f"{name}={text if isinstance(text, str) else json.dumps(text, default=str)}"


def _command_arguments(path: Path | None, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command-line arguments for a file and settings, with `--set` options."""
    words = (word for assignment in _set_options(settings) for word in ("--set", assignment))
    return (*([] if path is None else [str(path)]), *words)


def _stored_name(file: Any, text: str) -> str:
    """Return a unique name for the file in which an experiment is stored.

    `file` contains the parsed contents, and `text` is the YAML text. The file name consists of the
    experiment's name (or model and benchmark) and a hash of `text`.
    """
    options: Mapping[str, Any] = file.parameters.options
    name = file.name or f"{options['model'][0]}-{options['benchmark'][0]}"
    readable_name = re.sub(r"[^\w.-]+", "-", name).strip("-.")[-60:]
    return f"{readable_name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"


def requests_searches(source: ExperimentSource, settings: Mapping[str, Any]) -> bool:
    """Return whether an experiment requests pruning searches instead of ablation runs.

    ExperimentError is raised if the file cannot be read.
    """
    source, settings = move_model(source, settings)
    if source is not None and not isinstance(source, Mapping):
        source = read_yaml(Path(source))[0]
    names = {name for name, value in settings.items() if value is not None}
    return is_search_file({"parameters": dict.fromkeys(_parameter_names(source) | names)})


def is_search_file(raw: object) -> bool:
    """Return whether the contents of a file request pruning searches (`tracker prune`)."""
    return "layer" not in _parameter_names(raw) and bool(_SEARCH_KEYS & _parameter_names(raw))


def is_removal_file(raw: object) -> bool:
    """Return whether the contents of a file request ablation runs (`tracker run`)."""
    return "layer" in _parameter_names(raw) and not _SEARCH_KEYS & _parameter_names(raw)


_SEARCH_KEYS = {"remove", "keep", "max_drop", "keep_accuracy", "strategy"}


def _parameter_names(raw: object) -> set[Any]:
    parameters = raw.get("parameters") if isinstance(raw, Mapping) else None
    return set(parameters) if isinstance(parameters, Mapping) else set()


def _refuse_skipped_runs(raw: Mapping[Any, Any]) -> None:
    """Raise ExperimentError if the file has settings with which a W&B sweep skips runs.

    Such settings are `early_terminate` and the methods `bayes` and `random`.
    """
    if raw.get("method") in _OTHER_METHODS:
        raise ExperimentError(
            f"'method': {raw['method']} would skip runs, but tracker measures all runs. Write "
            "'method: grid'; for fewer runs, give fewer values or 'run_cap'"
        )
    if "early_terminate" in raw:
        raise ExperimentError(
            "'early_terminate' has no effect, because all runs are measured together. Leave it out"
        )


_OTHER_METHODS = ("bayes", "random")

REMOVAL_FILES = FileKind(
    Experiment,
    Experiment.cells,
    {"method": "grid", "command": EVALUATE_COMMAND, "parameters": {"layer": {"value": ALL_PARTS}}},
    is_search_file,
    "the file requests searches (it has 'remove', 'keep', 'max_drop', 'keep_accuracy' or "
    "'strategy'); type: tracker prune",
)
