"""Score a checkpoint with plain transformers and lm-eval, as a separate program.

It runs as a script, `python -P reference_process.py ASKED.json`, and imports nothing of tracker, so
its results are those of transformers and lm-eval alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Compute the requested results; the logits of the texts are written to a file of their own."""
    torch.set_num_threads(asked["threads"])
    folder, trust = asked["checkpoint"], asked["trust_remote_code"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        trust_remote_code=trust,
        **({"device_map": "auto"} if asked["device"] == "spread" else {}),
    )
    if asked["device"] != "spread":
        model = model.to(asked["device"])
    model.eval()
    tokens = [tokenizer(text).input_ids for text in asked["texts"]]
    save_file(
        {
            str(number): _logits(model, ids).contiguous()
            for number, ids in enumerate(asked["tokens"])
        },
        asked["logits"],
    )
    answer = {
        "tokens": tokens,
        "parameters": model.num_parameters(),
        "not_as_saved": [*found["missing_keys"], *found["unexpected_keys"]],
    }
    if asked["benchmark"]:
        answer |= _scored(model, tokenizer, asked["benchmark"])
    return answer


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return all logits of a text."""
    asked = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    logits: torch.Tensor = model(input_ids=asked, use_cache=False).logits[0]
    return logits.float().cpu()


def _scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: dict[str, Any]
) -> dict[str, Any]:
    """Score the requested tasks with lm-eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(model, tokenizer=tokenizer, backend="causal", **asked["model"])
    if asked["only"]:
        _ask_only(lm, asked["only"])
    found = lm_eval.simple_evaluate(
        lm,
        task_manager=TaskManager(
            include_path=asked["tasks_in"], include_defaults=False, metadata=asked["metadata"]
        ),
        bootstrap_iters=0,
        limit=asked["limit"],
        samples=asked["samples"],
        **asked["evaluate"],
    )
    samples = [
        {
            "task": task,
            "doc": sample["doc_id"],
            "filter": sample["filter"],
            "metrics": {name: _plain(sample[name]) for name in sample["metrics"]},
            "answers": [response[0] for response in sample["resps"]],
        }
        for task, rows in found["samples"].items()
        for sample in rows
    ]
    results = {
        task: {name: value for name, value in row.items() if isinstance(value, float)}
        for task, row in found["results"].items()
    }
    return {"samples": samples, "results": results, "lm_eval": lm_eval.__version__}


def _ask_only(lm: LM, wanted: dict[str, list[int]]) -> None:
    """Skip the model for other documents, which are needed only to draw the same examples."""
    kept = {task: set(documents) for task, documents in wanted.items()}
    blank = {"loglikelihood": (0.0, False), "loglikelihood_rolling": 0.0, "generate_until": ""}
    for method, nothing in blank.items():
        own = getattr(lm, method)

        def ask(
            requests: list[Instance],
            own: Callable[..., Any] = own,
            nothing: object = nothing,
            **settings: Any,
        ) -> Any:
            some = [each for each in requests if each.doc_id in kept[each.task_name]]
            answers = iter(own(some, **settings))
            return [
                next(answers) if each.doc_id in kept[each.task_name] else nothing
                for each in requests
            ]

        setattr(lm, method, ask)


def _plain(value: Any) -> Any:
    """Convert a metric of one document to a number, or a list for a pair."""
    if isinstance(value, tuple | list):
        return [each.tolist() if hasattr(each, "tolist") else each for each in value]
    return float(value)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = main(asked)
    answer["ours"] = sorted(name for name in sys.modules if name.split(".")[0] == "tracker")
    Path(asked["answer"]).write_text(json.dumps(answer, default=str), encoding="utf-8")
