"""A stranger's task, prompt and adapter, by the front door, against plain lm-eval."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracker
from tests.own import write_tasks
from tests.plain import evaluate
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark
from tracker.core.ablations import Ablation
from tracker.core.errors import ModelError, RequestError
from tracker.core.extent import ALL
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.scorer import Generation
from tracker.models.load import load_model
from tracker.models.sources import find_model

LAYERS = [0, 2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_tasks(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def adapter(tmp_path: Path, tiny_llama: Callable[..., Path]) -> tuple[Path, Path]:
    """A model's folder and a LoRA adapter's."""
    base = tiny_llama()
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # a fresh adapter adds nothing
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def run(place: Path, **parameters: Any) -> tracker.Results:
    file = place / "own.yaml"
    layers = parameters.pop("layer")
    grid = {name: {"value": value} for name, value in parameters.items()}
    grid["layer"] = {"values": layers}
    file.write_text(yaml.safe_dump({"method": "grid", "parameters": grid}))
    return tracker.run(file, results=place / "results", track=[])


def plainly(base: Path, adapter: Path | None, folder: Path, layer: int | None, task: str) -> Any:
    """lm-eval on the really pruned model, loaded by its own arguments."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = HFLM(
        str(base), **({"peft": str(adapter)} if adapter else {}), device="cpu", batch_size=1
    )
    if layer is not None:
        model = plain.model.get_base_model() if adapter else plain.model
        model = copy.deepcopy(model)
        del model.model.layers[layer]
        for index, module in enumerate(model.model.layers):
            module.self_attn.layer_idx = index
        model.config.num_hidden_layers -= 1
        plain = HFLM(model, tokenizer=tokenizer, batch_size=1)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    found = evaluate(
        plain,
        tasks=[task],
        task_manager=manager,
        system_instruction="You are a painter.",
        num_fewshot=1,
    )
    loglikelihoods = [
        [answer[0][0] for answer in sample["resps"]] for sample in found["samples"][task]
    ]
    return found["results"][task]["acc,none"], loglikelihoods


@pytest.mark.parametrize("adapted", [False, True])
def test_every_number_is_lm_evals(
    tmp_path: Path, folder: Path, adapter: tuple[Path, Path], adapted: bool
) -> None:
    base, lora = adapter
    results = run(
        tmp_path,
        model=str(base),
        benchmark="paint",
        include_path=str(folder),
        system_instruction="You are a painter.",
        num_fewshot=1,
        layer=LAYERS,
        **({"model_args": {"peft": str(lora)}} if adapted else {}),
    )
    assert not results.outcome.failed
    (cell,) = results.cells
    (store,) = tracker.ledger.store.Ledger(tmp_path / "results").cells()
    frame = store.read().sort_values("doc").set_index("ablation")
    for layer in (None, *LAYERS):
        accuracy, loglikelihoods = plainly(base, lora if adapted else None, folder, layer, "paint")
        name = "baseline" if layer is None else f"layer:{layer}"
        ours = cell.baseline_accuracy if layer is None else cell.runs_of()[layer].accuracy
        assert ours == accuracy
        for mine, theirs in zip(frame.loc[name, "loglikelihoods"], loglikelihoods, strict=True):
            assert list(mine) == pytest.approx(theirs, abs=1e-4)
    assert cell.model.arguments == ({"peft": str(lora)} if adapted else {})
    # The task, its prompt and its folder are found again without the experiment file.
    written = tracker.log_samples(tmp_path / "files", results=tmp_path / "results")
    assert not written.failed
    samples = [file for file in written.files if file.name.startswith("samples_paint")]
    assert len(samples) == 1 + len(LAYERS)
    for file in samples:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 3
        assert all("You are a painter." in row["arguments"]["gen_args_0"]["arg_0"] for row in rows)


