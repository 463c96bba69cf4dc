"""Define the types of settings, and describe invalid settings.

Settings that are passed on to lm-eval, transformers or chat templates are stored as sorted JSON.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from tracker.schema.changes import MAX_LAYERS
from tracker.schema.errors import RequestError, did_you_mean
from tracker.schema.questions import parse_question
from tracker.schema.safe_yaml import short_text
from tracker.schema.text import HALF_CHARACTER, is_writable

ARGUMENTS_FORM = "write {key: value, …} or key=value,key=value, as on lm-eval's command line"


def _canonical_json(value: object) -> object:
    """Convert settings to JSON text with sorted keys.

    The argument is a dict, or a text such as `key=value`. ValueError is raised if the settings are
    invalid.
    """
    if isinstance(value, str):
        value = _parse_arguments(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"invalid settings; {ARGUMENTS_FORM}")
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(
            "the settings have values that JSON cannot represent; use texts, numbers or lists"
        ) from None
    if not is_writable(text):
        raise ValueError(HALF_CHARACTER)
    return text


def _parse_arguments(text: str) -> Any:
    # `${args_json}` gives JSON, `${args}` the repr of a dict.
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError):
            if isinstance(settings := parse(text), dict):
                return settings
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or not all(equals and key.strip() for key, equals, _ in pairs):
        raise ValueError(f"invalid settings; {ARGUMENTS_FORM}")
    return {key.strip(): _parse_value(value.strip()) for key, _, value in pairs}


def _parse_value(text: str) -> Any:
    """Convert a text to a Boolean or a number if possible, as lm-eval does."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


JsonArguments = Annotated[str, BeforeValidator(_canonical_json)]


def expand_home(path: str | Path) -> Path:
    """Replace ~ in a path by the home folder; keep the path if no home folder is known."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises RuntimeError


def decode_arguments(arguments: str | None) -> dict[str, Any]:
    """Parse settings from JSON into a dict; return an empty dict for None."""
    settings: dict[str, Any] = json.loads(arguments) if arguments else {}
    return settings


def _check_writable(name: str) -> str:
    """Raise ValueError if a name contains a null character."""
    if "\0" in name:
        raise ValueError("the name contains a null character, which file systems refuse")
    return name


_Nonempty = StringConstraints(min_length=1, strip_whitespace=True)
Name = Annotated[str, _Nonempty, AfterValidator(_check_writable)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=0)]
Times = Annotated[int, Field(ge=2)]


def _sort_layers(value: object) -> Any:
    """Convert a list of layer numbers to a sorted tuple.

    ValueError is raised if the value is not a list, or contains a number twice.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected lists of layers, e.g. [3, 17], not {short_text(value)}")
    if len(value) > MAX_LAYERS:
        raise ValueError(f"no model has {len(value):,} layers")
    if len(set(map(str, value))) < len(value):
        raise ValueError("the list contains a layer twice")
    are_numbers = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in value)
    return tuple(sorted(value)) if are_numbers else tuple(value)


def parse_layer_range(text: str) -> range | None:
    """Parse a layer or a range of layers, such as `3` or `3-7`; return None for other texts.

    ValueError is raised if a range ends before it begins.
    """
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", text, re.ASCII)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"invalid range {text}; write {last}-{first}")
    return range(first, last + 1)


def as_tuple(value: object) -> Any:
    """Convert a name, a list of names, or a text such as `['a', 'b']` to a tuple."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            value = json.loads(value.replace("'", '"'))
    value = [value] if isinstance(value, str) else value
    return tuple(value) if isinstance(value, list) else value


def _sort_budgets(value: object) -> Any:
    """Convert a number, a list of numbers or text such as `64,128` to a sorted tuple."""
    if isinstance(value, str):
        value = [int(part) if part.strip().isdecimal() else part for part in value.split(",")]
    budgets = [value] if isinstance(value, int) else value
    if isinstance(budgets, list | tuple) and all(isinstance(b, int) for b in budgets):
        return tuple(sorted(set(budgets)))
    raise ValueError(f"expected numbers of tokens, e.g. 64,128, not {short_text(value)}")


def _check_single(name: str) -> str:
    """Return a benchmark's name; raise ValueError if the text contains several names."""
    if SEVERAL_BENCHMARKS.fullmatch(name):
        names = ", ".join(part.strip() for part in name.split(","))
        raise ValueError(f"expected one benchmark; for several, write values: [{names}]")
    return name


BenchmarkName = Annotated[Name, AfterValidator(_check_single)]
QuestionText = Annotated[Name, AfterValidator(lambda text: str(parse_question(text)))]
"""A question in its canonical text."""
Folders = Annotated[tuple[Name, ...], BeforeValidator(as_tuple)]
Budgets = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_sort_budgets)]
"""Numbers of tokens, ascending."""
Layers = Annotated[tuple[Count, ...], BeforeValidator(_sort_layers)]
SEVERAL_BENCHMARKS = re.compile(r"(traces:)?[\w-]+(\s*,\s*(traces:)?[\w-]+)+")
"""Pattern of several benchmarks separated by commas, as on lm-eval's command line."""


class StrictModel(BaseModel):
    """Base class of settings; unknown fields and values of the wrong type raise an error.

    The docstring of a field is also the help text of its command-line option.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


M = TypeVar("M", bound=BaseModel)


def validate_settings(
    kind: type[M],
    settings: Mapping[str, Any],
    prefix: str,
    parameter_names: Mapping[str, str] | None = None,
) -> M:
    """Build an object of class `kind` from settings; raise RequestError if they are invalid.

    The message names the invalid setting with `prefix` and `parameter_names`, as in
    `first_problem`.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        raise RequestError(first_problem(error, kind, prefix, parameter_names)) from None


def first_problem(
    error: ValidationError,
    model: type[BaseModel],
    prefix: str = "",
    parameter_names: Mapping[str, str] | None = None,
) -> str:
    """Return a one-line message about the first invalid setting.

    The message names the setting as the user writes it: `prefix`, then the key of the setting.
    `parameter_names` maps a field, such as `layers`, to the key in experiment files, such as
    `layer`.
    """
    problems = error.errors(include_url=False)
    # A misspelt key often makes another one missing, so it is named first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = problem["loc"]
    if parameter_names is not None:
        location = tuple(parameter_names.get(str(part), part) for part in location[:1])
    path = prefix + ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        fields = _fields_at(model, problem["loc"][:-1])
        suggestion = did_you_mean(key, fields)
        return f"unknown key '{path}'.{suggestion} Valid keys: {', '.join(fields)}."
    if problem["type"] == "missing":
        return f"'{path}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return f"{prefix}{message}" if prefix == "--" else f"'{prefix.rstrip('.')}': {message}"
    value = problem["input"]
    value_text = "" if isinstance(value, dict | BaseModel) else short_text(value)
    suffix = f" (got {value_text})" if value_text and value_text not in message else ""
    return f"'{path}': {message[:1].lower()}{message[1:300]}{suffix}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """List the valid keys of settings below a path of keys, such as `("parameters", "layer")`."""
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        kinds = getattr(annotation, "__args__", (annotation,))
        model = next(kind for kind in kinds if isinstance(kind, type))
    return list(model.model_fields)
