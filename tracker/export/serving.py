"""Measure speed and memory of a saved model and of its base model, in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tracker.schema.errors import WorkError
from tracker.stats.arrays import Array

Spread = tuple[float, float, float]
"""Median, and the lower and the upper quartile, of repeated measurements."""
NEW_TOKENS = 32
"""Number of tokens that each timed generation writes."""
CACHED_TOKENS = 1000
READ_LENGTHS, WRITE_BATCHES = (128, 1024), (1, 8)
"""Numbers of tokens per prompt, and of texts that are written at once."""
PROMPT_TOKENS = 32
"""Number of tokens of the prompts before generated tokens."""
MIN_TURNS, MIN_SECONDS, MAX_SECONDS = 5, 10.0, 60.0
"""Minimum number of measurements of each figure, and of seconds for all of them. After the maximum
number of seconds, no further measurement begins."""
MAX_QUARTILE_RATIO = 1.15
"""Maximum ratio of the upper to the lower quartile of a speed ratio. If it is exceeded, other work
on the machine affected the two models unequally."""
MIN_RATIO_TURNS = 3
_MAX_ERROR_CHARACTERS = 600
_TRANSFORMERS_PROGRAM = (str(Path(__file__).with_name("serving_process.py")),)
LLAMA_CPP_PROGRAM = ("-m", "tracker.export.llama_cpp")


@dataclass(frozen=True)
class ServingFigure:
    """One figure of speed or memory, for the base model and for the saved model.

    Attributes:
        name: The figure's name in tracking backends, such as `decode_1`.
        title: The figure in words, with its unit.
        base: Median and quartiles of the base model's values. A number of bytes has no spread, so
            the three numbers are equal.
        model: Median and quartiles of the saved model's values.
        ratio: The saved model's speed as a multiple of the base model's speed. The ratio is None
            for a number of bytes, or if other work on the machine disturbed the timing.
    """

    name: str
    title: str
    base: Spread
    model: Spread
    ratio: Spread | None = None

    @property
    def text(self) -> str:
        """The figure in one line: both medians with their quartiles, and the ratio."""
        if self.base[1] == self.base[2]:
            return f"{self.title}: {self.model[0]:,.0f} (base model {self.base[0]:,.0f})"
        base, model = (_spread_text(values) for values in (self.base, self.model))
        speeds = f"{self.title}: {model}, base model {base}"
        if self.name.startswith("first_token"):
            return speeds
        if self.ratio is None:
            return f"{speeds}; other work on the machine disturbed the comparison of the speeds"
        ratio = "the saved model is {:.2f} times as fast as the base model ({:.2f} to {:.2f})"
        return f"{speeds}; {ratio.format(*self.ratio)}"


def measure_serving(
    base: Path,
    saved: Path,
    device: str,
    dtype: str,
    threads: int,
    trust_remote_code: bool,
    max_length: int | None = None,
) -> list[ServingFigure]:
    """Measure speed and memory of a saved model and its base model with plain transformers.

    Speed is the number of tokens per second, for reading a prompt and for writing a text.

    Args:
        base: A folder with the base model's configuration.
        saved: The folder of the saved model.
        device: The device, e.g. `cpu`.
        dtype: The dtype of the weights, e.g. `bfloat16`.
        threads: The number of CPU threads.
        trust_remote_code: Whether code in the folders may run.
        max_length: The maximum number of tokens that both models read; None if unlimited.

    Returns:
        The figures of speed, then the figures of memory.

    Raises:
        WorkError: The models cannot be built or timed in a fresh process.
    """
    tasks = _timed_tasks(max_length)
    n_cached = min(CACHED_TOKENS, max_length or CACHED_TOKENS)
    request: dict[str, Any] = {
        "tasks": {},
        "turns": 0,
        "seconds": 0,
        "max_seconds": MAX_SECONDS,
        "cached": n_cached,
        **{"device": device, "dtype": dtype, "threads": threads},
        "trust_remote_code": trust_remote_code,
    }
    timing = request | {"tasks": tasks, "turns": MIN_TURNS, "seconds": MIN_SECONDS}
    seconds = run_program({**timing, "folders": [str(base), str(saved)]})["seconds"]
    figures = [_speed_figure(name, tasks[name], seconds[name]) for name in seconds]
    for name in (name for name in seconds if not tasks[name][-1]):
        waits = (spread(1000 * np.array(row)) for row in seconds[name])
        title = f"milliseconds to the first token, prompt of {tasks[name][1]:,} tokens"
        figures.append(ServingFigure(f"first_token_{tasks[name][1]}", title, *waits))
    # A process's peak is that of one model, so each has its own process.
    memory = [run_program({**request, "folders": [str(folder)]}) for folder in (base, saved)]
    for name, title in _MEMORY_TITLES.items():
        values = [answer[name] for answer in memory]
        if None not in values:
            text = title.format(n_cached)
            figures.append(ServingFigure(name, text, *((float(v),) * 3 for v in values)))
    return figures


def measure_llama_cpp(base: Path, saved: Path, threads: int) -> list[ServingFigure]:
    """Measure the speed of llama.cpp with a saved GGUF file and with the base model's file.

    Speed is the number of tokens per second, for reading a prompt and for writing a text.

    Args:
        base: The base model's GGUF file.
        saved: The saved GGUF file.
        threads: The number of CPU threads.

    Returns:
        The figures of speed.
    """
    tasks = {name: task for name, task in _timed_tasks().items() if task[0] == 1}
    request = {"function": "time_files", "files": [str(base), str(saved)], "threads": threads}
    request |= {"tasks": tasks, "turns": MIN_TURNS, "seconds": MIN_SECONDS}
    request["max_seconds"] = MAX_SECONDS
    seconds = run_program(request, LLAMA_CPP_PROGRAM)["seconds"]
    return [_speed_figure(f"llama_cpp_{name}", tasks[name], seconds[name]) for name in tasks]


def _timed_tasks(max_length: int | None = None) -> dict[str, tuple[int, int, int]]:
    """Return the timed tasks: name → (texts, tokens in each prompt, new tokens per text)."""
    lengths = dict.fromkeys(min(length, max_length or length) for length in READ_LENGTHS)
    tasks = {f"prefill_{length}": (1, length, 0) for length in lengths}
    writing = {f"decode_{batch}": (batch, PROMPT_TOKENS, NEW_TOKENS) for batch in WRITE_BATCHES}
    return tasks | writing


_MEMORY_TITLES = {
    "cache_bytes": "bytes of the key-value cache for {:,} tokens",
    "peak_bytes": "peak memory in bytes of a process that reads {:,} tokens",
}


def _spread_text(values: Spread) -> str:
    """Format a median and its quartiles, such as `12.7 (12.5 to 13)`."""
    median, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values)
    return f"{median} ({low} to {high})"


def _speed_figure(
    name: str, task: tuple[int, int, int], seconds: Sequence[Sequence[float]]
) -> ServingFigure:
    """Compute the tokens per second of the base model and the saved model.

    Args:
        name: The figure's name in tracking backends.
        task: Number of texts, tokens in each prompt, and new tokens per text.
        seconds: Seconds of each turn: a list for the base model, and a list for the saved model.

    Returns:
        The figure.
    """
    batch, length, new_tokens = task
    title = f"tokens read per second, prompt of {length:,} tokens"
    if new_tokens:
        title = f"tokens written per second, batch {batch}"
    base, model = (batch * (new_tokens or length) / np.array(row) for row in seconds)
    return ServingFigure(name, title, spread(base), spread(model), median_speedup(*seconds))


def spread(values: Array) -> Spread:
    """Return the median and the quartiles of repeated measurements."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return median, low, high


