"""A stranger's task, prompt and adapter, by the front door, against plain lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tracker
from tests.conftest import golden
from tests.helpers.lm_eval import HFLM, cut_layer, evaluate, folder_tasks, load_model_parts
from tests.helpers.own_tasks import write_tasks
from tests.helpers.runs import run_experiment, write_study
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.scorer import Generation
from tracker.models.load import load_model
from tracker.models.sources import ModelSource, find_model
from tracker.schema.changes import Ablation
from tracker.schema.config import cell_request
from tracker.schema.errors import RequestError
from tracker.schema.extent import ALL_DOCUMENTS

LAYERS = [0, 3]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    folder = write_tasks(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def adapter(tmp_path, tiny_llama) -> tuple[Path, Path]:
    """Write a model's folder and a LoRA adapter's."""
    from peft import LoraConfig, get_peft_model  # seconds, for every worker that collects

    base = tiny_llama()
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # a fresh adapter adds nothing
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def score(base: Path, adapter: Path | None, folder: Path, layer: int | None, task: str) -> Any:
    """lm-eval on the really pruned model, loaded by its own arguments."""
    arguments = {"peft": str(adapter)} if adapter else {}
    lm = HFLM(str(base), **arguments, device="cpu", batch_size=1)
    if layer is not None:
        model = lm.model.get_base_model() if adapter else lm.model
        tokenizer = AutoTokenizer.from_pretrained(base)
        lm = HFLM(cut_layer(model, layer), tokenizer=tokenizer, batch_size=1)
    evaluation = evaluate(
        lm,
        tasks=[task],
        task_manager=folder_tasks(folder),
        system_instruction="You are a painter.",
        num_fewshot=1,
    )
    loglikelihoods = [
        [answer[0][0] for answer in sample["resps"]] for sample in evaluation["samples"][task]
    ]
    return evaluation["results"][task]["acc,none"], loglikelihoods


@pytest.mark.parametrize("adapted", [False, True])
def test_every_number_is_lm_evals(tmp_path, folder, adapter, adapted):
    base, lora = adapter
    file = write_study(
        tmp_path / "own.yaml",
        model=str(base),
        benchmark="paint",
        include_path=str(folder),
        system_instruction="You are a painter.",
        num_fewshot=1,
        layer=LAYERS,
        **({"model_args": {"peft": str(lora)}} if adapted else {}),
    )
    results = run_experiment(file, tmp_path / "results")
    assert not results.outcome.failed
    (cell,) = results.cells
    (store,) = tracker.ledger.store.Ledger(tmp_path / "results").cells()
    frame = store.read().sort_values("doc").set_index("ablation")
    for layer in (None, *LAYERS):
        accuracy, loglikelihoods = score(base, lora if adapted else None, folder, layer, "paint")
        name = "baseline" if layer is None else f"layer:{layer}"
        ours = cell.baseline.value if layer is None else cell.runs_of_kind()[layer].accuracy
        assert ours == accuracy
        rows = zip(frame.loc[name, "loglikelihoods"], loglikelihoods, strict=True)
        for our_values, values in rows:
            assert list(our_values) == pytest.approx(values, abs=1e-4)
    assert cell.model.arguments == ({"peft": str(lora)} if adapted else {})
    # The task, its prompt and its folder are found again without the experiment file.
    log = tracker.log_samples(tmp_path / "files", results=tmp_path / "results")
    assert not log.failed
    samples = [file for file in log.files if file.name.startswith("samples_paint")]
    assert len(samples) == 1 + len(LAYERS)
    for file in samples:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 3
        assert all("You are a painter." in row["arguments"]["gen_args_0"]["arg_0"] for row in rows)


def test_the_shipped_task_is_lm_evals(tmp_path, tiny_llama, monkeypatch):
    """Its questions lie beside its file, which lm-eval reads in their folder only."""
    root, model = Path(__file__).parents[2], tiny_llama()
    monkeypatch.chdir(root)
    file = root / "experiments" / "own-task.yaml"
    results = run_experiment(file, tmp_path / "results", model=str(model), layer=LAYERS, sample=40)
    (cell,) = results.cells
    store = next(iter(tracker.ledger.store.Ledger(tmp_path / "results").cells()))
    documents = sorted({*store.read()["doc"]})
    assert len(documents) == 40
    by_file = str(root / "experiments" / "tasks" / "capitals.yaml")
    repeated = tracker.run(
        file, results=tmp_path / "other", track=(), model=str(model), layer=LAYERS, sample=40,
        benchmark=by_file, include_path=None,
    )  # fmt: skip
    assert [run.accuracy for run in repeated.cells[0].runs] == [run.accuracy for run in cell.runs]
    monkeypatch.chdir(root / "experiments" / "tasks")
    intact, tokenizer = load_model_parts(model)
    for layer in (None, *LAYERS):
        lm = HFLM(cut_layer(intact, layer), tokenizer=tokenizer, batch_size=8)
        evaluation = evaluate(
            lm,
            tasks=["capitals"],
            task_manager=folder_tasks(Path()),
            samples={"capitals": documents},
        )
        ours = cell.baseline.value if layer is None else cell.runs_of_kind()[layer].accuracy
        assert ours == evaluation["results"]["capitals"]["acc,none"]


def model_source(base: Path, **arguments: Any) -> ModelSource:
    """Load a model in some way, as a request would."""
    request = cell_request(
        model=str(base), benchmark="b", layers=(0,), model_args=arguments or None
    )
    return find_model(request.model)


class TestArguments:
    def test_they_are_part_of_what_the_model_is(self, tmp_path, adapter):
        base, lora = adapter

        def identity(**arguments: Any) -> tuple[str, object]:
            model = model_source(base, **arguments)
            return model.fingerprint(), str(model.stamp())

        fingerprint, stamp = identity(peft=str(lora))
        default, eager = identity(), identity(attn_implementation="eager")
        assert len({default[0], eager[0], fingerprint}) == len({default[1], eager[1], stamp}) == 3
        new_folder = lora.rename(tmp_path / "moved")
        assert identity(peft=str(new_folder))[0] == fingerprint
        weights = new_folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        assert identity(peft=str(new_folder))[0] != fingerprint

    @pytest.mark.parametrize(("arguments", "pattern"), golden("model_args"))
    def test_nonsense(self, tiny_llama, arguments, pattern):
        with pytest.raises(RequestError, match=pattern):
            model_source(tiny_llama(), **json.loads(arguments))

    @pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
    def test_few_bits_are_measured_and_never_moved(
        self, tmp_path, folder, tiny_llama, monkeypatch, bits, kind
    ):
        """transformers puts such weights where they are to be; `to` may spoil them afterwards."""
        linear = getattr(pytest.importorskip("bitsandbytes").nn, kind)
        # On a CPU bitsandbytes takes multiples of 32 and 64 alone.
        base = tiny_llama(layers=2, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
        moved_types: list[type] = []
        original = PreTrainedModel.to
        monkeypatch.setattr(
            PreTrainedModel,
            "to",
            lambda self, *to: moved_types.append(type(self)) or original(self, *to),
        )

        def quantised(is_quantised: bool) -> int:
            source = model_source(base, **{f"load_in_{bits}bit": is_quantised})
            model = load_model(source, device="cpu").model
            return sum(isinstance(module, linear) for module in model.modules())

        assert quantised(False) == 0
        assert len(moved_types) == 1
        assert quantised(True) == 2 * 7
        assert len(moved_types) == 1
        file = write_study(
            tmp_path / "few.yaml",
            model=str(base),
            benchmark="paint",
            include_path=str(folder),
            layer=[1],
            model_args={f"load_in_{bits}bit": True},
        )
        results = run_experiment(file, tmp_path / "results")
        assert not results.outcome.failed
        assert results.cells[0].model.arguments == {f"load_in_{bits}bit": "True"}


def test_what_follows_a_thought_is_lm_evals(folder, tiny_llama):
    """Under every layer's removal; the thought ends where such a model happens to say so."""
    loaded = load_model(model_source(tiny_llama()), device="cpu")
    request = cell_request(
        model="m",
        benchmark="says",
        layers=(0,),
        include_path=[str(folder)],
        gen_kwargs="max_gen_toks=12",
        think_end_token="e",
    )
    benchmark = LmEvalBenchmark(request)
    documents = benchmark.documents(
        RequestEncoder(loaded.model, loaded.tokenizer, request.benchmark), ALL_DOCUMENTS
    )
    prompts = [document.prompt for document in documents if document.prompt]
    instances = [
        Instance("generate_until", doc={}, arguments=(p.text, dict(p.settings)), idx=0)
        for p in prompts
    ]
    layers = (None, 0, 2)
    ablations = [Ablation.from_changes(removed=removed) for removed in ((), (0,), (2,))]
    generation = Generation(Engine(loaded, 256), loaded.tokenizer, think_end_token="e")
    n_different = 0
    for position, layer in enumerate(layers):
        cut_texts, full_texts = (
            HFLM(
                cut_layer(loaded.model, layer),
                tokenizer=loaded.tokenizer,
                batch_size=1,
                think_end_token=end,
            ).generate_until(instances, disable_tqdm=True)
            for end in ("e", None)
        )
        n_different += cut_texts != full_texts
        texts = [generation.generate(p, ablations)[position][0].text for p in prompts]
        assert texts == cut_texts
    assert n_different
