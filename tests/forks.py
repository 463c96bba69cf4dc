"""Programs that begin at once: forks of one that has imported what they all need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

_PROGRAM = """
import gc, json, os, resource, sys
import torch, transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
import tracker.api, tracker.cli, tracker.benchmarks.tasks
gc.freeze()
for line in sys.stdin:
    asked = json.loads(line)
    if "ended" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["ended"], 0)[1]), flush=True)
    elif program := os.fork():
        print(program, flush=True)
    else:
        os.dup2(os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if asked["largest"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, [asked["largest"]] * 2)
        tracker.cli.main(asked["arguments"], prog_name="tracker")
"""


@dataclass
class Forked:
    """A command that was given, in a process of its own.

    Attributes:
        pid: Its number.
        said: Where what it says is written.
    """

    pid: int
    said: Path
    _forks: Forks

    def is_over(self) -> bool:
        """Whether it has ended."""
        return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self) -> tuple[str, int]:
        """Wait until it ends, some minutes at most; what it has said, and its exit code."""
        last = time.monotonic() + 300
        while not self.is_over():
            assert time.monotonic() < last, self.said.read_text()
            time.sleep(0.01)
        code = self._forks.ask(ended=self.pid)
        return self.said.read_text(), code


class Forks:
    """Gives commands, each in a process of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._names = folder, count()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", _PROGRAM]
        self.program = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def ask(self, **asked: object) -> int:
        """Ask the program that forks."""
        self.program.stdin.write(json.dumps(asked) + "\n")
        self.program.stdin.flush()
        return int(self.program.stdout.readline())

    def start(self, *arguments: object, largest: int | None = None) -> Forked:
        """Give a command; no file that it writes may be larger than so many bytes."""
        said = self._folder / f"said{next(self._names)}"
        words = [*map(str, arguments)]
        number = self.ask(arguments=words, said=str(said), largest=largest)
        return Forked(number, said, self)


@contextmanager
def forks(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Forks]:
    """Whatever still runs in the end is ended."""
    found = Forks(folder, {**os.environ, **(environment or {})})
    with found.program:
        try:
            yield found
        finally:
            for each in psutil.Process(found.program.pid).children():
                each.kill()
            found.program.stdin.close()
