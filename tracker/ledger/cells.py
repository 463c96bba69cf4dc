"""Read and write the files of one cell: the results of one model on one benchmark."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from filelock import FileLock
from pydantic import ValidationError

from tracker.ledger.blocks import BLOCK_SIZE, Block, document_positions
from tracker.ledger.files import lock_file, make_folder, read_note, write_bytes, write_note
from tracker.ledger.outcomes import DIGEST_COLUMN, PROVENANCE_COLUMN, outcome_table
from tracker.ledger.shards import ASIDE_SUFFIX, Shard, read_shard, read_shard_metadata, shard_file
from tracker.ledger.texts import Texts
from tracker.ledger.views import CellIdentity, Views, view_file_name
from tracker.schema.distribution import LEDGER_FORMAT, version_problem
from tracker.schema.errors import WorkError
from tracker.schema.extent import ALL_DOCUMENTS, Extent
from tracker.schema.grouping import group_by
from tracker.schema.identities import Record
from tracker.schema.provenance import content_hash, has_other_tokens, tokeniser_differences
from tracker.schema.records import CellRecord, utc_date

Derived = TypeVar("Derived", bound=Record)
_OUTCOME_KEYS = ["task", "doc", "ablation"]
"""Columns that identify an outcome."""
_OTHER_TOKENS = (
    "this file is ignored, because its texts were tokenised by {}, but the other texts of the "
    "benchmark were tokenised by {}. Measure such outcomes in a separate results folder"
)
SHARD_SET_ASIDE = (
    "the damaged file was renamed; run the experiment again to measure the lost outcomes, then "
    "delete the renamed file"
)
"""The message about a damaged shard that has not been measured again yet."""
log = logging.getLogger(__name__)


class CellStore:
    """Files of one cell: the results of one model on one benchmark.

    An outcome is the result of one document under one ablation; a shard is a file of outcomes.
    Outcomes are also read from `copies`: copies of the cell in other results folders.
    """

    def __init__(
        self, folder: Path, identity: CellIdentity, copies: Sequence[CellStore] = ()
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.views = Views(folder, identity)
        self.texts: Texts = Texts(folder, identity, [copy.texts for copy in copies])
        self._copies = copies
        self._shards = folder / "shards"
        self._unread: set[Path] = set()
        self.mixed: dict[str, str] = {}
        """Shard read so far that must not be mixed with the other shards → what to do."""

    def task_documents(self, extent: Extent) -> dict[str, Sequence[int]]:
        """List the requested documents of each task, in the order of measurement."""
        tasks = self.identity.benchmark.tasks
        return {task.name: extent.select(task.name, task.numbers) for task in tasks}

    def counts(self, extent: Extent = ALL_DOCUMENTS) -> dict[str, int]:
        """Count the requested documents (`extent`) of each task."""
        return {task: len(documents) for task, documents in self.task_documents(extent).items()}

    def blocks(self, extent: Extent) -> list[Block]:
        """List the blocks of the requested documents (`extent`), task by task."""
        seed = None if extent.sample is None else extent.seed
        return [
            Block(task, number, seed)
            for task, count in self.counts(extent).items()
            for number in range(-(-count // BLOCK_SIZE))
        ]

    def lock(self, block: Block) -> FileLock:
        """Return the lock that a process must hold while measuring a block."""
        return lock_file(self.folder / "locks" / f"{block.name}.lock")

    def missing_outcomes(
        self, block: Block, extent: Extent, ablations: Collection[str]
    ) -> dict[tuple[str, ...], list[int]]:
        """List the requested documents of a block that lack outcomes, grouped by missing ablations.

        Returns a dict from ablation names to the numbers of documents that lack outcomes under
        exactly these ablations. Outcomes that were measured in another document order are not
        missing.
        """
        frame = self.read_block(block, extent, ["doc", "ablation"])
        measured = set(zip(frame["doc"], frame["ablation"], strict=True))

        def missing_names(document: int) -> tuple[str, ...]:
            return tuple(name for name in ablations if (document, name) not in measured)

        groups = group_by(self.documents(block, extent), missing_names)
        groups.pop((), None)
        return groups

    def documents(self, block: Block, extent: Extent) -> Sequence[int]:
        """List the numbers of a block's requested documents, in the order of measurement."""
        first = block.number * BLOCK_SIZE
        return self.task_documents(extent)[block.task][first : first + BLOCK_SIZE]

    def read_block(
        self, block: Block, extent: Extent, columns: list[str] | None = None
    ) -> pd.DataFrame:
        """Read the outcomes of the requested documents in a block.

        `extent` selects the requested documents. See `read` for the data frame.
        """
        documents = self.documents(block, extent)
        frame = self.read([block, *self._blocks_in_other_orders(block, documents)], columns)
        return frame[frame["doc"].isin(documents)]

    def _blocks_in_other_orders(self, block: Block, documents: Iterable[int]) -> Iterator[Block]:
        """Yield the blocks of other document orders that contain some of the documents.

        `documents` are numbers of documents in the task of `block`. A document order is searched
        only if outcomes were measured in this order.
        """
        task_documents = self.task_documents(ALL_DOCUMENTS)[block.task]
        for seed in self._seeds() - {block.seed}:
            positions = document_positions(block.task, task_documents, seed)
            for number in sorted({positions[document] // BLOCK_SIZE for document in documents}):
                yield Block(block.task, number, seed)

    def _seeds(self) -> set[int | None]:
        """Return the seeds of all document orders in which documents were measured.

        The seed None stands for the task's own, unshuffled order.
        """
        names = (_block_name(path).partition("+") for path in self.shards())
        seeds = {int(seed.split(".")[0]) if plus else None for _, plus, seed in names}
        return seeds.union(*(copy._seeds() for copy in self._copies))

    def read_documents(self, extent: Extent, columns: list[str] | None = None) -> pd.DataFrame:
        """Read the outcomes of the requested documents.

        Args:
            extent: The requested documents.
            columns: The columns to read, which must include task, doc and ablation; None = all
                columns.

        Returns:
            A data frame of the outcomes, as from `read`.
        """
        blocks = self.blocks(extent)
        is_one_order = self._seeds() <= {block.seed for block in blocks}
        frame = self.read(blocks if is_one_order else None, columns)
        is_requested = pd.Series(False, index=frame.index)
        for task, numbers in self.task_documents(extent).items():
            is_requested |= (frame["task"] == task) & frame["doc"].isin(numbers)
        return frame.loc[is_requested]

    def is_complete(self, extent: Extent, ablations: Collection[str]) -> bool:
        """Return whether each requested document has an outcome under each ablation."""
        names = self.read_documents(extent, ["task", "doc", "ablation"])["ablation"]
        n_requested = sum(self.counts(extent).values()) * len(set(ablations))
        return bool(names.isin(ablations).sum() == n_requested)

    def write(
        self, block: Block, rows: Sequence[Mapping[str, object]], metadata: Mapping[str, object]
    ) -> None:
        """Write outcomes of one block to a new file (shard).

        Args:
            block: The block that contains the documents.
            rows: One row per document and ablation, built with `outcomes.outcome_row`.
            metadata: Details of the measurement, with versions, machine and device under
                `provenance`.
        """
        header = {"format": LEDGER_FORMAT, "key": self.identity.key, "task": block.task, **metadata}
        if block.seed is not None:
            header["seed"] = block.seed
        if "measured" in header:
            header["measured"] = max(str(header["measured"]), self._earliest_date)
        write_bytes(self._shard_path(block, rows), shard_file(outcome_table(rows), header))

    def import_shard(self, path: Path) -> str:
        """Move a shard from another folder into the cell, and return the shard's new file name.

        ValueError is raised if the file is not a shard of this cell.
        """
        try:
            shard = read_shard(path.read_bytes())
            block = self._find_block(shard)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path.name} is not a shard of this benchmark: {error}") from None
        names = {*_OUTCOME_KEYS, DIGEST_COLUMN} & {*shard.table.column_names}
        target = self._shard_path(block, shard.table.select([*names]).to_pylist())
        make_folder(target.parent)
        path.replace(target)
        return target.name

    def _find_block(self, shard: Shard) -> Block:
        """Find the block that contains all documents of a shard, and verify the shard's cell key.

        The shard must have the columns task and doc. ValueError is raised if the shard belongs to
        another cell, or if no block contains all documents.
        """
        if problem := version_problem(shard.metadata.get("format")):
            raise ValueError(f"it {problem}")
        if shard.metadata.get("key") != self.identity.key:
            raise ValueError("it belongs to another benchmark")
        columns = shard.table.select(["task", "doc"]).to_pydict()
        tasks, documents = set(columns["task"]), set(columns["doc"])
        problem = "the file does not hold exactly one block of documents"
        if len(tasks) != 1:
            raise ValueError(problem)
        (task,), seed = tasks, shard.metadata.get("seed")
        # Positions depend on the order, so the same documents may be of another block in another.
        positions = document_positions(task, self.task_documents(ALL_DOCUMENTS).get(task, ()), seed)
        if not documents <= positions.keys():
            raise ValueError("the benchmark lacks a document that the file contains")
        numbers = {positions[document] // BLOCK_SIZE for document in documents}
        if len(numbers) != 1:
            raise ValueError(problem)
        return Block(task, numbers.pop(), seed)

    def _shard_path(self, block: Block, rows: Iterable[Mapping[str, object]]) -> Path:
        """Return the path for a new shard (file of outcomes) with the outcomes `rows`.

        The file name contains a hash of documents, ablations and tokens.
        """
        keys = ((row["doc"], row["ablation"], row.get(DIGEST_COLUMN)) for row in rows)
        texts = {tuple(str(value) for value in key if value is not None) for key in keys}
        content = content_hash(sorted(texts))
        return self._shards / f"{block.name}.{content[:12]}.parquet"

    def read(
        self, blocks: Sequence[Block] | None = None, columns: list[str] | None = None
    ) -> pd.DataFrame:
        """Read the outcomes of the given blocks as a data frame.

        A damaged shard is renamed with a warning. Outcomes of differently
        tokenised texts are left out, and their shards are listed in `mixed`.

        Args:
            blocks: The blocks to read; None = all blocks.
            columns: The columns to read; None = all columns, including `PROVENANCE_COLUMN`.

        Returns:
            One row per (task, document, ablation), without duplicates, in no particular order.
        """
        # Keys and digests are always read: they find duplicates and other tokens.
        names = columns and list(dict.fromkeys((*_OUTCOME_KEYS, DIGEST_COLUMN, *columns)))
        shards = {}
        for path, shard in self._intact_shards(blocks, names):
            stack = shard.metadata.get(PROVENANCE_COLUMN, {})
            if has_other_tokens(stack, self.identity.provenance):
                self._exclude_shard(path, stack)
                continue
            shards[path] = frame = shard.table.to_pandas()
            if names is None or PROVENANCE_COLUMN in names:
                frame[PROVENANCE_COLUMN] = json.dumps(stack)
        if not shards:
            return pd.DataFrame(columns=columns or [*_OUTCOME_KEYS, PROVENANCE_COLUMN])
        frame = self._join_shards(shards).drop_duplicates(_OUTCOME_KEYS, ignore_index=True)
        return frame if columns is None else frame[columns]

    def _intact_shards(
        self, blocks: Sequence[Block] | None, columns: list[str] | None
    ) -> Iterator[tuple[Path, Shard]]:
        """Yield the path and the content of each undamaged shard.

        The shards in this folder come before the shards in copies of the cell.
        """
        if blocks is None:
            paths = self.shards()
        elif len(blocks) == 1:
            paths = sorted(self._shards.glob(f"{blocks[0].name}.*.parquet"))
        else:
            names = {block.name for block in blocks}
            paths = [path for path in self.shards() if _block_name(path) in names]
        for path in paths:
            if (shard := self.load_shard(path, columns)) is not None:
                yield path, shard
        for copy in self._copies:
            yield from copy._intact_shards(blocks, columns)

    def _join_shards(self, shards: Mapping[Path, pd.DataFrame]) -> pd.DataFrame:
        """Join shards; of each document, keep only outcomes with the most common tokenisation."""
        frame, key = pd.concat(shards.values()), ["task", "doc", DIGEST_COLUMN]
        if DIGEST_COLUMN not in frame:
            return frame.assign(**{DIGEST_COLUMN: None})
        if not frame[key].dropna().drop_duplicates().duplicated(["task", "doc"]).any():
            return frame
        sizes = frame.value_counts(key).sort_index().sort_values(ascending=False, kind="stable")
        digests = sizes.index.to_frame(index=False)
        rare_digests = pd.MultiIndex.from_frame(digests[digests.duplicated(["task", "doc"])])
        for path, outcomes in shards.items():
            if pd.MultiIndex.from_frame(outcomes.reindex(columns=key)).isin(rare_digests).any():
                self._exclude_shard(path, read_shard_metadata(path).get(PROVENANCE_COLUMN, {}))
        return frame[~pd.MultiIndex.from_frame(frame[key]).isin(rare_digests)]

    def _exclude_shard(self, path: Path, stack: Mapping[str, str]) -> None:
        """Record in `mixed` a shard with other tokens of the texts, and a message for the user."""
        base = self.identity.provenance
        versions = tokeniser_differences(stack, base), tokeniser_differences(base, stack)
        self.mixed[str(path)] = _OTHER_TOKENS.format(*versions)

    def load_shard(self, path: Path, columns: list[str] | None = None) -> Shard | None:
        """Read and verify a shard, with all columns or only the given columns.

        A damaged shard is renamed, so that the shard's outcomes are measured again. None is
        returned for a damaged or missing shard. WorkError is raised if the system fails to read the
        file.
        """
        try:
            shard = read_shard(path.read_bytes(), columns)
            if self._find_block(shard).name != _block_name(path):
                raise ValueError("the file name does not match the block of documents in the file")
            return shard
        except FileNotFoundError:
            if not path.is_symlink():
                return None
            problem = "it is a broken link"
        except IsADirectoryError:
            problem = "it is a folder"
        except OSError as error:
            # The system has failed, not the shard.
            raise WorkError(f"{path} cannot be read now: {error}") from None
        except ValueError as error:
            problem = str(error).splitlines()[0]
        aside_path = path.with_suffix(ASIDE_SUFFIX)
        self._unread.add(aside_path)
        try:
            path.replace(aside_path)
            fate = f"renamed to {aside_path.name}"
        except OSError:  # another process was first, or the folder is a colleague's
            fate = "ignored"
        message = "the shard %s is damaged (%s) and is %s; its outcomes are computed again"
        log.warning(message, path, problem, fate)
        return None

    def damaged_shards(self) -> dict[str, str]:
        """Return the path of each damaged or ignored shard → message for the user."""
        stems = {path.stem for path in self.shards()}
        paths = {p for p in self._shards.glob(f"*{ASIDE_SUFFIX}") if p.stem not in stems}
        messages = dict.fromkeys(map(str, sorted(paths | self._unread)), SHARD_SET_ASIDE)
        messages |= self.mixed
        for copy in self._copies:
            messages |= copy.damaged_shards()
        return messages

    def shard_digests(self, verify_all: bool = False) -> list[tuple[str, str]]:
        """List the file name and SHA-256 of each undamaged shard.

        Shards in copies of the cell are included. Unless `verify_all` is true, only new and
        changed files are verified.
        """
        note, former, verified = self._verified_path, read_note(self._verified_path), {}
        for path in self.shards():
            with suppress(OSError):  # gone, or a link that leads nowhere
                stat = path.stat()
                state = [stat.st_size, stat.st_mtime_ns]
                if former.get(path.name, [])[:2] == state and not verify_all:
                    verified[path.name] = former[path.name]
                    continue
            if (shard := self.load_shard(path)) is not None:
                verified[path.name] = [*state, shard.digest]
        if verified != former:
            with suppress(WorkError):  # a colleague's folder
                write_note(note, verified | {name: former[name] for name in self.lost_shards()})
        digests = [(name, str(digest)) for name, (*_, digest) in verified.items()]
        return digests + [pair for copy in self._copies for pair in copy.shard_digests(verify_all)]

    def lost_shards(self) -> list[str]:
        """List the file names of shards that were verified earlier and are now missing."""
        paths = map(self._shards.joinpath, read_note(self._verified_path))
        pairs = ((path, path.with_suffix(ASIDE_SUFFIX)) for path in paths)
        return [path.name for path, aside in pairs if not any(map(os.path.lexists, (path, aside)))]

    @property
    def _verified_path(self) -> Path:
        return self.folder / "verified.json"

    def all_metadata(self) -> list[dict[str, Any]]:
        """List the metadata of all shards, including shards in copies of the cell.

        Copies of a shard have the same name and are listed once.
        """
        metadata = {}
        paths = (path for store in (self, *self._copies) for path in store.shards())
        for path in (path for path in paths if str(path) not in self.mixed):
            with suppress(OSError, ValueError):  # damage is reported where the shard is read
                metadata[path.name] = read_shard_metadata(path)
        return list(metadata.values())

    def siblings(self) -> list[CellStore]:
        """List the other cells that have the same model name and benchmark name."""
        prefix = self.folder.name[: -len(self.identity.key[:12])]
        stores = []
        for folder in sorted(self.folder.parent.glob(f"{glob.escape(prefix)}*")):
            with suppress(OSError, ValueError):  # damage is reported where the cell is shown
                identity = CellIdentity.read((folder / "cell.json").read_bytes())
                if identity.key != self.identity.key:
                    stores.append(CellStore(folder, identity))
        return stores

    @cached_property
    def _earliest_date(self) -> str:
        """Earliest date for new outcomes, as ISO text; empty if there is no limit.

        The date is one second after the latest measurement in cells with the same names
        (`siblings`).
        """
        dates = (last_measured(sibling.all_metadata()) for sibling in self.siblings())
        if not (last_date := max(dates, default="")):
            return ""
        with suppress(OverflowError):  # the end of the calendar
            earliest = datetime.fromisoformat(last_date) + timedelta(seconds=1)
            return earliest.isoformat(timespec="seconds")
        return last_date

    def count_documents(self) -> int:
        """Count the documents that have at least one outcome."""
        return len(self.read(columns=["task", "doc"]).drop_duplicates(["task", "doc"]))

    def shards(self) -> list[Path]:
        """List the paths of the cell's shards (files of outcomes) in this folder."""
        return sorted(self._shards.glob("*.parquet"))

    def seconds(self, documents: Mapping[str, Collection[tuple[str, int]]]) -> float:
        """Return the seconds that the measurement of given outcomes took.

        `documents` maps the name of each ablation to (task, document number) pairs. If half of a
        shard's outcomes are given, half of the shard's time counts.
        """
        total = 0.0
        for path in self.shards():
            try:
                shard = read_shard(path.read_bytes(), ["task", "doc", "ablation"])
            except (OSError, ValueError):  # said where outcomes are read
                continue
            rows = shard.table.to_pylist()
            n_needed = sum((r["task"], r["doc"]) in documents.get(r["ablation"], ()) for r in rows)
            total += float(shard.metadata["seconds"]) * n_needed / max(1, len(rows))
        return total

    def read_derived(self, state: str, name: str, kind: type[Derived]) -> Derived | None:
        """Return the stored record of the view `name`; None if the record is missing or outdated.

        `state` is a hash of the record's inputs. A record with another hash is outdated.
        """
        note = read_note(self._derived_path(name, kind))
        if note.get("state") != state:
            return None
        try:
            return kind.model_validate(note.get("record"))
        except ValidationError:
            return None

    def write_derived(self, state: str, name: str, record: Record) -> None:
        """Store a record that was computed for the view `name`.

        `state` is a hash of the record's inputs. Nothing is stored if the folder is not writable,
        or if some outcomes come from differently tokenised texts.
        """
        if self.mixed:
            return
        note = {"state": state, "record": record.model_dump(mode="json")}
        with suppress(WorkError):
            write_note(self._derived_path(name, type(record)), note)

    def _derived_path(self, name: str, kind: type[Record]) -> Path:
        name_of_kind = kind.__name__.removesuffix("Record").lower()
        suffix = "" if kind is CellRecord else f".{name_of_kind}"
        return self.folder / "derived" / f"{view_file_name(name)}{suffix}.json"

    def receipt(self, destination: str) -> dict[str, str]:
        """Return the receipt that `add_receipt` stored for a destination; {} if there is none."""
        note = read_note(self._receipt_path(destination))
        return note if {"record", "location"} <= set(note) else {}

    def add_receipt(self, destination: str, **receipt: str) -> None:
        """Store a receipt, which describes a finished or planned publication to a destination.

        A receipt contains, for example, the `location` of the runs and the name of the `view`.
        """
        write_note(self._receipt_path(destination), receipt)

    def _receipt_path(self, destination: str) -> Path:
        return self.folder / "receipts" / f"{destination[:32]}.json"

    def begin_search(self, command: Sequence[str]) -> None:
        """Record that a search has begun to measure the cell.

        `command` is the command that started the search, without the option for the results folder.
        The cell is shown as unfinished until `end_search` is called.
        """
        write_note(self._search_path(command), {"command": list(command)})

    def end_search(self, command: Sequence[str]) -> None:
        """Record that the search with this `command` has ended."""
        self._search_path(command).unlink(missing_ok=True)
        with suppress(OSError):  # another search is at it, or none ever was
            self._search_path(command).parent.rmdir()

    def running_searches(self) -> list[list[str]]:
        """List the commands of unfinished searches that measure the cell."""
        notes = map(read_note, sorted(self.folder.glob("begun/*.json")))
        return [[str(word) for word in note.get("command", ())] for note in notes]

    def _search_path(self, command: Sequence[str]) -> Path:
        return self.folder / "begun" / f"{content_hash(list(command))[:32]}.json"

    def published_places(self, *views: str) -> list[str]:
        """List the destinations of finished and planned publications of the given views."""
        notes = map(read_note, sorted(self.folder.glob("receipts/*.json")))
        names = (note.get("place") for note in notes if note.get("view") in views)
        return list(dict.fromkeys(filter(None, names)))


def _block_name(path: Path) -> str:
    """Return the name of a shard's block, which is the beginning of the shard's file name."""
    return path.name.rsplit(".", 2)[0]


def last_measured(all_metadata: Iterable[Mapping[str, Any]]) -> str:
    """Return the latest measurement date in the metadata of shards; empty if there is no date."""
    last_date = ""
    for metadata in all_metadata:
        with suppress(ValueError):  # invalid dates are ignored
            if metadata.get("measured"):
                last_date = max(last_date, utc_date(str(metadata["measured"])))
    return last_date