def median_speedup(base_seconds: Sequence[float], seconds: Sequence[float]) -> Spread | None:
    """Compute the speed ratio of two models from alternating timings.

    The two models are timed in turn, so that other work on the machine affects both equally.

    Args:
        base_seconds: The seconds of the base model in each turn.
        seconds: The seconds of the other model in each turn.

    Returns:
        The median and the quartiles of the speed ratio. None if the quartiles differ too much
        (`MAX_QUARTILE_RATIO`), or for fewer than `MIN_RATIO_TURNS` turns.
    """
    ratio = spread(np.divide(base_seconds, seconds))
    is_steady = ratio[2] <= MAX_QUARTILE_RATIO * ratio[1]
    return ratio if is_steady and len(seconds) >= MIN_RATIO_TURNS else None


def run_program(
    request: Mapping[str, Any],
    program: Sequence[str] = _TRANSFORMERS_PROGRAM,
    problem: str = "a program that ran in a new process failed",
) -> Any:
    """Run a Python program in a fresh process, and return its answer.

    Args:
        request: The request, which the program reads from a JSON file.
        program: Command-line arguments of Python that name the program. By default, this is the
            program that times plain transformers.
        problem: Beginning of the error message if the program fails.

    Returns:
        The answer, which the program writes to a JSON file.

    Raises:
        WorkError: The program fails; the message contains its last line of output.
    """
    with TemporaryDirectory() as name:
        file, answer = Path(name) / "request.json", Path(name) / "answer.json"
        file.write_text(json.dumps({**request, "answer": str(answer)}), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, "-P", *program, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if process.returncode:
            error = (process.stdout.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            if process.returncode < 0:
                number = -process.returncode
                error = f"signal {number} ended the process, perhaps because the memory was full"
            raise WorkError(f"{problem}: {error[:_MAX_ERROR_CHARACTERS]}")
        return json.loads(answer.read_text(encoding="utf-8"))
