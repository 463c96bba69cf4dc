"""Constraints of searches, what must stay of a model: as they are written, and for one model.

protect: {value: [0, 1, last]}
among: {value: {min: 8, max: 24}}
at_least: {value: {full_attention: 1 of 4}}
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from tracker.core.arguments import Arguments, decoded
from tracker.core.changes import MAX_LAYERS
from tracker.core.errors import ExperimentError, ModelError
from tracker.core.layer_kinds import layers_of_kind
from tracker.core.safe_yaml import short

CONSTRAINTS = ("protect", "among", "at_least")
"""Keys of a search that say what must stay."""
LAST = "last"
"""The last layer, whichever its number is."""
FORMS = "[0, 1, last], 3-7, {min: 8, max: 24}, odd, even, or {kind: sliding_attention}"
"""How layers are written."""
LEAST = "{full_attention: 2}, or {full_attention: 1 of 4}"
"""How it is written that so many stay."""

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?", re.ASCII)
_KIND = re.compile(r"[A-Za-z]\w*")
_SETTINGS: TypeAdapter[str] = TypeAdapter(Arguments)
_RATIO = re.compile(r"(\d+)(?: of (\d+))?", re.ASCII)


def _words(given: Any) -> tuple[int | str, ...]:
    """Read layers as YAML gives them, as W&B passes them on, or as they are typed."""
    text = given.strip() if isinstance(given, str) else ""
    if text[:1] in ("[", "(", "{"):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError):
                given = read(text)
                break
        else:  # as a list is typed without quotes
            given = text.strip("[]()")
    if isinstance(given, dict):
        given = _of_mapping(given)
    if isinstance(given, str):
        given = given.split(",")
    if not isinstance(given, list | tuple):
        given = [given]
    found = [one for each in given for one in _read(each)]
    if not found:
        raise ValueError(f"it names no layer; write {FORMS}")
    if len(set(found)) < len(found):
        raise ValueError("a layer stands twice in it")
    numbers = sorted(each for each in found if isinstance(each, int))
    return (*numbers, *sorted(each for each in found if isinstance(each, str)))


def _of_mapping(given: dict[Any, Any]) -> Any:
    if given.keys() == {"min", "max"}:
        return f"{given['min']}-{given['max']}"
    if given.keys() == {"kind"}:
        return given["kind"]
    raise ValueError(f"{short(given)} is no choice of layers; write {FORMS}")


def _read(given: Any) -> Iterator[int | str]:
    text = str(given).strip()
    numbers = _RANGE.fullmatch(text)
    if isinstance(given, bool) or not (numbers or _KIND.fullmatch(text)):
        raise ValueError(f"{short(given)} is no layer; write {FORMS}")
    if numbers is None:
        yield text
        return
    first, end = int(numbers[1]), int(numbers[2] or numbers[1])
    if end < first:
        raise ValueError(f"{text} ends before it begins; write {end}-{first}")
    if end >= MAX_LAYERS:
        raise ValueError(f"no model has a layer {end:,}")
    yield from range(first, end + 1)


def _ratios(given: Any) -> str:
    """Check that each kind has a number of layers that stay, or `N of M`, and write it alike."""
    try:
        read = decoded(_SETTINGS.validate_python(given))
    except ValidationError:
        raise ValueError(f"{short(given)} says of no kind how many stay; write {LEAST}") from None
    found = {kind: " ".join(str(said).split()) for kind, said in read.items()}
    for kind, said in found.items():
        ratio = _RATIO.fullmatch(said)
        if ratio is None or int(ratio[1]) < 1:
            raise ValueError(f"{kind}: {short(said)} is no number of layers; write {LEAST}")
        if ratio[2] and int(ratio[2]) < int(ratio[1]):
            raise ValueError(f"{kind}: of {ratio[2]} layers {ratio[1]} cannot stay; write {LEAST}")
    if not found:
        raise ValueError(f"it names no kind; write {LEAST}")
    return json.dumps(found, sort_keys=True)


Chosen = Annotated[tuple[int | str, ...], BeforeValidator(_words)]
"""Layers: numbers, ascending, and then words: kinds, `odd`, `even`, `last`."""
Ratios = Annotated[str, BeforeValidator(_ratios)]
"""How many of which kinds stay, as canonical JSON."""


@dataclass(frozen=True)
class Least:
    """A constraint: a number of layers of a kind stay.

    Attributes:
        kind: The kind.
        layers: Those of it.
        count: How many stay: of all of them,
        of: or of those among any so many consecutive layers of the intact model.
    """

    kind: str
    layers: tuple[int, ...]
    count: int
    of: int | None

    def __str__(self) -> str:
        """Write the number as a file has it."""
        return f"{self.count}" if self.of is None else f"{self.count} of {self.of}"

    def groups(self, total: int) -> Iterator[tuple[int, ...]]:
        """Yield the sets of layers of each of which `count` stay, of `total` layers."""
        width = total if self.of is None else self.of
        for first in range(total - width + 1):
            yield tuple(layer for layer in self.layers if first <= layer < first + width)


@dataclass(frozen=True)
class Constraints:
    """Constraints of a search: what must stay of a model.

    Attributes:
        protected: Layers that stay.
        among: The only ones that may go; None for all.
        least: Of which kinds so many stay.
    """

    protected: tuple[int, ...] = ()
    among: tuple[int, ...] | None = None
    least: tuple[Least, ...] = ()

    @property
    def names(self) -> str:
        """The keys of the constraints, as messages name them."""
        said = {"protect": self.protected, "among": self.among, "at_least": self.least}
        return " and ".join(f"'{key}'" for key, value in said.items() if value)

    def fixed(self, total: int) -> frozenset[int]:
        """Return the layers that stay whatever else goes, of `total` layers."""
        among = range(total) if self.among is None else self.among
        return frozenset(range(total)) - (frozenset(among) - frozenset(self.protected))


FREE = Constraints()
"""Everything may go."""


def constraints_of(
    protect: Sequence[int | str],
    among: Sequence[int | str],
    at_least: str | None,
    total: int,
    config: Callable[[], Any],
) -> Constraints:
    """Find the layers that are meant by what was written.

    Args:
        protect: As `Chosen`; empty for nothing said.
        among: Likewise.
        at_least: As `Ratios`; None for nothing said.
        total: How many layers the model has.
        config: Reads its text configuration, which names kinds of layers.

    Returns:
        What must stay.

    Raises:
        ExperimentError: A layer or a kind is not there, the intact model itself is not so, or
            nothing could go.
    """
    protected = _layers("protect", protect, total, config)
    only = _layers("among", among, total, config) if among else None
    least = tuple(_least(kind, said, total, config) for kind, said in decoded(at_least).items())
    if not set(range(total) if only is None else only) - set(protected):
        held = f"all {total} layers" if only is None else "every layer of 'among'"
        raise ExperimentError(
            f"'protect' holds {held}, so that nothing can go; protect fewer layers"
        )
    return Constraints(protected, only, least)


def _layers(
    key: str, words: Sequence[int | str], total: int, config: Callable[[], Any]
) -> tuple[int, ...]:
    """Find the layers that some words name."""
    kinds = [word for word in words if isinstance(word, str) and word != LAST]
    numbers = {word for word in words if isinstance(word, int)}
    if numbers and max(numbers) >= total:
        raise ExperimentError(
            f"'{key}': there is no layer {max(numbers)}; the model has layers 0 to {total - 1}"
        )
    last = {total - 1} if LAST in words else set()
    return tuple(sorted({*numbers, *last, *_of_kinds(key, kinds, config)}))


def _of_kinds(key: str, kinds: Sequence[str], config: Callable[[], Any]) -> tuple[int, ...]:
    try:
        return layers_of_kind(config(), kinds) if kinds else ()
    except ModelError as error:
        raise ExperimentError(f"'{key}': {error}") from None


def _least(kind: str, said: str, total: int, config: Callable[[], Any]) -> Least:
    """Find what `N`, or `N of M`, means; ExperimentError where the intact model is not so."""
    layers = _of_kinds("at_least", [kind], config)
    count, _, width = said.partition(" of ")
    found = Least(kind, layers, int(count), int(width) if width else None)
    head = f"'at_least': {kind}: {said}"
    if found.of is not None and found.of > total:
        raise ExperimentError(f"{head}: the model has {total} layers; write {count} of {total}")
    for first, group in enumerate(found.groups(total)):
        if len(group) < found.count:
            among = f" among layers {first} to {first + found.of - 1}" if found.of else ""
            raise ExperimentError(
                f"{head}: the intact model has {len(group)} of that kind{among}; ask for no "
                "more than it has"
            )
    return found


def in_words(layers: Sequence[int | str]) -> list[str]:
    """Write layers, three and more in a row as `8 to 24`."""
    runs: list[list[int | str]] = []
    for layer in layers:
        if runs and isinstance(layer, int) and layer - 1 == runs[-1][-1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [
        word
        for run in runs
        for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))
    ]
