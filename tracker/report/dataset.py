"""Write and read results as a Hugging Face data set: Parquet files and a card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tracker.ledger.files import write_atomically, write_text
from tracker.report.evaluations import Decide
from tracker.report.frames import document_frames, layer_frame
from tracker.schema.errors import ResultsError, first_line
from tracker.schema.records import CellRecord
from tracker.schema.text import escape_markdown
from tracker.schema.text_templates import open_templates

RECORDS_FILE = "measurements.parquet"
"""File with one row per model and benchmark, whose column `record` has the record as JSON."""
DOCUMENTS_FILE = "documents.parquet"
"""File with one row per document and run; absent if no outcomes may be published."""
_MAX_BYTES = 500_000_000
"""Maximum number of decompressed bytes that are read of such a file."""


def write_dataset(
    cells: Sequence[CellRecord], path: Path, decide: Decide, with_private: bool = False
) -> list[Path]:
    """Write all results as a folder that `datasets.load_dataset` reads.

    Args:
        cells: Results of each model and benchmark.
        path: The folder.
        decide: Function that reads the outcomes of the documents of a benchmark.
        with_private: Whether to write the texts of documents that are not from the hub or a
            package.

    Returns:
        The paths of the files.
    """
    from huggingface_hub import DatasetCardData

    outcomes = ((cell, decisions) for cell in cells if (decisions := decide(cell)))
    documents = pd.concat(document_frames(outcomes, with_private, only_changed=False))
    frames = {"changes": _change_frame(cells), "measurements": _record_frame(cells)}
    frames |= {"documents": documents} if len(documents) else {}
    files = {name: path / f"{name}.parquet" for name in frames}
    for name, frame in frames.items():
        write_atomically(files[name], partial(frame.to_parquet, index=False))
    configs = [
        {"config_name": name, "data_files": file.name, "default": name == "changes"}
        for name, file in files.items()
    ]
    head = DatasetCardData(pretty_name="Layer profiles", tags=["layer-tracker"], configs=configs)
    environment = open_templates("tracker.report", keep_trailing_newline=True)
    environment.filters["markdown"] = escape_markdown
    text = environment.get_template("dataset.md.j2").render(cells=cells, files=files)
    write_text(path / "README.md", f"---\n{head.to_yaml()}\n---\n\n{text}")
    return [path / "README.md", *files.values()]


def _change_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Return the data frame of all measured runs for a data set.

    To the columns of `layer_frame`, the function adds the change's name, the date and the package
    versions.
    """
    frame, pairs = layer_frame(cells), [(cell, run) for cell in cells for run in cell.runs]
    frame.insert(0, "change", [run.ablation for _, run in pairs])
    frame["measured"] = [cell.measured for cell, _ in pairs]
    frame["provenance"] = [json.dumps(cell.provenance, sort_keys=True) for cell, _ in pairs]
    return frame


def _record_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Build a data frame with one row per record: its title, and the record as JSON."""
    records = [json.dumps(cell.model_dump(mode="json")) for cell in cells]
    return pd.DataFrame({"title": [cell.title for cell in cells], "record": records})


def read_dataset(folder: Path) -> list[CellRecord]:
    """Read the records of a data set; raise ResultsError if it is damaged or too large."""
    with _explain_damage(folder / RECORDS_FILE) as path:
        texts = read_parquet(path, ["record"], ["record"]).column("record").unique().to_pylist()
        return [CellRecord.model_validate(json.loads(text)) for text in texts]


def read_document_frame(folder: Path) -> pd.DataFrame:
    """Read the data frame with all documents and runs of a data set.

    The columns are those of `document_frame` with `only_changed=False`. Raises ResultsError if the
    file is missing, damaged or too large.
    """
    if not (folder / DOCUMENTS_FILE).is_file():
        raise ResultsError(
            f"{folder} does not contain the outcomes of the documents ({DOCUMENTS_FILE} is "
            "missing); name the results folder instead"
        )
    with _explain_damage(folder / DOCUMENTS_FILE) as path:
        frame: pd.DataFrame = read_parquet(path).to_pandas()
        frame[["key", "ablation", "task", "doc", "score", "score_intact"]]  # raises KeyError
        return frame


def read_parquet(
    path: Path, columns: list[str] | None = None, repeated: list[str] | None = None
) -> pa.Table:
    """Read a Parquet file; raise ValueError if its decompressed content is too large.

    Args:
        path: The file.
        columns: Columns to read; None for all.
        repeated: Columns with few distinct texts; each distinct text is stored once in memory.

    Returns:
        The table.
    """
    with pq.ParquetFile(path, read_dictionary=repeated) as file:
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        if sum(group.total_byte_size for group in groups) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES:,} bytes")
        return file.read(columns=columns)


@contextmanager
def _explain_damage(path: Path) -> Iterator[Path]:
    """Raise a ResultsError about a damaged file if the `with` block fails.

    The context manager yields `path`, and the block reads this file.
    """
    try:
        yield path
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        reason = f"{path} is damaged: {first_line(error)}"
        advice = "Name a folder that 'tracker report --format dataset' wrote"
        raise ResultsError(f"{reason}. {advice}") from None
