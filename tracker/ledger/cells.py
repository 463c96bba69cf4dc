"""Read and write one cell: its shards of outcomes, its views, and records derived from them."""

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

from tracker.core.distribution import FORMAT, other_format
from tracker.core.errors import WorkError
from tracker.core.extent import ALL, Extent
from tracker.core.grouping import grouped
from tracker.core.identities import Record
from tracker.core.provenance import content_hash, readers, reads_otherwise
from tracker.core.records import CellRecord, utc
from tracker.ledger.blocks import BLOCK, Block, places
from tracker.ledger.files import lock_file, make_folder, read_note, write_bytes, write_note
from tracker.ledger.outcomes import PROVENANCE, TOKENS_DIGEST, outcome_table
from tracker.ledger.shards import ASIDE, Shard, read_shard, shard_about, shard_file
from tracker.ledger.texts import Texts
from tracker.ledger.views import CellIdentity, Views, view_file

Derived = TypeVar("Derived", bound=Record)
_OUTCOME = ["task", "doc", "ablation"]
"""Columns that identify an outcome."""
_OTHER_TOKENS = (
    "its documents were read otherwise (by {}) than those of the rest of its cell (by {}), so that "
    "it counts for nothing; such outcomes need a results folder of their own"
)
log = logging.getLogger(__name__)


