"""A stand-in for the Hugging Face hub on loopback, which answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.answering import AnsweringHandler, serve

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}


class HubDouble:
    """A double of the hub, with its answers and the recorded requests.

    Attributes:
        status: Of every answer but to the hub's own address, which tells that it is there.
        headers: Of the same answers.
        body: Of the same answers.
        silent: Whether it takes connections and never answers.
        requests: Method and path of each request.
    """

    def __init__(self) -> None:
        self.address = ""
        self.is_ended = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Remove all content, and forget the recorded requests."""
        self.status, self.body, self.silent = 404, b"", False
        self.headers: dict[str, str] = {}
        self.requests: list[str] = []

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that should ask it."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


@contextmanager
def run_hub() -> Iterator[HubDouble]:
    """Run one."""
    state = HubDouble()

    class Handler(AnsweringHandler):
        def handle_any(self) -> None:
            state.requests.append(f"{self.command} {self.path}")
            if state.silent:
                state.is_ended.wait(120)
                return
            headers: dict[str, Any] = {"ETag": '"0123"', "X-Repo-Commit": "f" * 40}
            if self.path == "/":
                self.answer(b"", **headers)
            else:
                self.answer(state.body, state.status, **headers, **state.headers)

        do_GET = do_HEAD = do_POST = handle_any  # noqa: N815  the names that http.server calls

    with serve(Handler) as state.address:
        yield state
        state.is_ended.set()