class TestArguments:
    def test_they_are_part_of_what_the_model_is(
        self, tmp_path: Path, adapter: tuple[Path, Path]
    ) -> None:
        base, lora = adapter

        def identity(**arguments: Any) -> tuple[str, object]:
            request = tracker.core.config.cell_request(
                model=str(base), benchmark="b", layers=(0,), model_args=arguments or None
            )
            source = find_model(request.model, None, request.model_args)
            return source.fingerprint(), str(source.stamp())

        plain, eager, tuned = (
            identity(),
            identity(attn_implementation="eager"),
            identity(peft=str(lora)),
        )
        assert len({plain[0], eager[0], tuned[0]}) == len({plain[1], eager[1], tuned[1]}) == 3
        moved = lora.rename(tmp_path / "moved")
        assert identity(peft=str(moved))[0] == tuned[0]
        weights = moved / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        assert identity(peft=str(moved))[0] != tuned[0]

    def test_a_folder_within(self, tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
        base = tiny_llama("repo/step-100")
        inside = find_model(str(base.parent), None, '{"subfolder": "step-100"}')
        assert load_model(inside, device="cpu").identity.layers == 4
        with pytest.raises(ModelError, match=r"there is no folder .*step-1"):
            find_model(str(base.parent), None, '{"subfolder": "step-1"}')

    def test_how_attention_is_computed(self, tiny_llama: Callable[..., Path]) -> None:
        source = find_model(str(tiny_llama()), None, '{"attn_implementation": "eager"}')
        assert load_model(source, device="cpu").model.config._attn_implementation == "eager"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"parallelise": True}, "no 'parallelise', and what it does to the numbers"),
            ({"pretrained": "m"}, "pretrained has a key of its own: model"),
            ({"dtype": "float16"}, "dtype has a key of its own: dtype"),
            ({"load_in_4bit": "please"}, "load_in_4bit is yes or no, not 'please'"),
            ({"load_in_4bit": True}, "needs the package bitsandbytes.*pip install bitsandbytes"),
            ({"peft": "no folder at all"}, "neither a folder here nor a hub id"),
            ({"delta": "m"}, "no 'delta'"),
        ],
    )
    def test_nonsense(
        self, tiny_llama: Callable[..., Path], arguments: dict[str, Any], said: str
    ) -> None:
        request = tracker.core.config.cell_request(
            model=str(tiny_llama()), benchmark="b", layers=(0,), model_args=arguments
        )
        with pytest.raises(RequestError, match=said):
            find_model(request.model, None, request.model_args)

    def test_a_checkpoint_whose_package_is_not_here(self, tiny_llama: Callable[..., Path]) -> None:
        base = tiny_llama()
        config = base / "config.json"
        said = '"quantization_config": {"quant_method": "gptq", "bits": 4},'
        config.write_text(config.read_text().replace("{", "{" + said, 1))
        with pytest.raises(ModelError, match="gptq checkpoint and needs the package gptqmodel"):
            load_model(find_model(str(base)), device="cpu")

    def test_an_adapter_that_is_in_the_prompt(
        self, tmp_path: Path, tiny_llama: Callable[..., Path]
    ) -> None:
        from peft import PromptTuningConfig

        base = tiny_llama()
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
        model.save_pretrained(tmp_path / "prompt")
        request = tracker.core.config.cell_request(
            model=str(base),
            benchmark="b",
            layers=(0,),
            model_args={"peft": str(tmp_path / "prompt")},
        )
        with pytest.raises(ModelError, match="PROMPT_TUNING, which puts tokens into the prompt"):
            load_model(find_model(request.model, None, request.model_args), device="cpu")


def test_what_follows_a_thought_is_lm_evals(folder: Path, tiny_llama: Callable[..., Path]) -> None:
    """Under every layer's removal; the thought ends where such a model happens to say so."""
    loaded = load_model(find_model(str(tiny_llama())), device="cpu")
    request = tracker.core.config.cell_request(
        model="m",
        benchmark="says",
        layers=(0,),
        include_path=[str(folder)],
        gen_kwargs="max_gen_toks=12",
        think_end_token="e",
    )
    benchmark = LmEvalBenchmark(request)
    documents = benchmark.documents(RequestEncoder(loaded.model, loaded.tokenizer, request), ALL)
    prompts = [document.prompt for document in documents if document.prompt]
    ablations = [Ablation(), Ablation((0,)), Ablation((2,))]
    generation = Generation(Engine(loaded, 256), loaded.tokenizer, think_end_token="e")
    cut = 0
    for ablation in ablations:
        model = copy.deepcopy(loaded.model)
        for layer in ablation.layers:
            del model.model.layers[layer]
        for index, module in enumerate(model.model.layers):
            module.self_attn.layer_idx = index
        model.config.num_hidden_layers = len(model.model.layers)
        found = []
        for end in ("e", None):
            plain = HFLM(model, tokenizer=loaded.tokenizer, batch_size=1, think_end_token=end)
            instances = [
                Instance("generate_until", doc={}, arguments=(p.text, dict(p.settings)), idx=0)
                for p in prompts
            ]
            found.append(plain.generate_until(instances, disable_tqdm=True))
        with_end, whole = found
        cut += with_end != whole
        place = ablations.index(ablation)
        assert [generation.texts(p, ablations)[place] for p in prompts] == with_end
    assert cut
