"""Read plain text as a benchmark: accuracy and loss of predicting each next token.

The name is `corpus:PLACE`. PLACE is a .txt file (blank lines separate documents), a .jsonl file
(one document a line) or a data set of the hub. A data set's configuration follows its name:
`corpus:allenai/c4/en`. Optional suffixes, in this order: `@SPLIT` of a data set, `:TOKENS` to read
only the first tokens of each text, and `#COLUMN`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.benchmarks.parts import half_of, said_part
from tracker.benchmarks.sources import find_data
from tracker.core.config import BenchmarkSpec, CellRequest
from tracker.core.documents import Document, DocumentText, Response
from tracker.core.errors import BenchmarkError, did_you_mean
from tracker.core.extent import Extent
from tracker.core.hub import check_name
from tracker.core.identities import BenchmarkIdentity, TaskIdentity
from tracker.core.provenance import content_hash, file_stamp
from tracker.core.safe_yaml import short
from tracker.core.text import harmless
from tracker.stats.accuracy import RATIO

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder

PREFIX = "corpus:"
_SUFFIXES = (".txt", ".jsonl")
_TEXTS = (
    (("text",), ("text",)),
    (("content",), ("content",)),
    # CodeAlpaca's; MathInstruct has no `input`.
    (("instruction", "input", "output"), ("instruction", "output")),
    # LIMA's, a list of turns. Copies of it hold `{from, value}` or `{role, content}` a turn.
    (("conversations",), ("conversations",)),
)
"""Groups of columns that hold text when joined; the first group that is present is read."""


@dataclass(frozen=True)
class _Place:
    """Location of a corpus, and the part of it that is read.

    Attributes:
        name: Name as typed, without split, tokens and column.
        file: File; None for a data set.
        split: Split of a data set; None = `test`, or else `train`.
        tokens: Number of first tokens of each text; None = all.
        column: Only column that is read; None = the known columns of text.
    """

    name: str
    file: Path | None
    split: str | None
    tokens: int | None
    column: str | None

    @property
    def label(self) -> str:
        """The benchmark's name; that of a file excludes its folder, so the cell survives a move."""
        label = f"{PREFIX}{self.file.name if self.file else self.name}"
        parts = (("@", self.split), (":", self.tokens), ("#", self.column))
        return harmless(label + "".join(f"{sign}{part}" for sign, part in parts if part))

    @property
    def data_set(self) -> tuple[str, str | None]:
        """The name of a data set on the hub, and its configuration."""
        organisation, _, rest = self.name.partition("/")
        name, _, configuration = rest.partition("/")
        return "/".join(filter(None, (organisation, name))), configuration or None


def is_corpus(benchmark: str) -> bool:
    """Return whether a benchmark's name means a corpus and not a task of lm-eval."""
    return benchmark.startswith(PREFIX)


def locate(spec: BenchmarkSpec) -> _Place:
    """Find the location of a corpus without reading it; BenchmarkError if it cannot exist."""
    name, _, column = spec.benchmark.removeprefix(PREFIX).partition("#")
    before, colon, count = name.rpartition(":")
    tokens = int(count) if colon and count.isdecimal() else None
    name = name if tokens is None else before
    split = ""
    if Path(name).suffix not in _SUFFIXES:  # a file's folder may hold an @
        name, _, split = name.partition("@")
    if not name:
        raise BenchmarkError(
            f"{spec.benchmark!r} names no text; write corpus:FILE.txt, corpus:FILE.jsonl or "
            "corpus:NAME of a data set"
        )
    if tokens == 0:
        raise BenchmarkError(f"{spec.benchmark!r} reads no token; write a number from 1 on")
    for setting, why in (
        ("num_fewshot", "has no few-shot examples"),
        ("apply_chat_template", "is read without a chat template"),
    ):
        if given := getattr(spec, setting):
            raise BenchmarkError(
                f"{spec.benchmark} is plain text, which {why}; leave {setting} out (got {given})"
            )
    try:
        path = Path(name).expanduser()
        there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no home, a null byte
        raise BenchmarkError(f"there is no corpus file {short(name)}: {short(error)}") from None
    if path.suffix in _SUFFIXES:
        if not there:
            beside = [p.name for p in path.parent.glob("*") if p.suffix in _SUFFIXES]
            raise BenchmarkError(
                f"there is no corpus file {name}.{did_you_mean(path.name, beside)}"
            )
        if split:
            raise BenchmarkError(f"{name} is a file and has no splits; leave @{split} out")
        if path.suffix == ".txt" and column:
            raise BenchmarkError(f"{name} is plain text and has no columns; leave #{column} out")
        return _Place(name, path, None, tokens, column or None)
    if there:
        raise BenchmarkError(f"{name} cannot be read as a corpus; a corpus file is .txt or .jsonl")
    place = _Place(name, None, split or None, tokens, column or None)
    data_set, configuration = place.data_set
    try:
        check_name(f"{data_set}/{configuration}" if "/" in (configuration or "") else data_set)
    except ValueError as form:
        raise BenchmarkError(
            f"{name!r} is neither a corpus file here nor a data set of the hub; {form}, with "
            "/CONFIGURATION after it where the data set has several"
        ) from None
    return place


