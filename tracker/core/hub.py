"""Check that the Hugging Face hub answers, and explain its errors.

The hub's client retries for minutes without internet. So each process tests the hub once, with a
short timeout. If it does not answer, everything works from local files.
"""

from __future__ import annotations

import os
import sys
from functools import cache, partial
from typing import Any

from tracker.core.errors import attempt

SECONDS = 5
"""Timeout of a request to the hub."""
_TOKEN = "set HF_TOKEN to a token of yours"
FORM = "a hub id is NAME or OWNER/NAME of letters, digits, '-', '_' and '.', like gpt2 or org/model"


def check_name(name: str) -> None:
    """Raise ValueError for a name that no repository on the hub can have."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(name, "config.json")  # checks the name without a request
    except HFValidationError:
        raise ValueError(FORM) from None


def unreachable() -> str:
    """Return the reason why the hub does not answer; empty if it does.

    Without an answer, the libraries are set to work offline from now on.
    """
    if not _given_up:
        _look()
    return _given_up[0] if _given_up else ""


def ask(name: str, file: str, revision: str | None = None, kind: str = "model") -> None:
    """Request a file's metadata from the hub once, without the client's retries.

    After a temporary error, the hub is not used any more and local files are used instead. Raises
    the client's exception if the repository does not exist or is not public.

    `kind` is `model` or `dataset`; `file` need not exist.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    url = hf_hub_url(name, file, revision=revision, repo_type=kind)
    try:
        get_hf_file_metadata(url, timeout=SECONDS)
    except EntryNotFoundError:
        return
    except Exception as error:  # of httpx or httpx2, by huggingface_hub's version
        if not _busy(error):
            raise
        _give_up(refusal(name, error))


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables that set huggingface_hub offline, in its order."""


@cache
def _look() -> None:
    """Test the hub's address once, and stop using the hub if it does not answer."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        name = next((n for n in _OFFLINE if n in os.environ), _OFFLINE[0])
        _give_up(f"{name} is set in the environment of this command; unset {name} to ask the hub")
        return
    # The library's own address, or the mirror of HF_ENDPOINT; any status is an answer.
    answer = attempt(partial(get_session().head, constants.ENDPOINT, timeout=SECONDS))
    if isinstance(answer, Exception):  # of httpx or httpx2, by huggingface_hub's version
        _give_up(f"{constants.ENDPOINT} does not answer: {answer}")


_given_up: list[str] = []
"""Reasons why this process does not use the hub any more."""


def _give_up(why: str) -> None:
    _given_up.append(why)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is not imported yet, and other processes
    for module, names in (
        ("huggingface_hub.constants", ("HF_HUB_OFFLINE",)),
        ("datasets.config", ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")),
    ):
        if module in sys.modules:
            for name in names:
                setattr(sys.modules[module], name, True)


def _busy(error: BaseException) -> bool:
    """Check whether an error is temporary: a rate limit, a server error or a timeout."""
    from huggingface_hub.errors import HfHubHTTPError

    answers = [c.response.status_code for c in _causes(error) if isinstance(c, HfHubHTTPError)]
    late = any("Timeout" in type(cause).__name__ for cause in _causes(error))
    return late or any(status == 429 or status >= 500 for status in answers)


def refusal(name: str, error: BaseException, page: str = "") -> str:
    """Explain an error of the hub and what to do; empty if the hub did not cause it.

    `page` is the repository's path on the hub; for a model it is the name.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    causes, page = list(_causes(error)), f"{constants.ENDPOINT}/{page or name}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated: ask for access at {page}, then {_TOKEN}"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name} has no such revision"
    answers = [c.response.status_code for c in causes if isinstance(c, HfHubHTTPError)]
    if not answers:
        return f"{constants.ENDPOINT} does not answer in time" if _busy(error) else ""
    said = {
        401: f"the hub has no public {name}; if it is private, {_TOKEN}",
        403: f"the hub forbids {name} to you; ask for access at {page}, then {_TOKEN}",
        404: f"the hub has no {name}",
        429: f"the hub limits how often it is asked; wait some minutes, or {_TOKEN}",
    }
    return said.get(answers[0], f"the hub answers with status {answers[0]}; try again later")


def _causes(error: BaseException | None) -> Any:
    """Yield an error and the chain of its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
