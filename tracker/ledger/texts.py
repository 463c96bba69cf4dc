"""Store the texts of a cell's documents.

No result depends on a stored text, except the margins of length-normalised accuracies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tracker.ledger.files import write_bytes
from tracker.ledger.shards import ASIDE_SUFFIX, read_shard, shard_file
from tracker.ledger.views import CellIdentity
from tracker.schema.distribution import LEDGER_FORMAT
from tracker.schema.documents import Document, DocumentText
from tracker.schema.provenance import content_hash

MAX_QUESTION_LENGTH = 4000
"""Maximum number of stored characters of a question; a longer one loses its middle."""
_NAME = "texts--"
"""Prefix of the names of files of texts, which distinguishes them from published shards."""
_SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "doc": pa.int32(),
        "question": pa.string(),
        "choices": pa.list_(pa.string()),
        "answer": pa.string(),
        "public": pa.bool_(),
    }
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredText:
    """Text of a document, and whether the text is public."""

    text: DocumentText
    public: bool


def text_row(document: Document, text: DocumentText, public: bool) -> dict[str, object]:
    """Build a document's row for a file of texts, and shorten a long question.

    `public` states whether the benchmark's texts are public.
    """
    question, half = text.question, MAX_QUESTION_LENGTH // 2
    if len(question) > MAX_QUESTION_LENGTH:
        question = f"{question[:half]} […] {question[-half:]}"
    return {
        "task": document.task,
        "doc": document.index,
        "question": _replace_surrogates(question),
        "choices": [_replace_surrogates(choice) for choice in text.choices],
        "answer": None if text.answer is None else _replace_surrogates(text.answer),
        "public": public,
    }


def _replace_surrogates(text: str) -> str:
    """Return a text with lone surrogates replaced, because Parquet cannot store them."""
    return text.encode(errors="replace").decode()


def is_text_file(path: Path) -> bool:
    """Return whether a file contains texts, according to its name."""
    return path.name.startswith(_NAME)


class Texts:
    """Stored texts of a cell's documents, including texts from copies of the cell."""

    def __init__(self, folder: Path, identity: CellIdentity, copies: Sequence[Texts] = ()) -> None:
        self._folder = folder / "texts"
        self._identity = identity
        self._copies = copies

    def files(self) -> list[Path]:
        """List the cell's files of texts in this results folder, but not in copies."""
        return sorted(self._folder.glob(f"{_NAME}*.parquet"))

    def file_names(self) -> list[str]:
        """List the names of the cell's files of texts, including copies of the cell."""
        return [path.name for texts in (self, *self._copies) for path in texts.files()]

    def add(self, block: str, rows: Iterable[Mapping[str, object]]) -> None:
        """Write the texts of a block's documents, except for texts that are already stored.

        Args:
            block: The name of the documents' block, which the caller must have locked.
            rows: One row per document, built with `text_row`.
        """
        paths = sorted(self._folder.glob(f"{_NAME}{block}.*.parquet"))
        stored_keys = {key for path in paths for key in self.read_file(path)}
        new_rows = [dict(row) for row in rows if (row["task"], row["doc"]) not in stored_keys]
        if new_rows:
            self._write(block, pa.Table.from_pylist(new_rows, schema=_SCHEMA))

    def _write(self, block: str, table: pa.Table) -> Path:
        metadata = {"format": LEDGER_FORMAT, "key": self._identity.key, "block": block}
        digest = content_hash(sorted(table["doc"].to_pylist()))
        path = self._folder / f"{_NAME}{block}.{digest[:12]}.parquet"
        write_bytes(path, shard_file(table, metadata))
        return path

    def import_file(self, path: Path) -> str:
        """Copy a file of texts from another folder into the cell, and return its new name.

        ValueError is raised if the file does not contain texts of this cell.
        """
        try:
            table, block = self._read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.name} holds no texts of this benchmark: {error}") from None
        return self._write(block, table).name

    def read(self) -> dict[tuple[str, int], StoredText]:
        """Read all texts of the cell; return (task, document) → text."""
        stored_texts: dict[tuple[str, int], StoredText] = {}
        for texts in (*self._copies, self):
            for path in texts.files():
                stored_texts |= texts.read_file(path)
        return stored_texts

    def read_file(self, path: Path) -> dict[tuple[str, int], StoredText]:
        """Read one file of texts; rename a damaged file, and return an empty dict."""
        try:
            table, _ = self._read_table(path)
        except OSError as error:  # the system has failed, not the file
            log.warning("the text file %s cannot be read now: %s", path, error)
            return {}
        except ValueError as error:
            with suppress(OSError):  # a colleague's folder
                path.replace(path.with_suffix(ASIDE_SUFFIX))
            log.warning("the text file %s is damaged (%s) and is ignored", path, error)
            return {}
        return {
            (row["task"], row["doc"]): StoredText(
                DocumentText(row["question"], tuple(row["choices"]), row["answer"]), row["public"]
            )
            for row in table.to_pylist()
        }

    def _read_table(self, path: Path) -> tuple[pa.Table, str]:
        shard = read_shard(path.read_bytes())
        if shard.metadata.get("key") != self._identity.key:
            raise ValueError("it belongs to another benchmark")
        if not shard.table.schema.equals(_SCHEMA):
            raise ValueError("it holds other columns")
        documents = {task.name: {*task.numbers} for task in self._identity.benchmark.tasks}
        for row in shard.table.select(["task", "doc"]).to_pylist():
            if row["doc"] not in documents.get(row["task"], ()):
                raise ValueError("the benchmark lacks a document that the file contains")
        block = str(shard.metadata.get("block"))
        if Path(block).name != block:
            raise ValueError("the file contains an invalid block name")
        return shard.table.replace_schema_metadata(None), block
