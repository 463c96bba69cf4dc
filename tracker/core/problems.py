"""What is wrong first with what somebody wrote, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tracker.core.errors import RequestError, did_you_mean
from tracker.core.safe_yaml import short

M = TypeVar("M", bound=BaseModel)


def checked(
    kind: type[M], said: Mapping[str, Any], prefix: str, gathered: Mapping[str, str] | None = None
) -> M:
    """Make a request of what was said; RequestError with the `first_problem` of what is wrong."""
    try:
        return kind(**said)
    except ValidationError as error:
        raise RequestError(first_problem(error, kind, prefix, gathered)) from None


def first_problem(
    error: ValidationError,
    model: type[BaseModel],
    prefix: str = "",
    gathered: Mapping[str, str] | None = None,
) -> str:
    """Say in one line what is wrong first, under the name that stands in the file.

    Where a field of the model is `gathered` from several values of the file, only their parameter
    has a name there: field → parameter.
    """
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = problem["loc"]
    if gathered is not None:
        location = tuple(gathered.get(str(part), part) for part in location[:1])
    place = prefix + ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _fields_at(model, problem["loc"][:-1])
        near = did_you_mean(key, known)
        return f"unknown key '{place}'.{near} Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"'{place}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return f"{prefix}{message}" if prefix == "--" else f"'{prefix.rstrip('.')}': {message}"
    given = problem["input"]
    got = "" if isinstance(given, dict | BaseModel) else short(given)
    shown = f" (got {got})" if got and got not in message else ""
    return f"'{place}': {message[:1].lower()}{message[1:300]}{shown}"


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Name the known keys at a place in the file."""
    for part in place:
        annotation = model.model_fields[str(part)].annotation
        kinds = getattr(annotation, "__args__", (annotation,))
        model = next(kind for kind in kinds if isinstance(kind, type))
    return list(model.model_fields)
