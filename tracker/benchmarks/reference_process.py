"""Score a checkpoint with plain transformers and lm-eval, as a separate program.

The program is started as `python -P reference_process.py REQUEST.json`. The program does not import
tracker.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint, save its logits in a file, and score benchmark tasks.

    `request` contains the paths, the texts and the tasks. Returns the results as a dictionary.
    """
    torch.set_num_threads(request["threads"])
    is_spread, trust = request["device"] == "spread", request["trust_remote_code"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        request["checkpoint"], trust_remote_code=trust
    )
    model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        request["checkpoint"],
        dtype="auto",
        output_loading_info=True,
        trust_remote_code=trust,
        **({"device_map": "auto"} if is_spread else {}),
    )
    model = model.eval() if is_spread else model.to(request["device"]).eval()
    logits = {str(n): _logits(model, ids) for n, ids in enumerate(request["tokens"])}
    save_file(logits, request["logits"])
    answer = {
        "tokens": [tokenizer(text).input_ids for text in request["texts"]],
        "parameters": model.num_parameters(),
        "not_as_saved": [*loading_info["missing_keys"], *loading_info["unexpected_keys"]],
    }
    if request["benchmark"]:
        answer |= _score_tasks(model, tokenizer, request["benchmark"])
    return answer


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Compute the model's logits at every token of a text."""
    input_ids = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits[0]
    return logits.float().cpu().contiguous()


def _score_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: dict[str, Any]
) -> dict[str, Any]:
    """Score the requested documents of tasks with lm-eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(model, tokenizer=tokenizer, backend="causal", **request["model"])
    if request["only"]:
        _limit_documents(lm, request["only"])
    evaluation = lm_eval.simple_evaluate(
        lm,
        task_manager=TaskManager(
            include_path=request["tasks_in"], include_defaults=False, metadata=request["metadata"]
        ),
        bootstrap_iters=0,
        limit=request["limit"],
        samples=request["samples"],
        **request["evaluate"],
    )
    samples = [
        {
            "task": task,
            "doc": sample["doc_id"],
            "filter": sample["filter"],
            "metrics": {name: _storable_value(sample[name]) for name in sample["metrics"]},
            "answers": [response[0] for response in sample["resps"]],
        }
        for task, rows in evaluation["samples"].items()
        for sample in rows
    ]
    results = {
        task: {name: value for name, value in row.items() if isinstance(value, float)}
        for task, row in evaluation["results"].items()
    }
    return {"samples": samples, "results": results, "lm_eval": lm_eval.__version__}


def _limit_documents(lm: LM, documents_by_task: dict[str, list[int]]) -> None:
    """Make a model of lm-eval score only the documents in `documents_by_task`.

    The model returns dummy answers for all documents that are not in `documents_by_task`.
    """
    scored = {task: set(documents) for task, documents in documents_by_task.items()}
    blanks = {"loglikelihood": (0.0, False), "loglikelihood_rolling": 0.0, "generate_until": ""}

    def answer_scored(
        method: Callable[..., Any], blank: object, requests: list[Instance], **settings: object
    ) -> list[Any]:
        is_scored = [request.doc_id in scored[request.task_name] for request in requests]
        answers = iter(method(list(compress(requests, is_scored)), **settings))
        return [next(answers) if flag else blank for flag in is_scored]

    for name, blank in blanks.items():
        setattr(lm, name, partial(answer_scored, getattr(lm, name), blank))


def _storable_value(value: Any) -> Any:
    """Convert a document's metric to a value that JSON can store.

    A metric that is a tuple becomes a list; any other metric becomes a float.
    """
    if isinstance(value, tuple | list):
        return [item.tolist() if hasattr(item, "tolist") else item for item in value]
    return float(value)


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = main(request)
    answer["ours"] = sorted(name for name in sys.modules if name.split(".")[0] == "tracker")
    Path(request["answer"]).write_text(json.dumps(answer, default=str), encoding="utf-8")
