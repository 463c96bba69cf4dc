"""What a study observed of a cell's documents besides outcomes: arrays, a row a document.

They stand in the cell's folder as `observed/KIND/TASK.NUMBER.parquet`, a block of documents a file,
each with its digest. The kind names what was observed and how: another way is another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tracker.core.distribution import FORMAT
from tracker.ledger.blocks import Block
from tracker.ledger.files import write_bytes
from tracker.ledger.shards import read_shard, shard_file

Arrays = Mapping[str, NDArray[np.float64]]
"""Name → figures of one document, of the same shape for every document."""


def write_observations(
    folder: Path, kind: str, block: Block, observed: Mapping[int, Arrays]
) -> None:
    """Keep what was observed of a block in a cell's folder: document → arrays."""
    first = next(iter(observed.values()))
    table = pa.table(
        {
            "doc": list(observed),
            **{
                name: [np.ravel(arrays[name]).tolist() for arrays in observed.values()]
                for name in first
            },
        }
    )
    shapes = {name: list(np.shape(array)) for name, array in first.items()}
    about = {"format": FORMAT, "task": block.task, "shapes": shapes}
    write_bytes(_path(folder, kind, block), shard_file(table, about))


def read_observations(folder: Path, kind: str, block: Block) -> dict[int, Arrays]:
    """Read what is kept of a block: document → arrays.

    Nothing where there is none, or not what was written: it is observed again.
    """
    try:
        shard = read_shard(_path(folder, kind, block).read_bytes())
    except (OSError, ValueError):
        return {}
    shapes, columns = shard.about["shapes"], shard.table.to_pydict()
    return {
        doc: {name: np.reshape(columns[name][row], shape) for name, shape in shapes.items()}
        for row, doc in enumerate(columns["doc"])
    }


def _path(folder: Path, kind: str, block: Block) -> Path:
    return folder / "observed" / kind / f"{block.name}.parquet"
