"""Check whether the Hugging Face hub answers, and explain errors of the hub.

Each process checks the hub only once, with a short timeout. If the hub does not answer, the process
uses only local files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache, partial

from tracker.schema.errors import attempt

HUB_TIMEOUT = 5
"""Timeout of a request to the hub, in seconds."""

_SET_HF_TOKEN = "set HF_TOKEN to your access token"
HUB_ID_FORM = "a hub id is NAME or OWNER/NAME of letters, digits, '-', '_' and '.', e.g. gpt2"


def check_name(name: str) -> None:
    """Raise ValueError if a name is not a valid repository name of the hub."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(name, "config.json")  # checks the name without a request
    except HFValidationError:
        raise ValueError(HUB_ID_FORM) from None


def unreachable_reason() -> str:
    """Return the reason why the hub cannot be reached; empty if the hub answers.

    If the hub does not answer, the Hugging Face libraries are set to offline mode.
    """
    if not _offline_reasons:
        _go_offline_if_unreachable()
    return _offline_reasons[0] if _offline_reasons else ""


def check_access(name: str, file: str, revision: str | None = None, kind: str = "model") -> None:
    """Raise an error if the hub does not give access to a repository.

    The function requests the metadata of `file`, which does not have to exist. `kind` is `model` or
    `dataset`. The exception of huggingface_hub is raised if the repository does not exist or is not
    public. After a temporary error, no exception is raised, but this process uses only local files
    from now on.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    url = hf_hub_url(name, file, revision=revision, repo_type=kind)
    try:
        get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
    except EntryNotFoundError:
        return
    except Exception as error:  # of httpx or httpx2, by huggingface_hub's version
        if not _is_temporary(error):
            raise
        _go_offline(explain_error(name, error))


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables that set huggingface_hub offline, in the order of their precedence."""


@cache
def _go_offline_if_unreachable() -> None:
    """Set the Hugging Face libraries offline if the hub does not answer."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        name = next((n for n in _OFFLINE if n in os.environ), _OFFLINE[0])
        _go_offline(f"{name} is set in the environment; unset {name} to use the hub")
        return
    # The library's own address, or the mirror of HF_ENDPOINT; any status is an answer.
    answer = attempt(partial(get_session().head, constants.ENDPOINT, timeout=HUB_TIMEOUT))
    if isinstance(answer, Exception):  # of httpx or httpx2, by huggingface_hub's version
        _go_offline(f"{constants.ENDPOINT} does not answer: {answer}")


_offline_reasons: list[str] = []
"""Reasons why this process no longer uses the hub."""


def _go_offline(reason: str) -> None:
    _offline_reasons.append(reason)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is not imported yet, and other processes
    for module, names in (
        ("huggingface_hub.constants", ("HF_HUB_OFFLINE",)),
        ("datasets.config", ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")),
    ):
        if module in sys.modules:
            for name in names:
                setattr(sys.modules[module], name, True)


def _is_temporary(error: BaseException) -> bool:
    """Return whether an error is temporary, such as a rate limit, server error or timeout."""
    from huggingface_hub.errors import HfHubHTTPError

    statuses = [
        c.response.status_code for c in _error_chain(error) if isinstance(c, HfHubHTTPError)
    ]
    timed_out = any("Timeout" in type(cause).__name__ for cause in _error_chain(error))
    return timed_out or any(status == 429 or status >= 500 for status in statuses)


def explain_error(name: str, error: BaseException, page: str = "") -> str:
    """Return a message that explains an error of the hub and suggests a solution.

    The message is empty if the hub did not cause the error. `name` is the repository in the
    message. `page` is the path of the repository on the hub; the default is `name`.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    # The libraries wrap the hub's own error, sometimes twice.
    causes, page = list(_error_chain(error)), f"{constants.ENDPOINT}/{page or name}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated: ask for access at {page}, then {_SET_HF_TOKEN}"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name} has no such revision"
    statuses = [c.response.status_code for c in causes if isinstance(c, HfHubHTTPError)]
    if not statuses:
        return f"{constants.ENDPOINT} does not answer in time" if _is_temporary(error) else ""
    messages = {
        401: f"the hub has no public {name}; if it is private, {_SET_HF_TOKEN}",
        403: f"the hub denies you access to {name}; ask for access at {page}, then {_SET_HF_TOKEN}",
        404: f"the hub has no {name}",
        429: f"the hub limits the rate of requests; wait some minutes, or {_SET_HF_TOKEN}",
    }
    return messages.get(statuses[0], f"the hub answers with status {statuses[0]}; try again later")


def _error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause of this cause, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
