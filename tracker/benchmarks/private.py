"""Import and patch what is private in lm-eval, in one module.

`docs/dev/private-apis.md` lists what breaks when one changes; `tests/benchmarks/test_private.py`
checks them in every version that `pyproject.toml` allows. Its main branch chooses few-shot examples
in another way since 0.4.13, which is why there is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from lm_eval.api import task as _task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.utils import env

__all__ = ["HFLM", "Entry", "Kind", "TaskFactory", "TaskIndex", "without_bars"]

# lm-eval compiles templates anew for every judgement: two for each document and ablation of
# arc_easy, 0.9 ms each on one core of an EPYC.
env.from_string = lru_cache(maxsize=1024)(env.from_string)


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable lm-eval's progress bars, one line for each task of a group, while it builds requests.

    The only other switch is an environment variable, which also disables the bars of downloads.
    """
    bar = _task.tqdm
    _task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        _task.tqdm = bar
