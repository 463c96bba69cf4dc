"""Define the types of values from files and commands, and report their first problem.

Settings of lm-eval, transformers and chat templates are stored as canonical JSON, which can be
compared and hashed.
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

from tracker.core.changes import MAX_LAYERS
from tracker.core.errors import RequestError, did_you_mean
from tracker.core.questions import question
from tracker.core.safe_yaml import short
from tracker.core.text import HALF, is_writable

FORM = "write {key: value, …}, or key=value,key=value as for lm-eval"


def _canonical(given: object) -> object:
    """Return settings from YAML, W&B or lm-eval's `key=value` form as canonical JSON."""
    if isinstance(given, str):
        given = _typed(given)
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"it is no set of settings; {FORM}")
    try:
        text = json.dumps(given, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("it holds what JSON cannot say; write texts, numbers, lists") from None
    if not is_writable(text):
        raise ValueError(f"it holds {HALF}")
    return text


def _typed(text: str) -> Any:
    # `${args_json}` gives JSON, `${args}` the repr of a dict.
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError):
            if isinstance(settings := read(text), dict):
                return settings
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or not all(sign and key.strip() for key, sign, _ in pairs):
        raise ValueError(f"it is no set of settings; {FORM}")
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _value(text: str) -> Any:
    """Read a value as lm-eval does."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


Arguments = Annotated[str, BeforeValidator(_canonical)]


def expanded(path: str | Path) -> Path:
    """Return a path with its ~ replaced by a home folder, or unchanged if there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises RuntimeError


def decoded(arguments: str | None) -> dict[str, Any]:
    """Return settings as a dict, empty where there are none."""
    settings: dict[str, Any] = json.loads(arguments) if arguments else {}
    return settings


def _written(name: str) -> str:
    """Raise ValueError for a name with a null character, which no file system accepts."""
    if "\0" in name:
        raise ValueError("it holds a character that cannot be written")
    return name


Name = Annotated[
    str, StringConstraints(min_length=1, strip_whitespace=True), AfterValidator(_written)
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=0)]
Times = Annotated[int, Field(ge=2)]


def _ascending(given: Any) -> Any:
    """Check a list of layers from YAML or JSON and sort it."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"each value is a list of layers, such as [3, 17], not {short(given)}")
    if len(given) > MAX_LAYERS:
        raise ValueError(f"no model has {len(given):,} layers")
    if len(set(map(str, given))) < len(given):
        raise ValueError("a layer stands twice in it")
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in given)
    return tuple(sorted(given)) if whole else tuple(given)


def several(given: Any) -> Any:
    """Return one name or a list of names, also in W&B's notation, as a tuple."""
    if isinstance(given, str) and given.startswith("["):
        with suppress(ValueError):
            given = json.loads(given.replace("'", '"'))
    given = [given] if isinstance(given, str) else given
    return tuple(given) if isinstance(given, list) else given


def _one_benchmark(name: str) -> str:
    """Raise ValueError if a name lists several benchmarks."""
    if SEVERAL.fullmatch(name):
        several = ", ".join(part.strip() for part in name.split(","))
        raise ValueError(f"these are several; give one, or values: [{several}]")
    return name


BenchmarkName = Annotated[Name, AfterValidator(_one_benchmark)]
QuestionText = Annotated[Name, AfterValidator(lambda text: str(question(text)))]
"""A question in its canonical text."""
Folders = Annotated[tuple[Name, ...], BeforeValidator(several)]
Layers = Annotated[tuple[Count, ...], BeforeValidator(_ascending)]
SEVERAL = re.compile(r"[\w-]+(\s*,\s*[\w-]+)+")
"""Several benchmarks separated by commas, as on lm-eval's command line."""


class Strict(BaseModel):
    """Settings from a user, which refuse unknown fields and values of another type.

    The docstring of a field is the help of its option.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


M = TypeVar("M", bound=BaseModel)


def checked(
    kind: type[M],
    settings: Mapping[str, Any],
    prefix: str,
    gathered: Mapping[str, str] | None = None,
) -> M:
    """Build a model from settings; raise RequestError with the `first_problem` if invalid."""
    try:
        return kind(**settings)
    except ValidationError as error:
        raise RequestError(first_problem(error, kind, prefix, gathered)) from None


def first_problem(
    error: ValidationError,
    model: type[BaseModel],
    prefix: str = "",
    gathered: Mapping[str, str] | None = None,
) -> str:
    """Return the first problem in one line, under the name that the file has.

    Where a field of the model is `gathered` from several values of the file, only their parameter
    has a name there: field → parameter.
    """
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = problem["loc"]
    if gathered is not None:
        location = tuple(gathered.get(str(part), part) for part in location[:1])
    path = prefix + ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        fields = _fields_at(model, problem["loc"][:-1])
        near = did_you_mean(key, fields)
        return f"unknown key '{path}'.{near} Known here: {', '.join(fields)}."
    if problem["type"] == "missing":
        return f"'{path}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return f"{prefix}{message}" if prefix == "--" else f"'{prefix.rstrip('.')}': {message}"
    given = problem["input"]
    got = "" if isinstance(given, dict | BaseModel) else short(given)
    shown = f" (got {got})" if got and got not in message else ""
    return f"'{path}': {message[:1].lower()}{message[1:300]}{shown}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """List the keys that a part of the file may have."""
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        kinds = getattr(annotation, "__args__", (annotation,))
        model = next(kind for kind in kinds if isinstance(kind, type))
    return list(model.model_fields)
