from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filelock import Timeout

from tracker.core.ablations import ablations_of
from tracker.core.config import CellRequest
from tracker.core.distribution import FORMAT, upgrade
from tracker.core.errors import ResultsError
from tracker.core.experiment import load_experiment
from tracker.core.extent import ALL, Extent, random_order
from tracker.core.records import CellRecord, RunIdentity
from tracker.core.views import View
from tracker.ledger.blocks import BLOCK, Block
from tracker.ledger.cells import CellStore
from tracker.ledger.shards import read_shard, shard_digest
from tracker.ledger.store import Ledger
from tracker.ledger.tables import cell_record

STRANGE = ["a/b::c", "a%2Fb", "*[x]?", "Größe", "dots.in.00001", ".hidden"]
NAMES = ("baseline", "layer:0", "layer:1")


def shards(cell) -> list[Path]:
    return sorted((cell.folder / "shards").glob("*.parquet"))


class TestShards:
    def test_what_is_written_is_read_back(self, cell, row) -> None:
        rows = [row(3), row(3, "layer:0", acc=0.0), row(5, acc=0.5)]
        cell.write(Block("arc_easy", 0), rows, {"provenance": {"torch": "2"}, "seconds": "1.5"})
        frame = cell.read().set_index(["doc", "ablation"])
        assert len(frame) == 3
        for written in rows:
            read = frame.loc[written["doc"], written["ablation"]]
            assert read["task"] == "arc_easy"
            assert read["metric/acc"] == written["metric/acc"]
            assert list(read["loglikelihoods"]) == [-1.5, -0.25]
            assert list(read["greedy"]) == [False, True]
            assert (read["gold"], read["choices"]) == (1, 2)
        assert frame.loc[3, "baseline"]["proxy_tokens"] == 5
        assert list(frame.loc[3, "baseline"]["angular_distance_sum"]) == [2.0] * 4
        assert frame.loc[3, "layer:0"]["relative_update_sum"] is None
        (path,) = shards(cell)
        assert set(frame["provenance"]) == {'{"torch": "2"}'}
        metadata = json.loads(pq.read_metadata(path).metadata[b"tracker"])
        assert metadata == {
            "format": FORMAT,
            "key": cell.identity.key,
            "task": "arc_easy",
            "provenance": {"torch": "2"},
            "seconds": "1.5",
            "digest": shard_digest(path.read_bytes()),
        }

    def test_the_digest_covers_every_byte(self, cell, row) -> None:
        cell.write(Block("arc_easy", 0), [row(3)], {})
        content = shards(cell)[0].read_bytes()
        stated = json.loads(pq.read_metadata(shards(cell)[0]).metadata[b"tracker"])["digest"]
        for place in range(0, len(content), 7):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            # Where the digest itself is hit, it is no longer the one that was stated.
            where = content.index(stated.encode())
            if where <= place < where + 64:
                assert stated.encode() not in changed
            else:
                assert shard_digest(bytes(changed)) != stated

    def test_only_the_wanted_blocks_and_columns(self, cell, fill) -> None:
        fill(cell, Block("arc_easy", 0), [0, 1], ["baseline"])
        fill(cell, Block("arc_easy", 1), [32], ["baseline"])
        fill(cell, Block("arc_easy", 2), [64], ["baseline"])
        one = cell.read([Block("arc_easy", 1)], columns=["doc"])
        assert list(one.columns) == ["doc"]
        assert list(one["doc"]) == [32]
        two = cell.read([Block("arc_easy", 0), Block("arc_easy", 2)])
        assert sorted(two["doc"]) == [0, 1, 64]
        assert sorted(cell.read()["doc"]) == [0, 1, 32, 64]
        assert not len(cell.read([]))

    def test_nothing_measured_is_an_empty_table(self, cell) -> None:
        assert not len(cell.read())
        assert list(cell.read(columns=["task", "doc"]).columns) == ["task", "doc"]

    def test_a_document_that_was_measured_twice_counts_once(self, cell, fill) -> None:
        block = Block("arc_easy", 0)
        fill(cell, block, [0, 1, 2], ["baseline"])
        fill(cell, block, [1, 2, 3], ["baseline", "layer:0"])
        assert len(shards(cell)) == 2
        frame = cell.read()
        assert sorted(zip(frame["doc"], frame["ablation"], strict=True)) == [
            (0, "baseline"),
            (1, "baseline"),
            (1, "layer:0"),
            (2, "baseline"),
            (2, "layer:0"),
            (3, "baseline"),
            (3, "layer:0"),
        ]

    def test_documents_that_come_one_by_one_are_all_kept(self, cell, fill) -> None:
        """A shard is named by what it holds: one that holds other documents replaces none."""
        for doc in range(3):
            fill(cell, Block("arc_easy", 0), [doc], ["baseline"])
        assert sorted(cell.read()["doc"]) == [0, 1, 2]
        assert len(shards(cell)) == 3

    def test_columns_that_tell_outcomes_apart_need_not_be_asked_for(self, cell, fill) -> None:
        fill(cell, Block("arc_easy", 0), [0, 1], NAMES[:2])
        fill(cell, Block("arc_easy", 0), [1, 2], NAMES[:2])
        for column in ("ablation", "doc", "task", "metric/acc"):
            frame = cell.read(columns=[column])
            assert (list(frame.columns), len(frame)) == ([column], 6)

    def test_the_same_documents_do_not_pile_up(self, cell, fill) -> None:
        for _ in range(2):
            fill(cell, Block("arc_easy", 0), [0, 1], ["baseline"])
        assert len(shards(cell)) == 1

    def test_a_metric_may_be_json(self, cell, row) -> None:
        values = [json.dumps([1, 0]), None]
        rows = [{**row(doc), "metric/f1": value} for doc, value in enumerate(values)]
        cell.write(Block("arc_easy", 0), rows, {})
        frame = cell.read().sort_values("doc")
        assert frame["metric/f1"].iloc[0] == "[1, 0]"
        assert frame["metric/f1"].isna().tolist() == [False, True]


