"""Saves a model whose linear maps have the weights of formats, as a checkpoint that anybody loads.

Its weights are numbers of the model's own dtype, those that a file in the formats gives back: it
says what the smaller file says, and is not smaller itself. Beside it stand the formats, and what
other tools are given to make the smaller file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tracker.core.changes import Ablation, Change
from tracker.core.config import CellRequest
from tracker.core.distribution import __version__
from tracker.core.errors import BenchmarkError
from tracker.core.weight_formats import FORMATS
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress
from tracker.models import checkpoint
from tracker.models.ends import find_ends, round_ends
from tracker.models.linear_maps import linear_maps
from tracker.models.load import LoadedModel, load_model
from tracker.models.pruned import pruned
from tracker.models.quantised import quantise
from tracker.models.sources import find_model
from tracker.precision.recipes import recipes
from tracker.pruning.export.checkpoint import beside, refuse_output
from tracker.pruning.export.facts import Proof
from tracker.pruning.export.proof import MeasuredCell, expected, prove

FACTS = "formats.json"
_FILES = {
    "llama.cpp": "llama.cpp.sh",
    "llm-compressor": "llm-compressor.yaml",
    "mlx-lm": "mlx-lm.json",
    "GPTQModel": "gptqmodel.json",
}
"""Where the recipe of each tool stands."""


@dataclass(frozen=True)
class Quantised:
    """A model that was saved.

    Attributes:
        folder: Where it is.
        formats: Path of each linear map that is rounded → its format.
        recipes: What makes the smaller file, by tool.
        proof: What was proved of the files.
    """

    folder: Path
    formats: dict[str, str]
    recipes: dict[str, str]
    proof: Proof


def save(
    tests: CellRequest,
    formats: Mapping[str, str],
    output: Path,
    ledger: Ledger,
    options: Options,
    progress: Progress,
) -> Quantised:
    """Save a model whose maps have formats, and prove that it is the one that was tested.

    Args:
        tests: The model, and the documents on which it was tested with these formats.
        formats: `3.mlp.down_proj`, or `3` for a whole layer, or `embedding`, `lm_head` → format.
        output: The folder that is made.
        ledger: Where what was measured of them is.
        options: On what device, and whether a download's code may run.
        progress: Told what happens.

    Returns:
        What was saved.

    Raises:
        RequestError: There is something at the place already.
        ModelError: The model's weights are no one plain checkpoint.
        WorkError: What was saved is another model, or cannot be written; nothing of it is left.
    """
    refuse_output(output)
    source = find_model(tests.model, tests.revision, tests.model_args)
    checkpoint.refuse_packed(source, options.trust_remote_code)
    rounded = [Change.parse(f"{form}:{place}") for place, form in formats.items()]
    with beside(output) as folder:
        progress.say(f"loading {source.name}")
        loaded = load_model(source, tests.dtype, options.device, options.trust_remote_code)
        of_ends = {each.path: each.intervention for each in rounded if each.is_end}
        by_layer = _by_layer(loaded, [each for each in rounded if not each.is_end])
        name = type(loaded.model).__name__
        changes = [
            (layer, partial(quantise, formats=own, name=f"layer {layer} of {name}"))
            for layer, own in by_layer.items()
        ]
        progress.say("writing the checkpoint")
        twin = pruned(loaded.model, changes=changes)
        round_ends(twin, of_ends)
        checkpoint.save(loaded, twin, folder)
        wanted = expected(loaded, twin, options.device)
        paths, told, tied = _paths(loaded, by_layer, of_ends)
        made = recipes(
            told,
            loaded.model.config.get_text_config().model_type,
            len(loaded.layers),
            source.gguf_file or f"{source.name}.gguf",
            tied,
        )
        facts = {"tracker": __version__, "base": source.source, "formats": paths}
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for tool, text in made.items():
            (folder / _FILES[tool]).write_text(text.rstrip() + "\n", encoding="utf-8")
        del loaded, twin
        checkpoint.release()
        store = look_up(tests, ledger).store
        assert store is not None  # it was tested
        measured = MeasuredCell(tests, store, Ablation.of(*rounded))
        progress.say("loading it in a fresh process, for lm-eval")
        try:
            proof = prove(folder, wanted, measured, options.trust_remote_code)
        except BenchmarkError as error:
            progress.say(f"not scored by lm-eval: {error}")
            proof = prove(folder, wanted, None, options.trust_remote_code)
    return Quantised(output, paths, made, proof)


def _by_layer(loaded: LoadedModel, rounded: Sequence[Change]) -> dict[int, dict[str, str]]:
    """Say of each layer which of its maps have which format."""
    found: dict[int, dict[str, str]] = {}
    for change in rounded:
        layer, path = change.layer, change.path
        maps = [path] if path else linear_maps(loaded.layers[layer], f"layer {layer}")
        found.setdefault(layer, {}).update(dict.fromkeys(maps, change.intervention))
    return found


def _paths(
    loaded: LoadedModel, by_layer: Mapping[int, Mapping[str, str]], of_ends: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], str]:
    """Name what has formats as the checkpoint names it: path → format, as it was asked for and as
    other tools are told; and the path of an embedding that has one and is the head too."""
    names = {id(each): name for name, each in loaded.model.named_modules()}
    paths = {
        f"{names[id(loaded.layers[layer])]}.{path}": form
        for layer, own in by_layer.items()
        for path, form in own.items()
    }
    told, tied = dict(paths), ""
    if of_ends:
        ends = find_ends(loaded.model)
        for which, form in of_ends.items():
            path = names[id(ends.module(which))]
            # llama.cpp is told the one that such rows get, and takes no other.
            found = FORMATS[form].for_rows(ends.weight(which).shape[1])
            assert found is not None
            paths[path], told[path] = form, found.name
            tied = path if ends.tied else ""
    return paths, told, tied
