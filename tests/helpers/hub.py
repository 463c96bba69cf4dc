"""A stand-in for the Hugging Face hub on loopback, which answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.answering import Answering, serving

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}


class Hub:
    """A double of the hub, with its answers and the recorded requests.

    Attributes:
        status: Of every answer but to the hub's own address, which tells that it is there.
        headers: Of the same answers.
        body: Of the same answers.
        silent: Whether it takes connections and never answers.
        asked: Method and path of each request.
    """

    def __init__(self) -> None:
        self.address = ""
        self.ended = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Remove all content, and forget the recorded requests."""
        self.status, self.body, self.silent = 404, b"", False
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that should ask it."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


@contextmanager
def hub() -> Iterator[Hub]:
    """Run one."""
    state = Hub()

    class Handler(Answering):
        def handle_any(self) -> None:
            state.asked.append(f"{self.command} {self.path}")
            if state.silent:
                state.ended.wait(120)
                return
            about: dict[str, Any] = {"ETag": '"0123"', "X-Repo-Commit": "f" * 40}
            if self.path == "/":
                self.answer(b"", **about)
            else:
                self.answer(state.body, state.status, **about, **state.headers)

        do_GET = do_HEAD = do_POST = handle_any  # noqa: N815  the names that http.server calls

    with serving(Handler) as state.address:
        yield state
        state.ended.set()
