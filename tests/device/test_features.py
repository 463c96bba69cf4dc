"""Every feature of the engine computes on a device what it computes on the CPU, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.ablations import single_layers
from tests.engine.families import FAMILIES
from tests.engine.plain import make_documents
from tracker.core.ablations import INTACT, Ablation, Part, Rounded, Stretch, ablate
from tracker.core.errors import CellError
from tracker.core.kinds import Action
from tracker.engine import fitting
from tracker.engine.observers.divergence import divergences, output_proxies
from tracker.engine.observers.expert_load import expert_load
from tracker.engine.observers.perturbation_growth import perturbation_growth
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.observers.span_similarity import span_similarity
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.sharing import DEPTH_ONLY, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check
from tracker.models.linear_maps import linear_maps

FAMILY_NAMES = ("llama", "gpt2", "gemma3_mixed", "qwen2_moe", "bloom")
NO_EXPERTS = {"experts", "shared experts", "expert load"}
UNDEFINED = dict.fromkeys(("llama", "gpt2", "gemma3_mixed"), NO_EXPERTS)
UNDEFINED["bloom"] = NO_EXPERTS | {"heads", "generation"}
LAYERS = [*single_layers((0, 1, 2, 3)), Ablation((1, 2))]
SUBLAYERS = [INTACT, *(ablate(kind, [n]) for kind in ("attention", "mlp") for n in (0, 2))]


def scores(ablations: Sequence[Ablation], shared: int = 0) -> Callable[[Engine], Any]:
    """Score documents under ablations."""
    documents = make_documents(3, shared=shared)

    def run(engine: Engine) -> Any:
        return [(s.responses, s.proxy_sums) for s in engine.score(documents, ablations)]

    return run


def parts(kind: str) -> list[Ablation]:
    """Ablations of two parts in each of two layers."""
    return [INTACT, *(Ablation(parts=(Part(kind, n, part),)) for n in (1, 3) for part in (0, 1))]


def formats(*names: str, which: str = "") -> list[Ablation]:
    """Ablations that round one layer's maps, or all that is named."""
    return [INTACT, *(Ablation(rounded=(Rounded(name, 2, which),)) for name in names)]


FEATURES = {
    "layers": scores(LAYERS),
    "layers after a shared beginning": scores(LAYERS, shared=60),
    "sublayers": scores([*SUBLAYERS, Ablation((2,), attention=(0,), mlp=(3,))]),
    "heads": scores(parts("head")),
    "experts": scores(parts("expert")),
    "shared experts": scores([INTACT, Ablation(shared=(1,)), Ablation(shared=(3,))]),
    "formats": scores(formats("int8", "int4_row", "fp8")),
    "embedding": scores([INTACT, Ablation(rounded=(Rounded("int4_row", 0, "embedding"),))]),
    "output head": scores([INTACT, Ablation(rounded=(Rounded("int4_row", 0, "lm_head"),))]),
    "repeats": scores([INTACT, *(Ablation(repeated=(s,)) for s in (Stretch(1, 3), Stretch(2, 2)))]),
}


def fitted(engine: Engine) -> Any:
    """Fit replacements for two layers, and score with them."""
    texts = [[*d.requests[0].context, 3, 7, 9] for d in make_documents(3)]
    replacements = fitting.fit(engine.parts(engine.plan([INTACT])), texts, {1, 2}, linear=True)
    actions = [action.value for action in Action if action.is_fitted]
    ablations = [INTACT, *(Ablation(replaced=((a, n),)) for a in actions for n in (1, 2))]
    return scores(ablations)(replace(engine, stand_ins=replacements))


def checked(engine: Engine) -> Any:
    """Let the self-check decide what is shared."""
    result = check(engine, make_documents(3), LAYERS)
    return result.difference, str(result.engine.sharing), result.lost


def generated(engine: Engine) -> Any:
    """Continue a prompt under several ablations."""
    ids = [5, 9, 23, 7, 80, 41, 3, 11]
    ablations = [*single_layers((0, 1, 2, 3)), ablate("mlp", [1]), ablate("attention", [0])]
    prompts = torch.tensor([ids], device=engine.loaded.device).repeat(len(ablations), 1)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with engine.decoding(ablations, ids) as cache, torch.inference_mode():
        return engine.loaded.model.generate(prompts, **settings, **cache).cpu()


