"""Measure how fast models serve with plain transformers, as a separate program.

The program runs as `python -P serving_process.py REQUEST.json`, and does not import tracker. The
program builds the models from their configurations with random weights, because speed and memory do
not depend on the values of weights.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the time of several tasks with several models, and the memory.

    Args:
        request: The settings, including the models' folders (`folders`) and the tasks (`tasks`).

    Returns:
        A dict with the result of `time_by_turns` (`seconds`), the bytes of the key-value cache
        (`cache_bytes`), and the peak memory of this process in bytes (`peak_bytes`).
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    models = [build_model(folder, request) for folder in request["folders"]]
    _, cache = time_answer(models[0], 1, request["cached"], 0)
    if cache is None:  # such models cannot go on writing
        tasks = {name: task for name, task in request["tasks"].items() if not task[-1]}
        request = {**request, "tasks": tasks}
    memory = {"cache_bytes": cache_bytes(cache), "peak_bytes": peak_bytes(request["device"])}
    del cache
    # Without its cache, whose memory the next task needs.
    seconds = time_by_turns(models, request, lambda *task: time_answer(*task)[0])
    return {"seconds": seconds, **memory}


def time_by_turns(
    models: Sequence[Any], request: Mapping[str, Any], time_answer: Callable[..., float]
) -> dict[str, list[list[float]]]:
    """Measure the seconds of several tasks; in each turn, every model runs every task once.

    Args:
        models: The models.
        request: The settings, including the tasks and the minimum number of turns.
        time_answer: Function that runs a model on a task and returns the seconds.

    Returns:
        Name of each task → seconds `[models][turns]`.
    """
    seconds: dict[str, list[list[float]]] = {
        name: [[] for _ in models] for name in request["tasks"]
    }
    start = time.perf_counter()
    for turn in count(1):
        for name, task in request["tasks"].items():
            for model, durations in zip(models, seconds[name], strict=True):
                durations.append(time_answer(model, *task))
        elapsed = time.perf_counter() - start
        is_enough = turn > request["turns"] and elapsed > request["seconds"]
        if is_enough or elapsed > request["max_seconds"]:
            break
    if turn > 1:  # the first turn is slower
        seconds = {name: [row[1:] for row in rows] for name, rows in seconds.items()}
    return seconds


def build_model(folder: str, request: dict[str, Any]) -> PreTrainedModel:
    """Build a model with random weights from the configuration in a folder."""
    trust = request["trust_remote_code"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    dtype = getattr(torch, request["dtype"])
    with torch.device(request["device"]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    eval_model: PreTrainedModel = model.eval()
    return eval_model


@torch.inference_mode()
def time_answer(
    model: PreTrainedModel, batch: int, length: int, new_tokens: int
) -> tuple[float, Any]:
    """Measure the seconds to read a prompt, or the seconds to write new tokens.

    Args:
        model: The model.
        batch: Number of texts.
        length: Number of tokens in each prompt.
        new_tokens: Number of tokens to write after each prompt; 0 to measure reading the prompt.

    Returns:
        The seconds, and the key-value cache. The seconds for writing do not include reading the
        prompt.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), device=model.device)
    accepted = inspect.signature(model.forward).parameters
    settings: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    cache_name = "cache" if "cache" in accepted else "past_key_values"  # of older versions
    start, cache = time.perf_counter(), None
    for step in range(new_tokens + 1):
        output = model(input_ids=ids, use_cache=True, **settings, **{cache_name: cache})
        cache, ids = output.get(cache_name), output.logits[:, -1:].argmax(-1)
        ids.cpu()  # waits for the accelerator, as an application does that shows each token
        if step == 0 and new_tokens:
            start = time.perf_counter()
    return time.perf_counter() - start, cache


def cache_bytes(cache: Any) -> int | None:
    """Count the bytes of the cached keys and values; None if the cache has another form."""
    layers = getattr(cache, "layers", [])
    tensors = [t for layer in layers for t in vars(layer).values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors) or None


def peak_bytes(device: str) -> int | None:
    """Return this process's peak memory on a device, in bytes.

    The device is a CUDA device or `cpu`. The result is None if the peak is unknown.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if device != "cpu" or not status.is_file():
        return None
    # Unlike ru_maxrss, it does not begin at the peak of the process that started this one.
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(request["answer"]).write_text(json.dumps(main(request)), encoding="utf-8")
