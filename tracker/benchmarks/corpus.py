"""Read plain text as a benchmark: accuracy and loss of predicting each next token.

The name of a corpus benchmark is `corpus:` and a location. The location is a .txt file (blank lines
separate documents), a .jsonl file (one document a line) or a data set of the hub. The configuration
of a data set follows its name: `corpus:allenai/c4/en`. A location can end with the following
suffixes, in this order: `@SPLIT`, `:TOKENS` (maximum number of tokens per text) and `#COLUMN`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.benchmarks.parts import part_setting, requested_half
from tracker.benchmarks.sources import open_data_source
from tracker.schema.config import CORPUS_PREFIX, BenchmarkSpec, CellRequest
from tracker.schema.documents import Document, DocumentText, Response
from tracker.schema.errors import BenchmarkError, did_you_mean
from tracker.schema.extent import Clusters, Extent
from tracker.schema.hub import check_name
from tracker.schema.identities import BenchmarkIdentity, TaskIdentity
from tracker.schema.provenance import content_hash, file_stamp
from tracker.schema.safe_yaml import short_text
from tracker.schema.text import replace_controls
from tracker.stats.accuracy import RATIO

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder

_SUFFIXES = (".txt", ".jsonl")
_TEXT_COLUMNS = (
    (("text",), ("text",)),
    (("content",), ("content",)),
    # Columns of CodeAlpaca; MathInstruct has no `input`.
    (("instruction", "input", "output"), ("instruction", "output")),
    # Column of LIMA, a list of turns. In copies, each turn is `{from, value}` or `{role, content}`.
    (("conversations",), ("conversations",)),
)
"""Groups of columns whose values are joined to a text; the first group that exists is read."""


@dataclass(frozen=True)
class _CorpusLocation:
    """Parsed name of a corpus.

    Attributes:
        name: Name of the corpus as the user typed it, without suffixes.
        file: Path of the corpus file; None for a data set.
        split: Split of the data set; None = `test`, or `train` if the data set has no `test`.
        max_tokens: Maximum number of tokens to read from the start of each text; None = all tokens.
        column: Name of the only column to read; None = all columns that are known to contain text.
    """

    name: str
    file: Path | None
    split: str | None
    max_tokens: int | None
    column: str | None

    @property
    def label(self) -> str:
        """Name of the benchmark, without the folder of the corpus file."""
        label = f"{CORPUS_PREFIX}{self.file.name if self.file else self.name}"
        parts = (("@", self.split), (":", self.max_tokens), ("#", self.column))
        return replace_controls(label + "".join(f"{sign}{part}" for sign, part in parts if part))

    @property
    def data_set(self) -> tuple[str, str | None]:
        """The name of the data set on the hub, and the name of its configuration.

        The second name is None if the benchmark's name contains no configuration.
        """
        organisation, _, path = self.name.partition("/")
        name, _, configuration = path.partition("/")
        return "/".join(filter(None, (organisation, name))), configuration or None


def locate_corpus(spec: BenchmarkSpec) -> _CorpusLocation:
    """Parse the name of a corpus benchmark, without reading the corpus.

    Raises BenchmarkError if the name or a suffix is invalid, or if there is no such file.
    """
    name, _, column = spec.benchmark.removeprefix(CORPUS_PREFIX).partition("#")
    max_tokens = None
    if match := re.fullmatch(r"(.*):(\d+)", name, re.DOTALL):
        name, max_tokens = match[1], int(match[2])
    split = ""
    if Path(name).suffix not in _SUFFIXES:  # a file's folder may hold an @
        name, _, split = name.partition("@")
    if not name:
        raise BenchmarkError(
            f"{spec.benchmark!r} does not name a corpus; write corpus:FILE.txt, corpus:FILE.jsonl "
            "or corpus:NAME with the name of a data set"
        )
    if max_tokens == 0:
        raise BenchmarkError(
            f"{spec.benchmark!r} sets the maximum number of tokens to 0; write at least 1"
        )
    for setting, reason in (
        ("num_fewshot", "plain text has no few-shot examples"),
        ("apply_chat_template", "tracker reads plain text without a chat template"),
    ):
        if value := getattr(spec, setting):
            raise BenchmarkError(f"{spec.benchmark}: {reason}; leave {setting} out (got {value})")
    try:
        path = Path(name).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a long name, no home, a null byte
        raise BenchmarkError(
            f"there is no corpus file {short_text(name)}: {short_text(error)}"
        ) from None
    if path.suffix in _SUFFIXES:
        if not is_file:
            names = [p.name for p in path.parent.glob("*") if p.suffix in _SUFFIXES]
            raise BenchmarkError(f"there is no corpus file {name}.{did_you_mean(path.name, names)}")
        if split:
            raise BenchmarkError(f"{name} is a file and has no splits; leave @{split} out")
        if path.suffix == ".txt" and column:
            raise BenchmarkError(f"{name} is plain text and has no columns; leave #{column} out")
        return _CorpusLocation(name, path, None, max_tokens, column or None)
    if is_file:
        raise BenchmarkError(f"{name} cannot be read as a corpus; a corpus file is .txt or .jsonl")
    location = _CorpusLocation(name, None, split or None, max_tokens, column or None)
    data_set, configuration = location.data_set
    try:
        check_name(f"{data_set}/{configuration}" if "/" in (configuration or "") else data_set)
    except ValueError as name_error:
        raise BenchmarkError(
            f"{name!r} is neither a .txt or .jsonl file nor a data set on the hub; {name_error}. "
            "If the data set has several configurations, append /CONFIGURATION"
        ) from None
    return location


def corpus_stamp(spec: BenchmarkSpec) -> object:
    """Return a value that changes if the corpus changes; None for the hub."""
    file = locate_corpus(spec).file
    return open_data_source(spec.data).stamp() if file is None else file_stamp([file])


class Corpus:
    """A benchmark whose documents are the texts of a corpus.

    Each text is cut into lm-eval's rolling windows, so that every token is predicted exactly once.
    Raises BenchmarkError if the corpus cannot be found or read, or if it contains no text.
    """

    public = False
    """False, because the texts of a corpus may be private."""
    is_model_specific = False

    def __init__(self, request: CellRequest) -> None:
        spec, documents = request.benchmark, request.documents
        if key := spec.generation_key:
            raise BenchmarkError(f"{key}: a corpus is read, not generated; leave {key} out")
        location = locate_corpus(spec)
        split, texts = _read_texts(location, spec.data)
        self._texts = [text for text in texts if text.strip()]
        if not self._texts:
            raise BenchmarkError(f"{location.name} contains no text")
        self._name, self._max_tokens = location.label, location.max_tokens
        half = requested_half(documents, self._name, len(self._texts)) if documents.part else None
        task = TaskIdentity(
            name=self._name,
            version="1",
            split=split,
            documents=len(half.numbers(self._name)) if half else len(self._texts),
            half=half,
            fingerprint=content_hash(self._texts),
            metrics={"acc": RATIO, "loss": RATIO},
            higher_is_better={"acc": True, "loss": False},
        )
        self.identity = BenchmarkIdentity(
            name=self._name,
            tasks=(task,),
            # Record the path as typed, because the benchmark's name omits the folder.
            data=location.name if location.file else spec.data,
            num_fewshot=0,
            seed=documents.seed if half else None,
            apply_chat_template=False,
            primary_metric="acc",
            settings=part_setting(documents, [half]),
        )
        self._numbers = task.numbers

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Return one document for each text that `extent` selects.

        The requests of a document are the rolling windows of the document's text.
        """
        return [
            Document(
                task=self._name,
                index=index,
                requests=tuple(encoder.rolling_windows(self._texts[index], self._max_tokens)),
                gold=None,
                choices=0,
                rolling=True,
            )
            for index in sorted(extent.select(self._name, self._numbers))
        ]

    def rows_digest(self, task: str) -> str:
        """Return a hash of all texts of the corpus."""
        return content_hash(self._texts)

    def clusters(self, column: str) -> Clusters:
        """Raise BenchmarkError, because the texts of a corpus have no columns."""
        raise BenchmarkError(
            f"cluster: {column}: a corpus consists of texts without columns; leave cluster out"
        )

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, float | str | None]:
        """Compute the accuracy and the loss of predicting a document's tokens.

        `acc` is the pair [number of correctly predicted tokens, number of tokens]. `loss` is the
        pair [sum of the losses in nats, number of tokens]. `acc` and `loss` are JSON text, or None
        if a log-likelihood is not finite.
        """
        loss = -math.fsum(response.loglikelihood for response in responses)
        if not math.isfinite(loss):
            return {"acc": None, "loss": None}
        tokens = sum(len(request.continuation) for request in document.requests)
        hits = sum(response.hits for response in responses)
        return {"acc": json.dumps([hits, tokens]), "loss": json.dumps([loss, tokens])}

    def text(self, document: Document) -> DocumentText:
        """Return the text of a document of the corpus."""
        return DocumentText(self._texts[document.index])


