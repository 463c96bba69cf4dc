"""Handing blocks out: what a cluster cannot be made to do on purpose, with a worker in-process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from filelock import Timeout

from tests.helpers.handout import Desk
from tests.helpers.runs import arc
from tracker.core.extent import random_order
from tracker.executors.handout import ATTEMPTS
from tracker.ledger.blocks import BLOCK, Block
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger

DOCUMENTS = BLOCK + 8


@pytest.fixture
def desk(tiny_llama, experiment, tmp_path, one_thread):
    data = arc(tmp_path / "data", DOCUMENTS)

    def make(*benchmarks: str, **settings: object) -> Desk:
        model = tmp_path / "tiny-llama"
        file = experiment(model, benchmark=list(benchmarks), data=str(data), **settings)
        return Desk(file, tmp_path / "results")

    tiny_llama()
    return make


def test_what_is_handed_out_comes_back(desk):
    found = desk("arc_easy", "arc_challenge")
    found.finish()
    assert found.handout.ended
    assert found.handout.models_loaded == 1
    assert all(isinstance(end, CellStore) for end in found.ends.values())
    assert found.heard.counted == found.heard.expected == 2 * DOCUMENTS * 3 * 5


def test_of_a_sample_no_more_is_handed_out(desk):
    """As many tasks as for the first documents: one to open the cell, and one a block."""
    found = desk("arc_easy", limit=None, sample=BLOCK + 2)
    tasks = 0
    while task := found.next():
        found.do(task)
        tasks += 1
    assert tasks == 3
    assert found.heard.counted == found.heard.expected == (BLOCK + 2) * 3 * 5
    (store,) = Ledger(found.results).cells()
    assert set(store.read()["doc"]) == set(
        random_order(1234, "arc_easy", range(DOCUMENTS))[: BLOCK + 2]
    )


def test_of_very_many_ablations_a_block_comes_in_portions(desk, monkeypatch):
    """Was: 32 documents under 465 ablations were written after hours, or never."""
    monkeypatch.setattr("tracker.ledger.blocks.PORTION", 100)
    found, tasks = desk("arc_easy"), 0
    while task := found.next():
        found.do(task)
        tasks += 1
    assert tasks == 1 + 2 + 1, "of 32 documents and 5 ablations 20 and 12; and 8"
    assert found.handout.ended
    assert found.heard.counted == found.heard.expected == DOCUMENTS * 3 * 5
    (store,) = Ledger(found.results).cells()
    assert len(store.shards()) == 3
    assert len(store.read()) == DOCUMENTS * 5


def test_documents_that_kill_their_workers_fail_their_cell_alone(desk):
    found = desk("arc_easy", "arc_challenge")
    deaths = 0
    while task := found.next():
        if task.cell.request.benchmark == "arc_easy" and task.block and task.block.number == 1:
            found.opened = None
            found.handout.lost(task, "worker 1", "out of memory", workers=1)
            deaths += 1
        else:
            found.do(task)
    assert deaths == ATTEMPTS
    assert str(found.ends["arc_easy"]) == (
        f"{ATTEMPTS} workers died over the same documents of arc_easy; the last: out of memory"
    )
    assert isinstance(found.ends["arc_challenge"], CellStore)
    # The other block was measured, and is kept.
    _, easy = Ledger(found.results).cells()
    assert len(easy.read()) == BLOCK * 5


def test_a_block_that_another_process_is_at_is_left_to_it(desk):
    found = desk("arc_easy")
    found.do(found.next())
    (store,) = Ledger(found.results).cells()
    lock = store.lock(Block("arc_easy", 0))
    lock.acquire()
    found.do(found.next())
    assert found.next() is None
    assert found.next() is None
    assert not found.handout.ended
    assert sum("another process is measuring the rest" in line for line in found.heard.lines) == 1
    lock.release()
    task = found.next()
    assert task.block == Block("arc_easy", 0)
    with pytest.raises(Timeout):
        store.lock(task.block).acquire(timeout=0)
    found.handout.close()
    found.finish()
    assert found.handout.ended


def test_workers_that_see_other_weights_are_refused(desk):
    found = desk("arc_easy")
    first, second = found.next(), found.next()
    assert first.block is second.block is None
    facts, fresh, _ = found.worker.open(first.cell.job.requests)
    found.handout.opened(first, facts, fresh)
    other = facts.model.model_copy(update={"fingerprint": "another"})
    found.handout.opened(second, replace(facts, model=other), True)
    assert "do not all see the same model" in str(found.ends["arc_easy"])


def test_what_the_self_check_says_is_said_once(desk):
    found = desk("arc_easy")
    found.do(found.next())
    while task := found.next():
        shards, _ = found.worker.measure(task.block.task, task.missing, task.whole)
        found.handout.measured(task, shards, ["less sharing"])
    assert found.heard.lines.count("less sharing") == 1


def test_nobody_is_left(desk):
    found = desk("arc_easy", "arc_challenge")
    found.do(found.next())
    found.handout.give_up("the cluster is gone")
    assert {str(end) for end in found.ends.values()} == {"the cluster is gone"}
    assert found.handout.ended