class CellStore:
    """One cell on disk.

    `others` are copies of the cell in other folders, whose outcomes are read too. `views` holds its
    requested views, and `texts` the texts of its documents.
    """

    def __init__(
        self, folder: Path, identity: CellIdentity, others: Sequence[CellStore] = ()
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.views = Views(folder, identity)
        self.texts: Texts = Texts(folder, identity, [other.texts for other in others])
        self._others = others
        self._shards = folder / "shards"
        self._unread: set[Path] = set()
        self.mixed: dict[str, str] = {}
        """Shards that must not be mixed with the rest, among those read so far → what to do."""

    def wanted(self, extent: Extent) -> dict[str, Sequence[int]]:
        """Return the documents of each task in an extent, in the order of their blocks."""
        return {
            task.name: extent.of(task.name, task.numbers) for task in self.identity.benchmark.tasks
        }

    def counts(self, extent: Extent = ALL) -> dict[str, int]:
        """Return the number of documents of each task in an extent."""
        return {task: len(documents) for task, documents in self.wanted(extent).items()}

    def blocks(self, extent: Extent) -> list[Block]:
        """List the blocks that hold an extent's documents, in order."""
        seed = None if extent.sample is None else extent.seed
        return [
            Block(task, number, seed)
            for task, count in self.counts(extent).items()
            for number in range(-(-count // BLOCK))
        ]

    def lock(self, block: Block) -> FileLock:
        """Return the lock under which one process computes a block."""
        return lock_file(self.folder / "locks" / f"{block.name}.lock")

    def missing(
        self, block: Block, extent: Extent, ablations: Collection[str]
    ) -> dict[tuple[str, ...], list[int]]:
        """Find the outcomes that a block lacks, also among blocks of other orders.

        Returns missing ablations, in the given order → the documents that lack exactly these.
        """
        frame = self.read_block(block, extent, ["doc", "ablation"])
        present = set(zip(frame["doc"], frame["ablation"], strict=True))

        def absent(document: int) -> tuple[str, ...]:
            return tuple(name for name in ablations if (document, name) not in present)

        work = grouped(self.documents(block, extent), absent)
        work.pop((), None)
        return work

    def documents(self, block: Block, extent: Extent) -> Sequence[int]:
        """List an extent's documents in a block, in order."""
        first = block.number * BLOCK
        return self.wanted(extent)[block.task][first : first + BLOCK]

    def read_block(
        self, block: Block, extent: Extent, columns: list[str] | None = None
    ) -> pd.DataFrame:
        """Read the outcomes of an extent's documents in a block, as `read_documents`."""
        documents = self.documents(block, extent)
        frame = self.read([block, *self._in_other_orders(block, documents)], columns)
        return frame[frame["doc"].isin(documents)]

    def _in_other_orders(self, block: Block, documents: Iterable[int]) -> Iterator[Block]:
        """Yield the blocks of other orders that hold documents of a block."""
        every = self.wanted(ALL)[block.task]
        for seed in self._orders() - {block.seed}:
            there = places(block.task, every, seed)
            for number in sorted({there[document] // BLOCK for document in documents}):
                yield Block(block.task, number, seed)

    def _orders(self) -> set[int | None]:
        """Return the seeds of the orders in which documents of this cell were measured."""
        names = (path.name.rsplit(".", 2)[0].partition("+") for path in self.shards())
        found = {int(rest.split(".")[0]) if plus else None for _, plus, rest in names}
        return found.union(*(other._orders() for other in self._others))

    def read_documents(self, extent: Extent, columns: list[str] | None = None) -> pd.DataFrame:
        """Read the outcomes of some documents, from blocks of any order.

        Args:
            extent: The documents.
            columns: The columns, including task, doc and ablation; None = all.

        Returns:
            The outcomes, as from `read`.
        """
        mine = self.blocks(extent)
        one_order = self._orders() <= {block.seed for block in mine}
        frame = self.read(mine if one_order else None, columns)
        is_wanted = pd.Series(False, index=frame.index)
        for task, docs in self.wanted(extent).items():
            is_wanted |= (frame["task"] == task) & frame["doc"].isin(docs)
        return frame.loc[is_wanted]

    def is_complete(self, extent: Extent, ablations: Collection[str]) -> bool:
        """Check whether every document of an extent is measured under every ablation."""
        measured = self.read_documents(extent, ["task", "doc", "ablation"])["ablation"]
        wanted = sum(self.counts(extent).values()) * len(set(ablations))
        return bool(measured.isin(ablations).sum() == wanted)

    def write(
        self, block: Block, rows: Sequence[Mapping[str, object]], metadata: Mapping[str, object]
    ) -> None:
        """Add a shard of outcomes.

        Args:
            block: The block that the documents belong to.
            rows: One mapping per (document, ablation), as from `outcomes.outcome_row`.
            metadata: Details of the measurement, with versions, machine and device under
                `provenance`.
        """
        about = {"format": FORMAT, "key": self.identity.key, "task": block.task, **metadata}
        if block.seed is not None:
            about["seed"] = block.seed
        if "measured" in about:
            about["measured"] = max(str(about["measured"]), self._after)
        content = shard_file(outcome_table(rows), about)
        path = self._shard_path(block, rows)
        write_bytes(path, content)

    def adopt(self, path: Path) -> str:
        """Move a shard from elsewhere into the cell, and return its new name.

        Its former name is ignored. ValueError is raised if it is no shard of this cell.
        """
        try:
            shard = read_shard(path.read_bytes())
            block = self._block_of(shard)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path.name} is no shard of this benchmark: {error}") from None
        names = [name for name in (*_OUTCOME, TOKENS_DIGEST) if name in shard.table.column_names]
        target = self._shard_path(block, shard.table.select(names).to_pylist())
        make_folder(target.parent)
        path.replace(target)
        return target.name

    def _block_of(self, shard: Shard) -> Block:
        """Return the block of a shard's outcomes; raise ValueError if they are not of one block.

        The shard needs the columns task and doc.
        """
        if why := other_format(shard.about.get("format")):
            raise ValueError(f"it {why}")
        if shard.about.get("key") != self.identity.key:
            raise ValueError("it belongs to another benchmark")
        held = shard.table.select(["task", "doc"]).to_pydict()
        tasks, documents = set(held["task"]), set(held["doc"])
        if len(tasks) != 1:
            raise ValueError("it holds more or less than one block")
        (task,), seed = tasks, shard.about.get("seed")
        there = places(task, self.wanted(ALL).get(task, ()), seed)
        if not all(document in there for document in documents):
            raise ValueError("the benchmark has no such document")
        numbers = {there[document] // BLOCK for document in documents}
        if len(numbers) != 1:
            raise ValueError("it holds more or less than one block")
        (number,) = numbers
        return Block(task, number, seed)

    def _shard_path(self, block: Block, rows: Iterable[Mapping[str, object]]) -> Path:
        """Return a shard's path, named by its documents, ablations and tokens."""
        held = ((row["doc"], row["ablation"], row.get(TOKENS_DIGEST)) for row in rows)
        texts = {tuple(str(one) for one in each if one is not None) for each in held}
        content = content_hash(sorted(texts))
        return self._shards / f"{block.name}.{content[:12]}.parquet"

    def read(
        self, blocks: Sequence[Block] | None = None, columns: list[str] | None = None
    ) -> pd.DataFrame:
        """Read the outcomes of some blocks.

        A damaged shard is set aside with a warning, so that it is computed again. Outcomes with
        other tokens than the rest of the cell are left out, and their shard is added to `mixed`.

        Args:
            blocks: The blocks; None = all.
            columns: The columns; None = all, and `PROVENANCE`.

        Returns:
            One row per (task, document, ablation), in no particular order, none twice.
        """
        names = columns and list(dict.fromkeys((*_OUTCOME, TOKENS_DIGEST, *columns)))
        shards = {}
        for path, shard in self._sound(blocks, names):
            stack = shard.about.get(PROVENANCE, {})
            if reads_otherwise(stack, self.identity.provenance):
                self._leave_out(path, stack)
                continue
            shards[path] = frame = shard.table.to_pandas()
            if names is None or PROVENANCE in names:
                frame[PROVENANCE] = json.dumps(stack)
        if not shards:
            return pd.DataFrame(columns=columns or [*_OUTCOME, PROVENANCE])
        frame = self._unmixed(shards).drop_duplicates(_OUTCOME, ignore_index=True)
        return frame if columns is None else frame[columns]

    def _sound(
        self, blocks: Sequence[Block] | None, columns: list[str] | None
    ) -> Iterator[tuple[Path, Shard]]:
        """Yield intact shards one by one, this folder's first, then those of other folders."""
        if blocks is None:
            paths = self.shards()
        elif len(blocks) == 1:
            paths = sorted(self._shards.glob(f"{blocks[0].name}.*.parquet"))
        else:
            wanted = {block.name for block in blocks}
            paths = [path for path in self.shards() if path.name.rsplit(".", 2)[0] in wanted]
        for path in paths:
            if (shard := self.shard(path, columns)) is not None:
                yield path, shard
        for other in self._others:
            yield from other._sound(blocks, columns)

    def _unmixed(self, shards: Mapping[Path, pd.DataFrame]) -> pd.DataFrame:
        """Join shards, with only the most frequent tokens of each document.

        Outcomes of former versions, which have no digest of tokens, are kept.
        """
        frame, key = pd.concat(shards.values()), ["task", "doc", TOKENS_DIGEST]
        if TOKENS_DIGEST not in frame:
            return frame.assign(**{TOKENS_DIGEST: None})
        if not frame[key].dropna().drop_duplicates().duplicated(["task", "doc"]).any():
            return frame
        sizes = frame.value_counts(key).sort_index().sort_values(ascending=False, kind="stable")
        digests = sizes.index.to_frame(index=False)
        fewer = pd.MultiIndex.from_frame(digests[digests.duplicated(["task", "doc"])])
        for path, outcomes in shards.items():
            if pd.MultiIndex.from_frame(outcomes.reindex(columns=key)).isin(fewer).any():
                self._leave_out(path, shard_about(path).get(PROVENANCE, {}))
        return frame[~pd.MultiIndex.from_frame(frame[key]).isin(fewer)]

    def _leave_out(self, path: Path, stack: Mapping[str, str]) -> None:
        """Add a shard to `mixed`, which must not be mixed with the rest."""
        mine = self.identity.provenance
        self.mixed[str(path)] = _OTHER_TOKENS.format(readers(stack, mine), readers(mine, stack))

    def shard(self, path: Path, columns: list[str] | None = None) -> Shard | None:
        """Read and verify a shard, with all columns or some.

        A damaged shard is set aside. Returns None if it is damaged or missing; raises WorkError if
        the system cannot read it now.
        """
        try:
            shard = read_shard(path.read_bytes(), columns)
            if self._block_of(shard).name != path.name.rsplit(".", 2)[0]:
                raise ValueError("it is named as another block")
            return shard
        except FileNotFoundError:
            if not path.is_symlink():
                return None
            why = "it is a link that leads nowhere"
        except IsADirectoryError:
            why = "it is a folder"
        except OSError as error:
            # The system has failed, not the shard.
            raise WorkError(f"{path} cannot be read now: {error}") from None
        except ValueError as error:
            why = str(error).splitlines()[0]
        aside = path.with_suffix(ASIDE)
        self._unread.add(aside)
        try:
            path.replace(aside)
            done = f"it is set aside as {aside.name} and computed again"
        except OSError:  # another process was first, or the folder is a colleague's
            done = "it counts for nothing, and is computed again"
        log.warning("the shard %s is not what was written (%s); %s", path, why, done)
        return None

    def damage(self) -> dict[str, str]:
        """Return the shards that are not used and not measured again yet: file → what to do."""
        there = {path.stem for path in self.shards()}
        aside = {path for path in self._shards.glob(f"*{ASIDE}") if path.stem not in there}
        mine = {
            str(path): "it is not what was written, and what it held is not shown; run its "
            "experiment again, which measures what is missing, and delete it"
            for path in sorted(aside | self._unread)
        }
        mine |= self.mixed
        return mine | {path: why for each in self._others for path, why in each.damage().items()}

    def proofs(self, anew: bool = False) -> list[tuple[str, str]]:
        """List (name, SHA-256) of every file that `read` reads.

        Files are verified again only if their size or time has changed, or with `anew`.
        """
        note, known, found = self._verified, read_note(self._verified), {}
        for path in self.shards():
            with suppress(OSError):  # gone, or a link that leads nowhere
                stat = path.stat()
                state = [stat.st_size, stat.st_mtime_ns]
                if known.get(path.name, [])[:2] == state and not anew:
                    found[path.name] = known[path.name]
                    continue
            if (shard := self.shard(path)) is not None:
                found[path.name] = [*state, shard.digest]
        if found != known:
            with suppress(WorkError):  # a colleague's folder
                write_note(note, found | {name: known[name] for name in self.lost()})
        mine = [(name, str(digest)) for name, (*_, digest) in found.items()]
        return mine + [each for other in self._others for each in other.proofs(anew)]

    def lost(self) -> list[str]:
        """List the shards that existed once, and are neither there nor set aside."""
        known = map(self._shards.joinpath, read_note(self._verified))
        return [
            path.name
            for path in known
            if not (os.path.lexists(path) or os.path.lexists(path.with_suffix(ASIDE)))
        ]

    @property
    def _verified(self) -> Path:
        return self.folder / "verified.json"

    def abouts(self) -> list[dict[str, Any]]:
        """List the metadata of the shards.

        Shards of equal names hold the same outcomes, so only one of them is listed.
        """
        abouts = {}
        paths = (path for store in (self, *self._others) for path in store.shards())
        for path in (path for path in paths if str(path) not in self.mixed):
            with suppress(OSError, ValueError):  # damage is reported where the shard is read
                abouts[path.name] = shard_about(path)
        return list(abouts.values())

    def siblings(self) -> list[CellStore]:
        """List the folder's other cells with the same displayed model and benchmark."""
        here = self.folder.name[: -len(self.identity.key[:12])]
        found = []
        for folder in sorted(self.folder.parent.glob(f"{glob.escape(here)}*")):
            with suppress(OSError, ValueError):  # damage is reported where the cell is shown
                identity = CellIdentity.read((folder / "cell.json").read_bytes())
                if identity.key != self.identity.key:
                    found.append(CellStore(folder, identity))
        return found

    @cached_property
    def _after(self) -> str:
        """The second after the last outcome of `siblings`; empty without any.

        Later measurements get at least this date, whatever the machine's clock shows.
        """
        last = max((measured_last(other.abouts()) for other in self.siblings()), default="")
        if not last:
            return ""
        with suppress(OverflowError):  # the end of the calendar
            after = datetime.fromisoformat(last) + timedelta(seconds=1)
            return after.isoformat(timespec="seconds")
        return last

    def measured(self) -> int:
        """Count the documents that have any outcome."""
        return len(self.read(columns=["task", "doc"]).drop_duplicates(["task", "doc"]))

    def shards(self) -> list[Path]:
        """List the files of outcomes."""
        return sorted(self._shards.glob("*.parquet"))

    def seconds(self, documents: Mapping[str, Collection[tuple[str, int]]]) -> float:
        """Return the seconds of measuring: of each shard, the share of the rows that were needed.

        `documents` are those that were asked of each ablation.
        """
        total = 0.0
        for path in self.shards():
            try:
                shard = read_shard(path.read_bytes(), ["task", "doc", "ablation"])
            except (OSError, ValueError):  # said where outcomes are read
                continue
            rows = shard.table.to_pylist()
            needed = sum((r["task"], r["doc"]) in documents.get(r["ablation"], ()) for r in rows)
            total += float(shard.about["seconds"]) * needed / max(1, len(rows))
        return total

    def derived(self, state: str, name: str, kind: type[Derived]) -> Derived | None:
        """Read a stored record of the view `name`; None if none is stored for this state.

        `state` is a hash of everything that the record is derived from.
        """
        kept = read_note(self._derived(name, kind))
        if kept.get("state") != state:
            return None
        try:
            return kind.model_validate(kept.get("record"))
        except ValidationError:
            return None

    def keep(self, state: str, name: str, record: Record) -> None:
        """Store a record of the view `name` for `derived`, if the folder can be written.

        Records derived without some outcomes are not stored: deriving them again fills `mixed`.
        """
        if self.mixed:
            return
        note = {"state": state, "record": record.model_dump(mode="json")}
        with suppress(WorkError):
            write_note(self._derived(name, type(record)), note)

    def _derived(self, name: str, kind: type[Record]) -> Path:
        name_of_kind = kind.__name__.removesuffix("Record").lower()
        what = "" if kind is CellRecord else f".{name_of_kind}"
        return self.folder / "derived" / f"{view_file(name)}{what}.json"

    def receipt(self, destination: str) -> dict[str, str]:
        """Read the last receipt of a destination, as given to `add_receipt`."""
        found = read_note(self._receipt(destination))
        return found if {"record", "location"} <= set(found) else {}

    def add_receipt(self, destination: str, **receipt: str) -> None:
        """Write the receipt of what a destination has.

        It has the digest of a `record`, the `location` of its runs, the name of its `view`, and the
        name of its `place`.
        """
        write_note(self._receipt(destination), receipt)

    def _receipt(self, destination: str) -> Path:
        return self.folder / "receipts" / f"{destination[:32]}.json"

    def begin_search(self, command: Sequence[str]) -> None:
        """Record that a search measures the cell, which its findings show instead of a view.

        `command` is the search's command without the folder.
        """
        write_note(self._begun(command), {"command": list(command)})

    def end_search(self, command: Sequence[str]) -> None:
        """Record that a search has ended."""
        self._begun(command).unlink(missing_ok=True)
        with suppress(OSError):  # another search is at it, or none ever was
            self._begun(command).parent.rmdir()

    def begun_searches(self) -> list[list[str]]:
        """List the commands of the searches that measure the cell, or were stopped there."""
        notes = map(read_note, sorted(self.folder.glob("begun/*.json")))
        return [[str(word) for word in note.get("command", ())] for note in notes]

    def _begun(self, command: Sequence[str]) -> Path:
        return self.folder / "begun" / f"{content_hash(list(command))[:32]}.json"

    def places(self, *views: str) -> list[str]:
        """Return the names of the places that have or should have one of these views."""
        notes = map(read_note, sorted(self.folder.glob("receipts/*.json")))
        found = [note.get("place") for note in notes if note.get("view") in views]
        return list(dict.fromkeys(name for name in found if name))


def measured_last(abouts: Iterable[Mapping[str, Any]]) -> str:
    """Return the latest date of measuring in shards' metadata; empty without any."""
    last = ""
    for about in abouts:
        with suppress(ValueError):  # invalid dates are ignored
            if about.get("measured"):
                last = max(last, utc(str(about["measured"])))
    return last