class TestBlocks:
    def test_the_blocks_hold_every_document_once(self, cell) -> None:
        held = [cell.missing(block, ALL, NAMES[:1])[NAMES[:1]] for block in cell.blocks(ALL)]
        assert [doc for documents in held for doc in documents] == list(range(70))
        assert [len(documents) for documents in held] == [32, 32, 6]

    @pytest.mark.parametrize(("limit", "count"), [(1, 1), (32, 1), (33, 2), (70, 3), (999, 3)])
    def test_a_limit_needs_fewer(self, cell, limit: int, count: int) -> None:
        assert len(cell.blocks(Extent(limit=limit))) == count
        assert cell.counts(Extent(limit=limit)) == {"arc_easy": min(limit, 70)}

    def test_a_limit_is_per_task(self, ledger, model_identity, benchmark_identity) -> None:
        cell = ledger.cell(model_identity(), benchmark_identity({"a": 40, "b": 3}), {})
        assert cell.counts(Extent(limit=33)) == {"a": 33, "b": 3}
        assert cell.blocks(Extent(limit=33)) == [Block("a", 0), Block("a", 1), Block("b", 0)]

    @pytest.mark.parametrize("task", STRANGE)
    def test_strange_task_names(
        self, ledger, model_identity, benchmark_identity, fill, task: str
    ) -> None:
        benchmark = benchmark_identity({task: 2, "plain": 2})
        cell = ledger.cell(model_identity(), benchmark, {})
        for name in (task, "plain"):
            fill(cell, Block(name, 0), [0, 1], ["baseline"])
        for path in shards(cell):
            assert path.parent == cell.folder / "shards"
        assert list(cell.read([Block(task, 0)])["task"]) == [task] * 2
        assert cell.missing(Block(task, 0), ALL, ["baseline"]) == {}
        assert cell.is_complete(ALL, ["baseline"])
        with cell.lock(Block(task, 0)):
            assert list((cell.folder / "locks").iterdir())

    def test_quoted_names_stay_apart(self) -> None:
        assert len({Block(task, 0).name for task in STRANGE}) == len(STRANGE)


def documents_of(cell: CellStore, extent: Extent) -> list[int]:
    return sorted(cell.read_documents(extent, ["task", "doc", "ablation"])["doc"])