def _read_texts(location: _CorpusLocation, data_name: str) -> tuple[str, Iterable[str]]:
    """Read the texts of a corpus; return the name of the split and the texts."""
    if location.file is None:
        splits = open_data_source(data_name).load(*location.data_set, location.split)
        split = location.split or next((name for name in ("test", "train") if name in splits), None)
        if split is None:
            raise BenchmarkError(
                f"{location.name} has neither a split 'test' nor 'train'; write "
                f"corpus:{location.name}@SPLIT with one of: {', '.join(splits)}"
            )
        rows = splits[split]
        return split, _join_columns(location, rows.column_names, rows)
    if location.file.suffix == ".txt":
        # utf-8-sig also reads text that begins with a byte-order mark.
        return "all", re.split(r"\n(?:[^\S\n]*\n)+", _read_file(location.file))
    rows = list(_read_json_lines(location.file))
    columns = dict.fromkeys(name for row in rows for name in row)
    return "all", _join_columns(location, list(columns), rows)


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{file} cannot be read as UTF-8 text: {error}") from None


def _read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_file(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BenchmarkError(f"{file}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise BenchmarkError(
                f"{file}, line {number}: expected a JSON object whose keys are column names"
            )
        yield row


def _join_columns(
    location: _CorpusLocation, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a text for each row, joined from the columns that contain text."""
    text_columns = _choose_columns(location, columns) if columns else ()
    for number, row in enumerate(rows, 1):
        parts = []
        for column in text_columns:
            value = row.get(column) or []
            if isinstance(value, list):  # turns of a conversation
                texts = [
                    t.get("value", t.get("content")) if isinstance(t, dict) else t for t in value
                ]
            else:
                texts = [value]
            if not all(isinstance(text, str) for text in texts):
                raise BenchmarkError(
                    f"{location.name}, document {number}: the column {column!r} does not contain "
                    "text"
                )
            parts += texts
        yield "\n".join(filter(None, parts))


def _choose_columns(location: _CorpusLocation, columns: Sequence[str]) -> tuple[str, ...]:
    """Choose the columns of a data set that contain the texts of a corpus."""
    name, column = location.name, location.column
    if column and column in columns:
        return (column,)
    if column:
        hint = did_you_mean(column, columns)
        raise BenchmarkError(
            f"{name} has no column {column!r}.{hint} It has: {', '.join(columns)}."
        )
    for names, required_names in _TEXT_COLUMNS:
        if set(required_names) <= set(columns):
            return tuple(column for column in names if column in columns)
    raise BenchmarkError(
        f"{name} has no text column (text, content, conversations, instruction and output); it "
        f"has: {', '.join(columns)}. Name the column to read: corpus:{name}#{columns[0]}"
    )
