"""Settings of a search: keys of a file, and options of `tracker prune`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict

from tracker.core.config import IN_THE_FILE, KEYS, Name, Strict, several
from tracker.core.extent import Positive
from tracker.core.kinds import SearchUnit
from tracker.core.prune_records import Rescoring
from tracker.search.budgets import amount
from tracker.search.constraints import Chosen, Ratios


def _several(given: Any) -> Any:
    """Take one name, or a list of names, also as W&B writes one, or as lm-eval's `--tasks`."""
    if isinstance(given, str) and not given.startswith("["):
        return tuple(name.strip() for name in given.split(","))
    return several(given)


Written = Annotated[str, BeforeValidator(lambda given: amount(given).text)]


class SearchSettings(Strict):
    """Settings of a search, beside those of its benchmarks, which are a `CellRequest`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    strategy: Name
    """How to choose, e.g. accuracy, cosine_oneshot, last, random."""
    remove: Written | None = None
    """What goes at least: 8, 25 %, 25 % parameters, 70 MB, 5 ms, …."""
    keep: Written | None = None
    """What stays at most: 22, 100M parameters, 200 MB, …."""
    unit: SearchUnit = "layer"
    """What goes."""
    protect: Chosen = ()
    """Layers that stay: 0,1,last or 3-7 or odd, even, or a kind such as full_attention."""
    among: Chosen = ()
    """The only layers that may go, written alike; default: all."""
    at_least: Ratios | None = None
    """How many of a kind stay, of all or of any so many layers in a row: full_attention=2,
    'full_attention=1 of 4'."""
    calibrate: Annotated[tuple[Name, ...], BeforeValidator(_several)] = ()
    """Benchmarks that choose, comma-separated; default: the benchmark itself."""
    sample: Positive | None = None
    """Calibration documents of each task; default: all."""
    test_sample: Positive | None = None
    """Test documents of each task; default: all."""
    rescoring: Rescoring = "full"
    """How greedy searches score candidates after each removal: all of them (full), only those that
    can still win (lazy), or on no more documents than it takes (race)."""
    draws: Positive = 3
    """How often random strategies draw."""


OF_CELLS = tuple(
    key
    for key in KEYS
    if key not in IN_THE_FILE.values()
    and key not in ("removed", "part", "limit", "sample", "until")
)
"""What is said of the benchmarks of a search, which removes and draws documents itself."""