class TestSamples:
    SAMPLE = Extent(sample=40)

    def fill(self, cell, row, extent: Extent) -> None:
        for block in cell.blocks(extent):
            for names, documents in cell.missing(block, extent, NAMES[:1]).items():
                cell.write(block, [row(doc, name) for doc in documents for name in names], {})

    def test_it_takes_as_many_blocks_and_shards_as_first_documents(self, cell, row) -> None:
        blocks = cell.blocks(self.SAMPLE)
        assert len(blocks) == len(cell.blocks(Extent(limit=40))) == 2
        assert not {block.name for block in blocks} & {b.name for b in cell.blocks(ALL)}
        self.fill(cell, row, self.SAMPLE)
        assert len(shards(cell)) == 2
        assert cell.is_complete(self.SAMPLE, NAMES[:1])
        assert not cell.is_complete(Extent(limit=40), NAMES[:1])
        assert not cell.is_complete(self.SAMPLE, NAMES)
        assert documents_of(cell, self.SAMPLE) == sorted(
            random_order(1234, "arc_easy", range(70))[:40]
        )

    def test_a_larger_one_grows(self, cell, row) -> None:
        self.fill(cell, row, Extent(sample=32))
        (first, second) = cell.blocks(self.SAMPLE)
        assert cell.missing(first, self.SAMPLE, NAMES[:1]) == {}
        order = random_order(1234, "arc_easy", range(70))
        assert cell.missing(second, self.SAMPLE, NAMES[:1]) == {NAMES[:1]: order[32:40]}

    def test_another_seed_is_another_sample(self, cell, row) -> None:
        self.fill(cell, row, self.SAMPLE)
        other = Extent(sample=40, seed=7)
        assert not cell.is_complete(other, NAMES[:1])
        assert documents_of(cell, other) != documents_of(cell, self.SAMPLE)

    @pytest.mark.parametrize("before", [Extent(limit=40), Extent(sample=40, seed=7), SAMPLE])
    @pytest.mark.parametrize("after", [ALL, Extent(limit=50), Extent(sample=50), SAMPLE])
    def test_what_another_order_measured_is_not_measured_again(
        self, cell, row, before: Extent, after: Extent
    ) -> None:
        self.fill(cell, row, before)
        held = set(documents_of(cell, before))
        wanted = set(after.of("arc_easy", range(70)))
        lacking = [
            document
            for block in cell.blocks(after)
            for documents in cell.missing(block, after, NAMES[:1]).values()
            for document in documents
        ]
        assert sorted(lacking) == sorted(wanted - held)
        assert cell.is_complete(after, NAMES[:1]) is not bool(lacking)
        self.fill(cell, row, after)
        assert cell.is_complete(after, NAMES[:1])
        assert set(documents_of(cell, after)) == wanted
        assert sorted(cell.read()["doc"]) == sorted(held | wanted)

    def test_a_shard_of_it_is_believed_by_its_content(self, ledger, cell, row, tmp_path) -> None:
        self.fill(cell, row, self.SAMPLE)
        names = [path.name for path in shards(cell)]
        for path in shards(cell):
            elsewhere = tmp_path / "downloaded.parquet"
            path.replace(elsewhere)
            assert cell.adopt(elsewhere) in names
        assert cell.is_complete(self.SAMPLE, NAMES[:1])
        # Under the name of another block, or of another order, it is set aside.
        first, second = shards(cell)
        first.replace(first.with_name(second.name.replace(".00001.", ".00002.")))
        assert not cell.is_complete(self.SAMPLE, NAMES[:1])

    def test_each_task_of_a_group(self, ledger, model_identity, benchmark_identity) -> None:
        cell = ledger.cell(model_identity(), benchmark_identity({"a": 40, "b": 5, "c": 40}), {})
        assert cell.counts(Extent(sample=8)) == {"a": 8, "b": 5, "c": 8}
        wanted = cell.wanted(Extent(sample=8))
        assert set(wanted["a"]) != set(wanted["c"])

    def test_its_view_says_so(self, cell, row) -> None:
        self.fill(cell, row, self.SAMPLE)
        asked = CellRequest(model="m", benchmark="b", layers=(0,), sample=40)
        record = cell_record(cell, cell.views.ask(asked, "p"), lambda how, values: None)
        assert (record.n, record.sample_seed) == (40, 1234)
        (kept,) = cell.views.asked()
        assert kept.view.extent == self.SAMPLE
        # Another sample, and the first documents, are views beside it; a larger sample is not.
        for change in ({"sample": 50}, {"seed": 7}, {"sample": None, "limit": 40}):
            cell.views.ask(asked.model_copy(update=change), "p")
        views = [each.view for each in cell.views.asked()]
        assert [(view.sample, view.seed, view.limit) for view in views] == [
            (None, None, 40),
            (50, 1234, None),
            (40, 7, None),
        ]
        self.fill(cell, row, ALL)
        every = asked.model_copy(update={"sample": 200})
        record = cell_record(cell, cell.views.of(every), lambda how, values: None)
        assert cell.views.of(every).extent == ALL
        # All documents are all documents, in whatever order they came.
        assert (record.n, record.sample_seed, "n" in record.reasons) == (70, None, False)


class TestHalves:
    """A cell whose documents are half of a task's, under the numbers that they have in all."""

    NUMBERS = tuple(sorted(random_order(1234, "arc_easy", range(140))[70:]))

    @pytest.fixture
    def cell(self, ledger, model_identity, benchmark_identity) -> CellStore:
        half = {"part": "test", "seed": 1234, "of": 140}
        return ledger.cell(model_identity(), benchmark_identity(task={"half": half}), {})

    def test_its_documents_are_written_and_read(self, ledger, cell, row) -> None:
        assert cell.counts() == {"arc_easy": 70}
        assert cell.wanted(Extent(limit=3)) == {"arc_easy": self.NUMBERS[:3]}
        sample, seen = Extent(sample=40), set()
        for extent in (sample, Extent(limit=40), Extent(sample=40, seed=7), ALL):
            TestSamples().fill(cell, row, extent)
            wanted = set(extent.of("arc_easy", self.NUMBERS))
            assert set(documents_of(cell, extent)) == wanted
            assert cell.is_complete(extent, NAMES[:1])
            seen |= wanted
            assert sorted(cell.read()["doc"]) == sorted(seen), "none twice"
        assert wanted == set(self.NUMBERS)
        order = random_order(1234, "arc_easy", range(140))
        assert documents_of(cell, sample) == sorted(order[70:110])
        (found,) = Ledger(ledger.root).cells()
        assert found.identity == cell.identity

    def test_a_document_of_the_other_half_is_none_of_it(self, cell, row, caplog) -> None:
        foreign = min(set(range(140)) - set(self.NUMBERS))
        cell.write(Block("arc_easy", 0), [row(foreign)], {})
        cell.write(Block("arc_easy", 0), [row(self.NUMBERS[0])], {})
        assert list(cell.read()["doc"]) == [self.NUMBERS[0]]
        assert "the benchmark has no such document" in caplog.text