def corpus_stamp(spec: BenchmarkSpec) -> object:
    """Return a cheap stamp of a corpus: equal stamps mean equal texts; None for the hub."""
    place = locate(spec)
    data = find_data(spec.data)
    return data.stamp() if place.file is None else file_stamp([place.file])


class Corpus:
    """The texts of one corpus, each a document.

    A text is cut into lm-eval's rolling windows, so that every token is predicted once. The first
    token follows the tokenizer's prefix token. Raises BenchmarkError for a corpus that cannot be
    found or read, or holds no text.
    """

    public = False
    """False, because the texts of a corpus may be private."""
    of_model = False

    def __init__(self, request: CellRequest) -> None:
        spec, documents = request.benchmark, request.documents
        place = locate(spec)
        split, texts = _texts(place, spec.data)
        self._texts = [text for text in texts if text.strip()]
        if not self._texts:
            raise BenchmarkError(f"{place.name} holds no text")
        self._name, self._tokens = place.label, place.tokens
        half = half_of(documents, self._name, len(self._texts)) if documents.part else None
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
            data=place.name if place.file else spec.data,
            num_fewshot=0,
            seed=documents.seed if half else None,
            apply_chat_template=False,
            primary_metric="acc",
            settings=said_part(documents, [half]),
        )
        self._numbers = task.numbers

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Cut the texts into windows, in the order of the corpus."""
        return [
            Document(
                task=self._name,
                index=index,
                requests=tuple(encoder.windows(self._texts[index], self._tokens)),
                gold=None,
                choices=0,
                rolling=True,
            )
            for index in sorted(extent.of(self._name, self._numbers))
        ]

    def rows(self, task: str) -> str:
        """Return a hash of the texts."""
        return content_hash(self._texts)

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, float | str | None]:
        """Count the right next tokens of a document, and sum its loss.

        `acc` and `loss` (nats) are JSON pairs [sum, tokens]; None for both when a log-likelihood is
        not finite.
        """
        loss = -math.fsum(response.loglikelihood for response in responses)
        if not math.isfinite(loss):
            return {"acc": None, "loss": None}
        tokens = sum(len(request.continuation) for request in document.requests)
        hits = sum(response.hits for response in responses)
        return {"acc": json.dumps([hits, tokens]), "loss": json.dumps([loss, tokens])}

    def text(self, document: Document) -> DocumentText:
        """Return the text of a document."""
        return DocumentText(self._texts[document.index])


def _texts(place: _Place, data: str) -> tuple[str, Iterable[str]]:
    """Read the texts, and the name of their split."""
    if place.file is None:
        splits = find_data(data).load(*place.data_set, place.split)
        split = place.split or next((name for name in ("test", "train") if name in splits), None)
        if split is None:
            raise BenchmarkError(
                f"{place.name} holds neither a split 'test' nor 'train'; write "
                f"corpus:{place.name}@SPLIT with one of: {', '.join(splits)}"
            )
        rows = splits[split]
        return split, _joined(place, rows.column_names, rows)
    if place.file.suffix == ".txt":
        # utf-8-sig also reads text that begins with a byte-order mark.
        return "all", re.split(r"\n(?:[^\S\n]*\n)+", _read(place.file))
    rows = list(_json_lines(place.file))
    columns = dict.fromkeys(name for row in rows for name in row)
    return "all", _joined(place, list(columns), rows)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{file} cannot be read as UTF-8 text: {error}") from None


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BenchmarkError(f"{file}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise BenchmarkError(f"{file}, line {number}: not a JSON object with columns")
        yield row


def _joined(
    place: _Place, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """Join the columns that hold text into one text for each row."""
    chosen = _columns(place, columns) if columns else ()
    for number, row in enumerate(rows, 1):
        parts = []
        for column in chosen:
            turns = row.get(column) or []
            said = [turns] if not isinstance(turns, list) else [_said(turn) for turn in turns]
            if not all(isinstance(part, str) for part in said):
                raise BenchmarkError(
                    f"{place.name}, document {number}: the column {column!r} holds no text"
                )
            parts += said
        yield "\n".join(part for part in parts if part)


def _said(turn: Any) -> Any:
    """Return the text of one turn of a conversation."""
    return turn.get("value", turn.get("content")) if isinstance(turn, dict) else turn


def _columns(place: _Place, columns: Sequence[str]) -> tuple[str, ...]:
    """Choose the columns that hold the text."""
    if place.column:
        if place.column not in columns:
            near = did_you_mean(place.column, columns)
            raise BenchmarkError(
                f"{place.name} has no column {place.column!r}.{near} It has: {', '.join(columns)}."
            )
        return (place.column,)
    for names, needed in _TEXTS:
        if set(needed) <= set(columns):
            return tuple(name for name in names if name in columns)
    raise BenchmarkError(
        f"{place.name} has none of the columns text, content, instruction and output, or "
        f"conversations; it has: {', '.join(columns)}. Name the one to read: "
        f"corpus:{place.name}#{columns[0]}"
    )