def of_document(observe: Callable[..., Any], *arguments: Any) -> Callable[[Engine], Any]:
    """Observe one document."""
    return lambda engine: observe(engine, make_documents(1)[0], *arguments)


def proxies_of_output(engine: Engine) -> Any:
    """Observe what bears on the output, but for gradients.

    The simulated device computes the gradients of attention from other parts than the CPU.
    """
    sums = output_proxies(engine, make_documents(1)[0])
    return {name: total for name, total in sums.items() if name != "gate_gradient"}


def of_maps(observe: Callable[..., Any]) -> Callable[[Engine], Any]:
    """Observe two linear maps in a format, whatever they are called."""

    def run(engine: Engine) -> Any:
        paths = [*linear_maps(engine.loaded.layers[1], "layer 1")]
        return observe(engine, [Rounded("int8", 1, path) for path in (paths[0], paths[-1])])

    return run


OBSERVING = {
    "fitted replacements": fitted,
    "self-check": checked,
    "generation": generated,
    "output proxies": proxies_of_output,
    "divergences": of_document(divergences, LAYERS[1:3]),
    "perturbation growth": of_document(perturbation_growth, 2),
    "span similarity": of_document(span_similarity),
    "expert load": of_document(expert_load, [Part("expert", 1, number) for number in (0, 1)]),
    "weight errors": of_maps(weight_errors),
    "rounding errors": of_maps(
        lambda engine, maps: rounding_errors(engine, make_documents(1)[0], maps)
    ),
}

FEATURES |= OBSERVING


def assert_equal(ours: Any, theirs: Any, rtol: float = 0, atol: float = 0) -> None:
    """Compare figures, by default to the bit, whatever holds them."""
    if isinstance(ours, torch.Tensor):
        assert theirs.device.type == "cpu"
        torch.testing.assert_close(theirs, ours, rtol=rtol, atol=atol, equal_nan=True)
    elif isinstance(ours, np.ndarray):
        np.testing.assert_allclose(theirs, ours, rtol=rtol, atol=atol)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        assert_equal(list(ours.values()), list(theirs.values()), rtol, atol)
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other, rtol, atol)
    elif isinstance(ours, float):
        assert theirs == pytest.approx(ours, rel=rtol, abs=atol)
    else:
        assert ours == theirs


def outcome(feature: Callable[[Engine], Any], engine: Engine) -> Any:
    """Return what a feature computes, or why the model cannot be used so."""
    try:
        return feature(engine)
    except (CellError, RefusalError) as error:
        return str(error)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature(engines, family, feature):
    pair = (engine.with_sharing(FAMILIES[family].sharing) for engine in engines(family))
    cpu, device = (outcome(FEATURES[feature], engine) for engine in pair)
    assert_equal(cpu, device)
    assert isinstance(cpu, str) == (feature in UNDEFINED.get(family, ()))


def test_gradients(engines):
    cpu, device = map(of_document(output_proxies, "gate_gradient"), engines("llama"))
    torch.testing.assert_close(cpu["gate_gradient"], device["gate_gradient"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature", ["layers", *OBSERVING])
def test_a_device_without_float64(engines, monkeypatch, feature):
    """As Apple's: figures are equal but for the rounding of float32."""
    monkeypatch.setenv("SIM_NO_FLOAT64", "1")
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(1, dtype=torch.float64, device="sim")
    family = "qwen2_moe" if "expert" in feature else "llama"
    cpu, device = (FEATURES[feature](engine) for engine in engines(family))
    assert_equal(cpu, device, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", [PLAIN, DEPTH_ONLY, ONE_BY_ONE])
def test_less_sharing(engines, sharing):
    cpu, device = (engine.with_sharing(sharing) for engine in engines("llama"))
    assert_equal(FEATURES["sublayers"](cpu), FEATURES["sublayers"](device))