class TestMissing:
    def test_before_and_after(self, cell, fill) -> None:
        block = Block("arc_easy", 2)
        assert cell.missing(block, ALL, NAMES) == {NAMES: list(range(64, 70))}
        fill(cell, block, range(64, 70), NAMES)
        assert cell.missing(block, ALL, NAMES) == {}
        # The neighbours are not touched.
        assert cell.missing(Block("arc_easy", 0), ALL, NAMES) == {NAMES: list(range(BLOCK))}

    def test_a_larger_limit_asks_for_the_new_documents_only(self, cell, fill) -> None:
        block = Block("arc_easy", 0)
        fill(cell, block, range(10), NAMES)
        assert cell.missing(block, Extent(limit=10), NAMES) == {}
        assert cell.missing(block, Extent(limit=12), NAMES) == {NAMES: [10, 11]}
        assert cell.missing(block, Extent(limit=5), NAMES) == {}

    def test_more_ablations_ask_for_the_new_ones_only(self, cell, fill) -> None:
        block = Block("arc_easy", 0)
        fill(cell, block, range(4), NAMES)
        more = ("layer:2", *NAMES, "layer:3")
        assert cell.missing(block, Extent(limit=4), more) == {("layer:2", "layer:3"): [0, 1, 2, 3]}

    def test_what_is_no_rectangle(self, cell, fill) -> None:
        block = Block("arc_easy", 0)
        fill(cell, block, [0, 1, 2], ["baseline"])
        fill(cell, block, [1], ["layer:0", "layer:1"])
        fill(cell, block, [2], ["layer:1"])
        assert cell.missing(block, Extent(limit=4), NAMES) == {
            ("layer:0", "layer:1"): [0],
            ("layer:0",): [2],
            NAMES: [3],
        }


class TestComplete:
    def test_needs_every_document_and_ablation(self, cell, fill) -> None:
        assert not cell.is_complete(ALL, NAMES)
        fill(cell, Block("arc_easy", 0), range(32), NAMES)
        assert cell.is_complete(Extent(limit=32), NAMES)
        assert cell.is_complete(Extent(limit=10), NAMES)
        assert not cell.is_complete(Extent(limit=33), NAMES)
        assert not cell.is_complete(Extent(limit=32), [*NAMES, "layer:2"])
        fill(cell, Block("arc_easy", 1), range(32, 64), NAMES)
        fill(cell, Block("arc_easy", 2), range(64, 70), NAMES[:2])
        assert not cell.is_complete(ALL, NAMES)
        assert cell.is_complete(ALL, NAMES[:2])
        fill(cell, Block("arc_easy", 2), range(64, 70), NAMES[2:])
        assert cell.is_complete(ALL, NAMES)

    def test_a_document_that_was_measured_twice_does_not_stand_for_another(
        self, cell, fill
    ) -> None:
        fill(cell, Block("arc_easy", 0), [0], ["baseline"])
        fill(cell, Block("arc_easy", 0), [0, 1], ["baseline"])
        assert not cell.is_complete(Extent(limit=3), ["baseline"])

    def test_every_task_must_be_complete(
        self, ledger, model_identity, benchmark_identity, fill
    ) -> None:
        cell = ledger.cell(model_identity(), benchmark_identity({"a": 2, "b": 3}), {})
        fill(cell, Block("b", 0), range(3), ["baseline"])
        assert not cell.is_complete(ALL, ["baseline"])
        fill(cell, Block("a", 0), range(2), ["baseline"])
        assert cell.is_complete(ALL, ["baseline"])


EXHAUST = """
import os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tracker.core.errors import TrackerError
from tracker.ledger.store import Ledger

(cell,) = Ledger(Path(sys.argv[1])).cells()
cell.read()  # Everything is imported before the handles are gone.
paths = list((cell.folder / "shards").iterdir())
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    cell.shard(paths[0])
except (OSError, TrackerError) as error:
    print(error)
"""


