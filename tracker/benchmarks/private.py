"""Import and patch private functions of lm-eval. No other module uses private functions of lm-eval.

`docs/dev/private-apis.md` lists the features that break if a private function changes.
`tests/benchmarks/test_private.py` checks these functions in every supported version of lm-eval.
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

__all__ = ["HFLM", "Entry", "Kind", "TaskFactory", "TaskIndex", "hide_progress_bars"]

# lm-eval compiles templates anew for every judgement. For arc_easy, these are two templates for
# each document and ablation, at 0.9 ms each on one core of an EPYC.
env.from_string = lru_cache(maxsize=1024)(env.from_string)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Disable the progress bars that lm-eval shows while it builds requests.

    Progress bars of downloads stay visible.
    """
    progress_bar = _task.tqdm
    _task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        _task.tqdm = progress_bar
