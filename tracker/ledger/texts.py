"""Store the texts of a cell's documents, beside the shards of their outcomes.

Figures do not depend on them, except for the margins of accuracies that lm-eval normalises by the
length of an option.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tracker.core.distribution import FORMAT
from tracker.core.documents import Document, DocumentText
from tracker.core.provenance import content_hash
from tracker.ledger.blocks import places
from tracker.ledger.files import write_bytes
from tracker.ledger.shards import ASIDE, read_shard, shard_file
from tracker.ledger.views import CellIdentity

LONGEST = 4000
"""Maximum number of stored characters of a question, from its beginning and its end."""
_NAME = "texts--"
"""Prefix of file names, which distinguishes texts from shards when both are published."""
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
class KeptText:
    """Text of a document; `public` is True if it comes from the hub or a package."""

    text: DocumentText
    public: bool


def text_row(document: Document, text: DocumentText, public: bool) -> dict[str, object]:
    """Build the row of a document's text; a long question loses its middle."""
    question = text.question
    if len(question) > LONGEST:
        question = f"{question[: LONGEST // 2]} […] {question[-LONGEST // 2 :]}"
    return {
        "task": document.task,
        "doc": document.index,
        "question": _whole(question),
        "choices": [_whole(choice) for choice in text.choices],
        "answer": None if text.answer is None else _whole(text.answer),
        "public": public,
    }


def _whole(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and Parquet cannot."""
    return text.encode(errors="replace").decode()


def is_texts(path: Path) -> bool:
    """Check by its name whether a published file of a cell holds texts."""
    return path.name.startswith(_NAME)


class Texts:
    """Texts of one cell on disk; `others` are those of copies of the cell in other folders."""

    def __init__(self, folder: Path, identity: CellIdentity, others: Sequence[Texts] = ()) -> None:
        self._folder = folder / "texts"
        self._identity = identity
        self._others = others

    def files(self) -> list[Path]:
        """List the files of this folder."""
        return sorted(self._folder.glob(f"{_NAME}*.parquet"))

    def names(self) -> list[str]:
        """List the names of all files that `read` reads, which depend on their documents."""
        return [path.name for texts in (self, *self._others) for path in texts.files()]

    def add(self, block: str, rows: Iterable[Mapping[str, object]]) -> None:
        """Write the texts of a block's documents, except for those already stored.

        Args:
            block: The name of their block, whose lock is held.
            rows: One mapping per document, as from `text_row`.
        """
        beside = sorted(self._folder.glob(f"{_NAME}{block}.*.parquet"))
        held = {place for path in beside for place in self.read_file(path)}
        new = [dict(row) for row in rows if (row["task"], row["doc"]) not in held]
        if new:
            self._write(block, pa.Table.from_pylist(new, schema=_SCHEMA))

    def _write(self, block: str, table: pa.Table) -> Path:
        about = {"format": FORMAT, "key": self._identity.key, "block": block}
        digest = content_hash(sorted(table["doc"].to_pylist()))
        path = self._folder / f"{_NAME}{block}.{digest[:12]}.parquet"
        write_bytes(path, shard_file(table, about))
        return path

    def adopt(self, path: Path) -> str:
        """Copy texts from elsewhere into the cell, and return the new file's name.

        The former name is ignored. ValueError is raised if it holds no texts of this cell.
        """
        try:
            table, block = self._table(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.name} holds no texts of this benchmark: {error}") from None
        return self._write(block, table).name

    def read(self) -> dict[tuple[str, int], KeptText]:
        """Read all texts: (task, document) → text."""
        found: dict[tuple[str, int], KeptText] = {}
        for texts in (*self._others, self):
            for path in texts.files():
                found |= texts.read_file(path)
        return found

    def read_file(self, path: Path) -> dict[tuple[str, int], KeptText]:
        """Read one file; a damaged one is set aside and gives an empty dict."""
        try:
            table, _ = self._table(path)
        except OSError as error:  # the system has failed, not the file
            log.warning("the texts %s cannot be read now: %s", path, error)
            return {}
        except ValueError as error:
            with suppress(OSError):  # a colleague's folder
                path.replace(path.with_suffix(ASIDE))
            log.warning("the texts %s are not what was written (%s); set aside", path, error)
            return {}
        return {
            (row["task"], row["doc"]): KeptText(
                DocumentText(row["question"], tuple(row["choices"]), row["answer"]), row["public"]
            )
            for row in table.to_pylist()
        }

    def _table(self, path: Path) -> tuple[pa.Table, str]:
        shard = read_shard(path.read_bytes())
        if shard.about.get("key") != self._identity.key:
            raise ValueError("it belongs to another benchmark")
        if not shard.table.schema.equals(_SCHEMA):
            raise ValueError("it holds other columns")
        tasks = {
            task.name: places(task.name, task.numbers, None)
            for task in self._identity.benchmark.tasks
        }
        for row in shard.table.select(["task", "doc"]).to_pylist():
            if row["doc"] not in tasks.get(row["task"], ()):
                raise ValueError("the benchmark has no such document")
        block = str(shard.about.get("block"))
        if Path(block).name != block:
            raise ValueError("its block is no name")
        return shard.table.replace_schema_metadata(None), block