class TestUnreadableShards:
    @pytest.mark.parametrize("kept", [0, 3, 500, -1])
    def test_a_truncated_one_is_set_aside_and_computed_again(
        self, cell, fill, caplog, kept: int
    ) -> None:
        block = Block("arc_easy", 0)
        fill(cell, block, range(32), NAMES)
        fill(cell, Block("arc_easy", 1), range(32, 64), NAMES)
        broken = shards(cell)[0]
        broken.write_bytes(broken.read_bytes()[:kept])
        with caplog.at_level(logging.WARNING):
            assert cell.missing(block, ALL, NAMES) == {NAMES: list(range(32))}
        (record,) = caplog.records
        assert broken.name in record.getMessage()
        assert "set aside" in record.getMessage()
        assert not broken.exists()
        assert broken.with_suffix(".aside").is_file()
        assert not cell.is_complete(Extent(limit=64), NAMES)
        assert sorted(set(cell.read()["doc"])) == list(range(32, 64))
        # Once only; then it is measured again.
        assert len(caplog.records) == 1
        fill(cell, block, range(32), NAMES)
        assert cell.is_complete(Extent(limit=64), NAMES)

    # Was: the loser of the race gets a bare FileNotFoundError.
    def test_another_process_that_sets_it_aside_first_is_no_failure(
        self, cell, fill, monkeypatch
    ) -> None:
        """A race of two readers cannot be provoked: the other one acts inside our read."""
        fill(cell, Block("arc_easy", 0), [0], ["baseline"])
        (path,) = shards(cell)
        path.write_bytes(b"broken")

        def read(*arguments):
            try:
                return read_shard(*arguments)
            finally:
                path.rename(path.with_suffix(".aside"))

        monkeypatch.setattr("tracker.ledger.cells.read_shard", read)
        assert not len(cell.read())

    def test_one_that_cannot_be_moved_counts_for_nothing_where_it_is(
        self, cell, fill, caplog
    ) -> None:
        """As in a colleague's folder, which is read and not written."""
        fill(cell, Block("arc_easy", 0), [0], ["baseline"])
        (path,) = shards(cell)
        path.write_bytes(b"broken")
        (path.with_suffix(".aside") / "in the way").mkdir(parents=True)
        assert not len(cell.read())
        assert path.exists()
        (record,) = caplog.records
        assert record.getMessage().startswith(f"the shard {path} is not what was written (")
        assert record.getMessage().endswith("); it counts for nothing, and is computed again")

    # Was: any OSError sets the shard aside, so "too many open files" or a
    # passing network file system error throws good measurements away. Corruption has no errno.
    def test_a_process_without_file_handles_throws_no_results_away(self, cell, fill) -> None:
        fill(cell, Block("arc_easy", 0), range(32), NAMES)
        subprocess.run([sys.executable, "-c", EXHAUST, str(cell.folder.parents[1])], check=True)
        assert len(shards(cell)) == 1
        assert cell.is_complete(Extent(limit=32), NAMES)


HOLD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tracker.ledger.blocks import Block
from tracker.ledger.store import Ledger

(cell,) = Ledger(Path(sys.argv[1])).cells()
with cell.lock(Block("arc_easy", 1)):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestLocks:
    def test_two_processes_do_not_compute_the_same_block(self, cell) -> None:
        root = str(cell.folder.parents[1])
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(Timeout):
                cell.lock(Block("arc_easy", 1)).acquire(timeout=0)
            with cell.lock(Block("arc_easy", 0)).acquire(timeout=0):
                pass
        finally:
            # Killed, not ended: its lock must not outlive it.
            other.kill()
            other.communicate()
        with cell.lock(Block("arc_easy", 1)).acquire(timeout=5):
            pass


