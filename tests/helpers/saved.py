"""Saved models, as plain transformers loads them, and what models say of a few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 7, 9, 11, 2, 40]])


def logits(model: Any) -> torch.Tensor:
    """Compute a model's logits at every token of `IDS`."""
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return result


def save_and_load(model: Any, folder: Path) -> Any:
    """Save a model, and load it by plain transformers, which must find and use every weight."""
    model.save_pretrained(folder)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded
