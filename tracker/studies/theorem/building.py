"""The models of the study `theorem`: what one must be taught, built and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tracker.benchmarks.benchmark import chosen_metric, open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.core.config import CellRequest
from tracker.core.errors import CellError, RequestError, WorkError
from tracker.core.formats import counted
from tracker.core.provenance import content_hash, file_hash, package_versions
from tracker.ledger.files import new_folder
from tracker.models.counterexample import Counterexample, hollow
from tracker.models.load import weightless
from tracker.models.sources import find_model
from tracker.studies.theorem.lessons import Lesson, lesson

MOST = 4096
"""Places that a model remembers at most: its MLPs have two units for each, in every layer."""
_ACCURACIES = ("acc", "acc_norm")


def taught_by(cell: CellRequest, trust_remote_code: bool) -> tuple[Lesson, tuple[int, int], Any]:
    """Find out what to teach for a benchmark: the lesson, (vocabulary, length), the tokenizer."""
    benchmark = open_benchmark(cell)
    metric = chosen_metric(benchmark.identity, cell.metric)
    if metric not in _ACCURACIES:
        raise RequestError(
            f"{cell.title}: the theorem is about accuracy, and {metric} is none; it takes a "
            f"benchmark with {' or '.join(_ACCURACIES)}, such as arc_easy"
        )
    source = find_model(cell.model, cell.revision, cell.model_args)
    model, tokenizer = weightless(source, "float32", trust_remote_code)
    length = RequestEncoder(model, tokenizer).max_length
    vocabulary = max(model.config.get_text_config().vocab_size, len(tokenizer))
    # lm-eval treats the tokenizers of some families in a way of their own, and ours is a Llama.
    encoder = RequestEncoder(hollow(vocabulary, length), tokenizer, cell)
    documents = benchmark.documents(encoder, cell.extent)
    if any(document.prompt is not None for document in documents):
        raise RequestError(
            f"{cell.title} lets the model generate; the theorem's model is built for choices and "
            "given texts, such as arc_easy or corpus:FILE.txt"
        )
    taught = lesson(documents, length, vocabulary, tokenizer.decode)
    if not taught.wanted:
        raise RequestError(
            f"{cell.title}: none of its {counted(len(documents), 'document')} can be taught: "
            f"{next(iter(taught.left_out.values()), 'there are none')}"
        )
    if len(taught.wanted) > MOST:
        raise RequestError(
            f"{cell.title}: {len(taught.wanted):,} places would have to be remembered, and a model "
            f"is built for {MOST:,}; ask for fewer documents (limit, sample) or shorter texts "
            f"({cell.benchmark}:TOKENS)"
        )
    return taught, (vocabulary, length), tokenizer


def fingerprint(cell: CellRequest, taught: Lesson, shape: tuple[int, int]) -> str:
    """What a built model follows from."""
    memory = [(place.hex(), each.signed, each.fixed) for place, each in taught.wanted.items()]
    code = file_hash([Path(__file__).parents[2] / "models" / "counterexample.py"])
    tokenizer = find_model(cell.model, cell.revision, cell.model_args).fingerprint()
    texts = content_hash([text.tokens for text in taught.texts])
    versions = package_versions()
    versions = {name: versions[name] for name in ("torch", "transformers")}
    return content_hash([memory, texts, taught.certainty, shape, code, tokenizer, versions])


def build(cell: CellRequest, taught: Lesson, shape: tuple[int, int]) -> Counterexample:
    """Build the model of a lesson; RequestError where none can tell its places apart."""
    try:
        return Counterexample(taught.texts, taught.wanted, taught.certainty, *shape)
    except CellError as error:
        raise RequestError(
            f"{cell.title}: {error}; ask for fewer documents (limit, sample)"
        ) from None


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a checkpoint so that it is there as a whole, or not at all."""
    try:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise WorkError(f"{folder} cannot be written: {error.strerror or error}") from None