class TestLedger:
    def test_nothing_is_made_before_create(self, tmp_path) -> None:
        root = tmp_path / "results"
        ledger = Ledger(root)
        assert not root.exists()
        assert ledger.cells() == []
        ledger.create()
        assert json.loads((root / "tracker.json").read_text()) == {"format": FORMAT}
        ledger.create()
        assert Ledger.existing(root).root == root

    def test_what_is_no_results_folder(self, tmp_path) -> None:
        with pytest.raises(ResultsError) as caught:
            Ledger.existing(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path} is not a results folder. `tracker run EXPERIMENT.yaml --results "
            f"{tmp_path}` makes one."
        )
        with pytest.raises(ResultsError, match="not a results folder"):
            Ledger.existing(tmp_path / "nowhere")
        (tmp_path / "file").write_text("")
        with pytest.raises(ResultsError, match="is a file"):
            Ledger(tmp_path / "file")
        long = tmp_path / ("long" * 100)
        with pytest.raises(ResultsError) as caught:
            Ledger(long)
        assert str(caught.value) == f"{long} cannot be used: File name too long"

    @pytest.mark.parametrize(
        ("other", "why", "what"),
        [
            (FORMAT + 1, "a newer tracker", upgrade()),
            (FORMAT - 1, "an older tracker", "Read it with that one, or choose another --results."),
        ],
    )
    def test_another_format_is_refused(self, ledger, other: int, why: str, what: str) -> None:
        (ledger.root / "tracker.json").write_text(json.dumps({"format": other}))
        for opened in (Ledger, Ledger.existing):
            with pytest.raises(ResultsError, match=f"written by {why}") as caught:
                opened(ledger.root)
            assert what in str(caught.value)
            assert caught.value.exit_code == 2

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": "x"}', "\udcff"])
    def test_a_damaged_format_is_refused(self, ledger, text: str) -> None:
        path = ledger.root / "tracker.json"
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ResultsError, match=r"tracker\.json is damaged"):
            Ledger(ledger.root)

    def test_a_cell_is_made_once(self, ledger, model_identity, benchmark_identity) -> None:
        first = ledger.cell(model_identity(), benchmark_identity(), {"numpy": "1"})
        assert first.folder.name == f"SmolLM2--arc_easy--{first.identity.key[:12]}"
        again = ledger.cell(model_identity(name="renamed"), benchmark_identity(), {"numpy": "2"})
        assert first.identity.provenance == {"numpy": "1"}
        assert again.identity.key == first.identity.key
        other = ledger.cell(model_identity(fingerprint="0" * 64), benchmark_identity(), {})
        assert other.folder != first.folder
        assert {c.folder for c in ledger.cells()} >= {first.folder, other.folder}

    def test_an_identity_is_read_back_whole(
        self, ledger, model_identity, benchmark_identity
    ) -> None:
        model = model_identity(revision="abc", name="Größe")
        benchmark = benchmark_identity(
            {"a/b::c": 5, "d": 6}, {"acc": "mean", "f1": "f1"}, weight_by_size=False, seed=7
        )
        made = ledger.cell(model, benchmark, {"torch": "2.6"})
        (read,) = Ledger.existing(ledger.root).cells()
        assert read.folder == made.folder
        assert (read.identity.model, read.identity.benchmark) == (model, benchmark)
        assert read.identity == made.identity

    def test_cells_are_sorted(self, ledger, model_identity, benchmark_identity) -> None:
        for model, benchmark in (("b", "x"), ("a", "y"), ("a", "x")):
            ledger.cell(
                model_identity(name=model, fingerprint=model),
                benchmark_identity(name=benchmark),
                {},
            )
        found = [(c.identity.model.name, c.identity.benchmark.name) for c in ledger.cells()]
        assert found == [("a", "x"), ("a", "y"), ("b", "x")]

    @pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
    def test_a_damaged_cell_is_refused(self, ledger, cell, text: str) -> None:
        (cell.folder / "cell.json").write_text(text)
        ((folder, what),) = ledger.contents().damaged.items()
        assert folder == str(cell.folder)
        assert "cell.json cannot be used" in what
        assert ledger.cells() == []
        assert ledger.find("0" * 64) is None

    def test_a_cell_under_the_name_of_another_is_refused(self, ledger, cell) -> None:
        moved = cell.folder.rename(cell.folder.with_name("SmolLM2--arc_easy--0123456789ab"))
        assert ledger.contents().damaged == {
            str(moved): "its cell.json cannot be used (it belongs to another folder); run its "
            "experiment again, which writes it anew and measures nothing twice, or move the "
            "folder away"
        }

    def test_a_damaged_request_keeps_nothing_else_away(self, ledger, cell) -> None:
        for removed in ((), (1,), (2,)):
            request = CellRequest(model="m", benchmark="b", layers=(0,), removed=removed)
            cell.views.ask(request, "project")
        path = cell.folder / "requests" / "without-1.json"
        path.write_text("[]")
        found = ledger.contents()
        assert [asked.view.removed for _, asked in found.views] == [(), (2,)]
        assert found.damaged == {
            str(path): "it is damaged (it holds no JSON object); delete it and run its experiment "
            "again (nothing is measured twice)"
        }

    def test_locks_stand_apart_one_a_cell(self, ledger, cell) -> None:
        """Whoever copies or verifies a folder leaves them out."""
        assert {path.name for path in ledger.root.iterdir()} == {"cells", "locks", "tracker.json"}
        names = {path.name for path in (ledger.root / "locks").iterdir()}
        assert names == {f"{cell.folder.name}.lock"}

    def test_a_request_is_found_again(self, ledger, cell) -> None:
        key = "0123456789abcdef" * 4
        assert ledger.find(key) is None
        ledger.remember(key, cell)
        assert Ledger(ledger.root).find(key).folder == cell.folder
        assert ledger.find("f" * 64) is None

    def test_a_request_whose_cell_was_moved_away_is_new(self, ledger, cell, tmp_path) -> None:
        ledger.remember("0" * 64, cell)
        cell.folder.rename(tmp_path / "elsewhere")
        assert ledger.find("0" * 64) is None

    def test_experiments_are_kept_word_for_word(self, ledger) -> None:
        text = "# größe\r\nmethod: grid\n"
        ledger.keep_experiment("b.yaml", "x: 1\n")
        ledger.keep_experiment("a.yaml", text)
        kept = ledger.contents().experiments
        assert list(kept.items()) == [("a.yaml", text), ("b.yaml", "x: 1\n")]
        assert (ledger.root / "experiments" / "a.yaml").read_bytes() == text.encode()

    def test_an_experiment_that_is_not_what_was_run_is_named(self, ledger) -> None:
        ledger.keep_experiment("a.yaml", "x: 1\n")
        ledger.keep_experiment("b.yaml", "x: 1\n")
        edited, binary = (ledger.root / "experiments" / name for name in ("a.yaml", "b.yaml"))
        edited.write_text("x: 2\n")
        binary.write_bytes(b"\xff")
        (ledger.root / "experiments" / "b.yaml.sha256").unlink()
        found = ledger.contents()
        assert found.experiments == {}
        assert found.damaged == {
            str(edited): "it is not the text that was run: edited, or damaged; run it again, or "
            "delete it",
            str(binary): "it is no UTF-8 text; run it again, or delete it",
        }

    def test_a_folder_that_can_be_made_is_not_refused(self, tmp_path) -> None:
        for root in (tmp_path, tmp_path / "new" / "results"):
            Ledger(root).refuse_unwritable()
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_under_a_file_is_refused(self, tmp_path) -> None:
        (tmp_path / "file").write_text("")
        root = tmp_path / "file" / "results"
        with pytest.raises(ResultsError) as caught:
            Ledger(root).refuse_unwritable()
        assert str(caught.value) == f"{root} cannot be made: {tmp_path / 'file'} is a file"

    @pytest.mark.skipif(not hasattr(os, "setresuid"), reason="nobody else can be played")
    def test_a_folder_that_is_not_ones_own_is_refused(self) -> None:
        """The administrator may write everywhere: for a moment, somebody else asks."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o555)
            root, me = Path(folder) / "results", os.getuid()
            ledger = Ledger(root)
            if me == 0:
                os.setresuid(65534, 65534, 0)
            try:
                with pytest.raises(ResultsError) as caught:
                    ledger.refuse_unwritable()
            finally:
                if me == 0:
                    os.setresuid(0, 0, 0)
            whose = Path(folder).owner()
        said = f"{root} cannot be written: {folder} is {whose}'s, and you may not write it"
        assert str(caught.value) == said


class TestNotes:
    def test_what_was_asked_is_recalled(self, cell) -> None:
        assert cell.views.asked() == []
        request = CellRequest(
            model="m", benchmark="b", layers=(0, 3), limit=5, metric="acc", num_fewshot=2
        )
        cell.views.ask(request, "first")
        assert cell.views.ask(request, "project") == cell.views.of(request)
        (asked,) = cell.views.asked()
        assert (asked.view, asked.project) == (cell.views.of(request), "project")
        runs = (RunIdentity(layer=0), RunIdentity(layer=3))
        assert asked.view == View(metric="acc", limit=5, runs=runs)

    def test_runs_of_one_view_add_up_one_by_one(self, cell) -> None:
        """Was: layers, components and spans were united axis by axis, and the runs of their product
        that nobody had asked for were missing for ever."""
        common = {"model": "m", "benchmark": "b", "limit": 5}
        cell.views.ask(CellRequest(**common, layers=(3, 0), components=("mlp",)), "first")
        cell.views.ask(CellRequest(**common, layers=(1,), spans=(3, 1), metric="acc"), "second")
        (asked,) = cell.views.asked()
        assert asked.project == "second"
        assert (asked.view.limit, asked.view.metric) == (5, "acc")
        assert [run.label() for run in asked.view.runs] == [
            "layer 1", "layers 1–3", "mlp 0", "mlp 3",
        ]  # fmt: skip

    def test_the_files_of_two_experiments_ask_for_what_they_say(
        self, ledger, model_identity, benchmark_identity
    ) -> None:
        """Was: 327 runs, of which 158 are never measured."""
        cell = ledger.cell(model_identity(layers=30), benchmark_identity(), {})
        for name, runs in (("spans", 109), ("sublayers", 169)):
            path = Path(__file__).parents[2] / f"experiments/{name}.yaml"
            (request,) = load_experiment(path)[0].cells()
            assert len(cell.views.ask(request, "project").runs) == runs
        # The 30 whole layers are in both files.
        assert runs == 109 + 90 - 30

    def test_two_experiments_are_complete_when_each_is_measured(self, cell, fill) -> None:
        common = {"model": "m", "benchmark": "b", "limit": 3}
        for request in (
            CellRequest(**common, layers=(0, 1, 2, 3), spans=(1, 2)),
            CellRequest(**common, layers=(0, 1, 2, 3), components=("layer", "mlp")),
        ):
            names = [ablation.name for ablation in ablations_of(request, 4)]
            fill(cell, Block("arc_easy", 0), range(3), names)
            view = cell.views.ask(request, "project")
            record = cell_record(cell, view, lambda how, values: 0.0)
            assert record.is_complete
        assert len(record.runs) == 7 + 4

    def test_views_are_kept_apart_with_the_intact_model_first(
        self, ledger, model_identity, benchmark_identity
    ) -> None:
        cell = ledger.cell(model_identity(layers=201), benchmark_identity(), {})
        beneath = [(3, 17), (), (3,), tuple(range(200))]
        for removed in beneath:
            request = CellRequest(model="m", benchmark="b", layers=(1,), removed=removed)
            cell.views.ask(request, "project")
        assert [asked.view.removed for asked in cell.views.asked()] == sorted(beneath)
        names = {path.name for path in (cell.folder / "requests").iterdir()}
        assert {"intact.json", "without-3.json", "without-3-17.json"} < names

    def test_metrics_are_views_of_their_own(
        self, ledger, model_identity, benchmark_identity
    ) -> None:
        """Was: the last metric that was asked for replaced the others."""
        metrics = ("acc", "acc_norm", "exact_match,a/b", "..")
        cell = ledger.cell(
            model_identity(), benchmark_identity(metrics=dict.fromkeys(metrics, "mean")), {}
        )
        for layer, metric in enumerate((*metrics[1:], None)):
            request = CellRequest(model="m", benchmark="b", layers=(layer,), metric=metric)
            cell.views.ask(request, "project")
        assert [a.view.metric for a in cell.views.asked()] == ["acc", "..", "acc_norm", metrics[2]]
        assert [[r.layer for r in a.view.runs] for a in cell.views.asked()] == [[3], [2], [0], [1]]
        assert {path.name for path in (cell.folder / "requests").iterdir()} == {
            "intact.json",
            "intact--...json",
            "intact--acc_norm.json",
            "intact--exact_match,a%2Fb.json",
        }

    def test_processes_that_ask_at_once_lose_nothing(
        self, ledger, model_identity, benchmark_identity
    ) -> None:
        cell = ledger.cell(model_identity(layers=40), benchmark_identity(), {})

        def ask(layer: int) -> None:
            request = CellRequest(model="m", benchmark="b", layers=(layer,))
            CellStore(cell.folder, cell.identity).views.ask(request, "project")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(40)))
        assert [run.layer for run in cell.views.asked()[0].view.runs] == list(range(40))

    def test_runs_that_the_model_is_too_small_for_are_none(
        self, ledger, model_identity, benchmark_identity
    ) -> None:
        cell = ledger.cell(model_identity(layers=1), benchmark_identity(), {})
        view = cell.views.ask(
            CellRequest(model="m", benchmark="b", layers=(0,), spans=(2,)), "project"
        )
        assert view.runs == ()
        assert [asked.view for asked in cell.views.asked()] == [view]

    def test_a_record_is_recalled_for_the_state_that_it_follows_from(self, cell, fill) -> None:
        fill(cell, Block("arc_easy", 0), range(3), NAMES)
        request = CellRequest(model="m", benchmark="b", layers=(0, 1), limit=3)
        record = cell_record(cell, cell.views.ask(request, "project"), lambda how, values: 0.0)
        assert cell.derived("state", record.view, CellRecord) is None
        cell.keep("state", record.view, record)
        assert cell.derived("state", record.view, CellRecord) == record
        assert cell.derived("another", record.view, CellRecord) is None
        assert cell.derived("state", "another", CellRecord) is None

    def test_receipts_are_kept_apart(self, cell) -> None:
        assert cell.receipt("mlflow") == {}
        cell.add_receipt("mlflow", "1", "http://one")
        cell.add_receipt("wandb", "2", "http://two")
        cell.add_receipt("mlflow", "3", "http://three")
        assert cell.receipt("mlflow") == {"record": "3", "location": "http://three"}
        assert cell.receipt("wandb") == {"record": "2", "location": "http://two"}

    # Was: bare JSONDecodeError, KeyError or ValidationError.
    @pytest.mark.parametrize("text", ["", "{", "{}"])
    def test_a_damaged_note_is_a_clear_error_or_is_ignored(self, ledger, cell, text: str) -> None:
        """What can be made again need not stop anyone, but no traceback may reach the user."""
        key = "0" * 64
        ledger.remember(key, cell)
        cell.views.ask(CellRequest(model="m", benchmark="b", layers=(0,)), "project")
        cell.add_receipt("mlflow", "1", "there")
        for path, read in (
            (next((ledger.root / "index").iterdir()), lambda: ledger.find(key)),
            (cell.folder / "requests" / "intact.json", cell.views.asked),
            (next((cell.folder / "receipts").iterdir()), lambda: cell.receipt("mlflow")),
        ):
            path.write_text(text)
            with contextlib.suppress(ResultsError):
                assert not read()
        request = CellRequest(model="m", benchmark="b", layers=(1,))
        assert cell.views.ask(request, "project") == cell.views.of(request)
        assert cell.views.asked()[0].view == cell.views.of(request)
