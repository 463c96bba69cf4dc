"""Provide lm-eval's tasks and groups as benchmarks, with lm-eval's prompts and metrics.

This module also returns the texts of documents, and determines whether the texts may be published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, islice
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.registry import AGGREGATION_REGISTRY, get_aggregation
from lm_eval.api.task import ConfigurableTask, TaskConfig

from tracker.benchmarks.base import MetricValue
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.factory import (
    UNREADABLE,
    build_tasks,
    draws_in_turn,
    find_task,
    makes_documents,
    resolve_num_fewshot,
    unreadable_error,
)
from tracker.benchmarks.fingerprint import is_user_function, task_identity
from tracker.benchmarks.own import check_own_tasks
from tracker.benchmarks.parts import choose_part, part_setting
from tracker.benchmarks.private import hide_progress_bars
from tracker.benchmarks.samples import NOISE, JudgedText, TextMetrics, count_joint_samples
from tracker.benchmarks.sources import DATA_PACKAGE, HUB, open_data_source
from tracker.schema.config import BenchmarkSpec, CellRequest
from tracker.schema.documents import (
    Document,
    DocumentText,
    GeneratedText,
    Prompt,
    Request,
    Response,
    samples_texts,
)
from tracker.schema.errors import BenchmarkError, did_you_mean
from tracker.schema.extent import Clusters, Extent
from tracker.schema.fields import decode_arguments, expand_home
from tracker.schema.grouping import group_by
from tracker.schema.identities import CUT_OFF, BenchmarkIdentity, filtered_metric
from tracker.schema.provenance import content_hash

_FILES = ("arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "text", "xml")
"""Builders of `datasets` that read files; a task may name one instead of a data set."""


def is_public(spec: BenchmarkSpec, tasks: Iterable[Any]) -> bool:
    """Return whether all documents come from the hub or a package.

    Args:
        spec: Benchmark settings, with the source of the data.
        tasks: Tasks of the benchmark.

    Returns:
        True if all documents are public. Tasks that the user wrote are not public.
    """
    if check_own_tasks(spec):
        return False
    if spec.data != HUB:
        return spec.data.startswith(DATA_PACKAGE)
    return not any(_reads_files(task.config) for task in tasks)


def _reads_files(config: TaskConfig) -> bool:
    if config.custom_dataset is not None or (config.dataset_kwargs or {}).get("data_files"):
        return True
    name = str(config.dataset_path or "")
    return name in _FILES or expand_home(name).exists()


NORMALISED_TASKS = ("hellaswag", "arc_challenge", "openbookqa")
"""Names of tasks for which the literature reports `acc_norm`."""
_ROLLING = "loglikelihood_rolling"
_GENERATED = "generate_until"
_SCORED_TYPES = ("multiple_choice", "loglikelihood", _ROLLING, _GENERATED)


class LmEvalBenchmark:
    """Benchmark that wraps a task or group of lm-eval.

    Raises BenchmarkError if the benchmark or its data cannot be found or read. The attribute
    `task_dict` contains the tasks and groups by name, in the format of lm-eval's
    `TaskManager.load`.
    """

    def __init__(self, request: CellRequest) -> None:
        spec = request.benchmark
        entry = find_task(spec)
        self._name = entry.name
        self._source = open_data_source(spec.data)
        self._spec, self._request = spec, request
        # lm-eval also passes the model's name to tasks that generate their documents.
        metadata = {"pretrained": request.model.model, **decode_arguments(spec.metadata)}
        content = build_tasks(entry, self._source, spec, metadata)
        group = content if isinstance(content, Group) else None
        members = content if isinstance(content, list) else [content]
        groups = []
        if group:
            members, groups = group.get_all_tasks(), [group, *group.get_all_groups()]
        self._tasks: dict[str, Any] = {task.task_name: task for task in members}
        self.task_dict = {"tasks": self._tasks, "groups": {group.name: group for group in groups}}
        for task in self._tasks.values():
            self._configure(task)
        self._generated = {n: t for n, t in self._tasks.items() if t.OUTPUT_TYPE == _GENERATED}
        settings = [task.get_config("generation_kwargs") or {} for task in self._generated.values()]
        self._is_sampled = any(map(samples_texts, settings))
        self._text_metrics = self._build_text_metrics()
        self.identity = self._build_identity(group)
        self._task_identities = {task.name: task for task in self.identity.tasks}
        self._numbers = {task.name: task.numbers for task in self.identity.tasks}
        self.public = is_public(spec, self._tasks.values())
        self.is_model_specific = any(makes_documents(task.config) for task in self._tasks.values())
        self._documents: dict[tuple[str, int], tuple[Any, list[Any]]] = {}

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Build and tokenise the requests of all selected documents, as lm-eval does."""
        encoder.check_chat_template(self._spec)
        return [
            self._build_document(name, index, instances, encoder)
            for name in self._tasks
            for index, instances in self.build_requests(name, extent, encoder).items()
        ]

    def _build_document(
        self, name: str, index: int, instances: list[Any], encoder: RequestEncoder
    ) -> Document:
        task, doc, prompt = self._tasks[name], instances[0].doc, None
        self._documents[name, index] = (doc, instances)
        if task.OUTPUT_TYPE == _GENERATED:
            text, settings = instances[0].args
            spec, seed = self._spec, self._request.documents.seed
            sampling = self._text_metrics.samples, seed, spec.budgets
            prompt = Prompt(text, _rename_limit(settings), spec.think_end_token, *sampling)
            try:
                requests = [answer_request(encoder, prompt, _first_answer(task, doc))]
            except UNREADABLE as error:
                raise unreadable_error(name, self._source.name, error) from None
        elif task.OUTPUT_TYPE == _ROLLING:
            requests = encoder.rolling_windows(*instances[0].args)
        else:
            requests = encoder.encode(instances)
        return Document(
            task=name,
            index=index,
            requests=tuple(requests),
            gold=_gold_index(task, doc, len(instances)),
            choices=len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 0,
            rolling=task.OUTPUT_TYPE == _ROLLING,
            prompt=prompt,
        )

    def build_requests(
        self, name: str, extent: Extent, encoder: RequestEncoder | None
    ) -> dict[int, list[Any]]:
        """Build the requests of the selected documents of a task with lm-eval.

        Args:
            name: Name of the task.
            extent: Selection of the documents whose requests are built.
            encoder: Encoder that applies the chat template; None = no template.

        Returns:
            The requests of each document in lm-eval's order, by the document's number.

        Raises:
            BenchmarkError: A document lacks a column that the task reads.
        """
        task = self._tasks[name]
        chat = encoder if self.identity.apply_chat_template else None
        assert chat is not None or not self.identity.apply_chat_template
        multiturn = self._spec.fewshot_as_multiturn
        task.set_fewshot_seed(seed=self._request.documents.seed)
        indices = sorted(extent.select(name, self._numbers[name]))
        is_whole = extent.sample is None or draws_in_turn(task, task.config.num_fewshot)
        samples = None if is_whole else indices
        try:
            with hide_progress_bars():
                task.build_all_requests(
                    limit=indices[-1] + 1 if indices else None,
                    samples=samples,
                    rank=0,
                    world_size=1,
                    system_instruction=self._spec.system_instruction,
                    apply_chat_template=chat is not None,
                    fewshot_as_multiturn=chat is not None if multiturn is None else multiturn,
                    chat_template=chat.apply_chat_template if chat else None,
                    tokenizer_name=chat.tokenizer_name if chat else "",
                )
            self._check_judging(task)
        except (*UNREADABLE, ArithmeticError, OSError, AssertionError) as error:
            raise unreadable_error(name, self._source.name, error) from None
        by_document = group_by(task.instances, lambda instance: instance.doc_id)
        if samples is not None:  # lm-eval numbers the chosen documents from 0
            by_document = dict(zip(samples, by_document.values(), strict=True))
        return {i: sorted(by_document[i], key=lambda instance: instance.idx) for i in indices}

    def rows_digest(self, task: str) -> str:
        """Return a hash of all rows of the split on which a task is scored."""
        config, splits = self._tasks[task].config, self._tasks[task].dataset
        return content_hash(list(splits[config.test_split or config.validation_split]))

    def clusters(self, column: str) -> Clusters:
        """Group the documents of all tasks by the value of a column of their data."""
        values = {name: self._column(name, column) for name in self._tasks}
        codes, unique_values = pd.factorize(np.array([*chain(*values.values())], dtype=object))
        if (codes < 0).any() or "" in unique_values:
            raise BenchmarkError(
                f"cluster: some documents of {self._name} have no {column}; choose another column"
            )
        if len(unique_values) < 2:
            raise BenchmarkError(
                f"cluster: all documents of {self._name} have the same {column}, and intervals "
                "need at least two clusters; choose another column"
            )
        labels, numbers = [], iter(codes.tolist())
        for name, texts in values.items():
            labels.append((name, tuple(islice(numbers, len(texts)))))
        return Clusters(column=column, labels=tuple(labels))

    def _column(self, name: str, column: str) -> list[str | None]:
        """Return a column's value for each document of a task; None for missing values."""
        rows, numbers = self._tasks[name].eval_docs, self._numbers[name]
        if column == "task":
            return [name] * len(numbers)
        columns = list(rows[0])
        if column not in columns:
            hint = did_you_mean(column, columns)
            raise BenchmarkError(
                f"cluster: the documents of {name} have no column {column!r}.{hint} They have: "
                f"{', '.join(columns)}. For the tasks of a group, use cluster: task"
            )
        values = (rows[number].get(column) for number in numbers)
        return [None if value is None or value != value else str(value) for value in values]

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, MetricValue | None]:
        """Compute the metrics of the responses to one document with the task's own code."""
        if document.prompt is not None:
            values: Mapping[str, MetricValue] = self._judge_texts(document, responses[0].texts)
        elif document.rolling:
            values = self._judge(document, [sum(r.loglikelihood for r in responses)]).metrics
        else:
            values = self._judge(document, [(r.loglikelihood, r.greedy) for r in responses]).metrics
        if not all(math.isfinite(response.loglikelihood) for response in responses):
            return dict.fromkeys(values)
        return dict(values)

    def _judge_texts(
        self, document: Document, texts: Sequence[GeneratedText]
    ) -> dict[str, MetricValue]:
        """Compute a document's metrics from generated texts, whole and cut to each token budget."""
        task = self._task_identities[document.task]

        values: dict[str, MetricValue] = {}
        by_budget = zip(*((text.text, *text.early) for text in texts), strict=True)
        for budget, samples in zip((None, *self._text_metrics.budgets), by_budget, strict=True):
            judged = [self._judge(document, [sample], samples) for sample in samples]
            values |= self._text_metrics.combine(judged, task, budget)
        return values | {CUT_OFF: fmean(bool(text.is_cut) for text in texts)}

    def _judge(
        self, document: Document, answers: Sequence[Any], samples: Sequence[str] = ()
    ) -> JudgedText:
        """Compute a document's metrics from a model's answers, with the task's own code.

        `samples` are all sampled texts of the document, for filters such as a majority vote.
        """
        task, values, filtered = self._tasks[document.task], dict[str, MetricValue](), {}
        doc, instances = self._documents[document.task, document.index]
        for ensemble in task._filters:
            is_joint = ensemble.name in self._text_metrics.joint
            for instance, answer in zip(instances, answers, strict=True):
                instance.resps = list(samples) if is_joint else [answer]
                instance.filtered_resps = {}
            ensemble.apply(instances)
            results = [instance.filtered_resps[ensemble.name] for instance in instances]
            metrics = task.process_results(doc, results)
            filtered[ensemble.name] = results[0]
            values |= {
                filtered_metric(m, ensemble.name): storable_value(v) for m, v in metrics.items()
            }
        return JudgedText(values, filtered)

    def text(self, document: Document) -> DocumentText:
        """Return a document's question and answer.

        The question contains neither few-shot examples nor a chat template.
        """
        task = self._tasks[document.task]
        doc, instances = self._documents[document.task, document.index]
        if document.rolling:
            return DocumentText(str(instances[0].args[0]))
        if task.OUTPUT_TYPE == "multiple_choice":
            # If the options are alternative contexts, they share one continuation.
            question = task.doc_to_target(doc) if task.multiple_input else task.doc_to_text(doc)
            return DocumentText(str(question), tuple(map(str, task.doc_to_choice(doc))))
        return DocumentText(str(task.doc_to_text(doc)), answer=_first_answer(task, doc).strip())

    def _configure(self, task: ConfigurableTask) -> None:
        """Apply the benchmark's settings to a task.

        Raises BenchmarkError if the task or a setting is not supported.
        """
        if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE not in _SCORED_TYPES:
            raise BenchmarkError(
                f"{task.task_name} has the output type {task.OUTPUT_TYPE!r}; tracker supports only "
                f"{', '.join(_SCORED_TYPES)}"
            )
        if task.OUTPUT_TYPE == _GENERATED:
            if self._spec.gen_kwargs:
                arguments = decode_arguments(self._spec.gen_kwargs)
                if self._spec.samples and float(arguments.get("temperature") or 0) > 0:
                    arguments.setdefault("do_sample", True)  # whatever the task's own setting is
                task.set_config(key="generation_kwargs", value=arguments, update=True)
            self._check_generation(task)
        elif key := self._spec.generation_key:
            raise BenchmarkError(
                f"{key}: {task.task_name} scores given answers, so the model generates no texts; "
                f"leave {key} out, or name a generation task"
            )
        elif self._spec.enable_thinking:
            raise BenchmarkError(
                f"enable_thinking: {task.task_name} scores given answers, so the model generates "
                "no thinking; lm-eval refuses this setting too"
            )
        if task.get_config("doc_to_image") or task.get_config("doc_to_audio"):
            raise BenchmarkError(f"{task.task_name} has images or audio; tracker scores only texts")
        for setting in ("num_fewshot", "apply_chat_template", "system_instruction"):
            # lm-eval ignores these settings here, so a record that contains them would be wrong.
            if task.OUTPUT_TYPE == _ROLLING and getattr(self._spec, setting):
                raise BenchmarkError(
                    f"{task.task_name} scores whole texts, without few-shot examples or a prompt; "
                    f"leave {setting} out"
                )
        for field in ("doc_to_target", "doc_to_choice"):
            column = task.get_config(field)
            # lm-eval uses the name of a missing column as the text itself.
            if isinstance(column, str) and column.isidentifier() and column not in task.features:
                raise unreadable_error(task.task_name, self._source.name, KeyError(column))
        num_fewshot = resolve_num_fewshot(task.get_config("num_fewshot"), self._spec.num_fewshot)
        task.set_config(key="num_fewshot", value=num_fewshot)

    def _check_generation(self, task: ConfigurableTask) -> None:
        """Refuse unsupported settings of text generation, and set the number of samples.

        Raises BenchmarkError if a setting is refused.
        """
        settings = task.get_config("generation_kwargs") or {}
        if (settings.get("num_beams") or 1) > 1:
            raise BenchmarkError(
                f"{task.task_name} uses beam search; tracker supports greedy decoding and "
                "sampling, e.g. gen_kwargs: temperature=0.7"
            )
        samples = self._spec.samples or task.get_config("repeats") or 1
        if samples_texts(settings) and not float(settings.get("temperature") or 0) > 0:
            raise BenchmarkError(
                f"{task.task_name} samples its texts without a temperature; add e.g. gen_kwargs: "
                "temperature=0.7, or do_sample=False for greedy decoding"
            )
        if samples > 1 and not samples_texts(settings):
            raise BenchmarkError(
                f"samples: {samples} texts of {task.task_name} would be equal, because decoding is "
                "greedy; add e.g. gen_kwargs: temperature=0.7, or set samples to 1"
            )
        limit = Prompt("", _rename_limit(settings)).max_tokens
        if self._spec.budgets and self._spec.budgets[-1] >= limit:
            raise BenchmarkError(
                f"budgets: {self._spec.budgets[-1]} tokens; expected less than {limit}, which is "
                f"max_gen_toks of {task.task_name}. Choose smaller budgets, or set a larger "
                "max_gen_toks in gen_kwargs"
            )
        for ensemble in task._filters:
            if (needed := count_joint_samples(ensemble)) > samples:
                raise BenchmarkError(
                    f"samples: the filter {ensemble.name} of {task.task_name} needs {needed} "
                    f"texts, not {samples}; leave samples out, or give at least {needed}"
                )
        if samples != (task.get_config("repeats") or 1):
            task.set_config(key="repeats", value=samples)

    def _common_setting(self, name: str, values: Collection[int]) -> int:
        """Return the value of a setting that all tasks share.

        Raises BenchmarkError if the tasks have different values of the setting `name`.
        """
        if len(values) > 1:
            raise BenchmarkError(
                f"the tasks of {self._name} differ in {name} ({sorted(values)}); set {name}"
            )
        return next(iter(values), 1)

    def _build_text_metrics(self) -> TextMetrics:
        """Build the rules that compute metrics of several sampled texts and of shortened texts.

        Raises BenchmarkError if the tasks have different numbers of samples.
        """
        tasks = self._generated.values()
        samples = self._common_setting("samples", {t.get_config("repeats") or 1 for t in tasks})
        filters = (ensemble for task in tasks for ensemble in task._filters)
        joint = frozenset(f.name for f in filters if samples > 1 and count_joint_samples(f))
        return TextMetrics(samples, self._spec.budgets, joint)

    def _outcome_settings(self, num_fewshot: int) -> dict[str, str]:
        """Return all benchmark settings that affect outcomes, by lm-eval's names."""
        spec, chat = self._spec, bool(self._spec.apply_chat_template)
        is_single_turn = chat and num_fewshot and spec.fewshot_as_multiturn is False
        enable_thinking = spec.enable_thinking if chat else None
        settings = {
            "system_instruction": spec.system_instruction,
            "fewshot_as_multiturn": "false" if is_single_turn else None,
            "chat_template_args": spec.chat_template_args if chat else None,
            "enable_thinking": None if enable_thinking is None else str(enable_thinking).lower(),
            "think_end_token": spec.think_end_token if self._generated else None,
            "gen_kwargs": spec.gen_kwargs if self._generated else None,
            "samples": self._text_metrics.samples if self._is_sampled else None,
            "noise": NOISE if self._is_sampled else None,
            "budgets": ",".join(map(str, spec.budgets)) or None,
        }
        return {name: str(value) for name, value in settings.items() if value is not None}

    def _check_judging(self, task: ConfigurableTask) -> None:
        """Test the code of a user's task by computing metrics of dummy answers."""
        if not task.instances or not any(map(is_user_function, task.config.to_dict(True).values())):
            return
        instances = [i for i in task.instances if i.doc_id == task.instances[0].doc_id]
        answer = {_GENERATED: "", _ROLLING: -1.0}.get(task.OUTPUT_TYPE, (-1.0, False))
        metrics = task.process_results(instances[0].doc, [answer] * len(instances))
        if missing := set(task.aggregation()) - set(metrics):
            raise BenchmarkError(
                f"{task.task_name}: metric_list contains {', '.join(sorted(missing))}, but "
                f"process_results returns {', '.join(metrics) or 'no metric'}"
            )
        for metric, value in metrics.items():
            try:
                storable_value(value)
            except (TypeError, ValueError):
                raise BenchmarkError(
                    f"{task.task_name}: process_results returns {value!r} for {metric}; expected "
                    "a number or a list of numbers"
                ) from None

    def _build_identity(self, group: Group | None) -> BenchmarkIdentity:
        spec, documents = self._spec, self._request.documents
        tasks = self._tasks.values()
        counts = {task.get_config("num_fewshot") for task in tasks}
        num_fewshot = self._common_setting("num_fewshot", counts)
        preferred = ("acc_norm" if self._name in NORMALISED_TASKS else "acc", "bits_per_byte")
        aggregated = (group.aggregate_metric_list or []) if group else []
        halves = [choose_part(task, documents, num_fewshot) for task in tasks]
        pairs = zip(tasks, halves, strict=True)
        identities = {t.task_name: task_identity(t, num_fewshot, half) for t, half in pairs}
        for name in self._generated:
            identities[name] = self._text_metrics.extend_task(identities[name])
        metrics = [*next(iter(identities.values())).metrics]
        found_by = {
            "benchmark": spec.benchmark if spec.benchmark != self._name else "",
            "include_path": json.dumps(spec.include_path) if spec.include_path else "",
            "metadata": spec.metadata or "",
        }
        return BenchmarkIdentity(
            name=self._name,
            tasks=tuple(identities.values()),
            data=spec.data,
            num_fewshot=num_fewshot,
            seed=documents.seed if num_fewshot or any(halves) or self._is_sampled else None,
            apply_chat_template=bool(spec.apply_chat_template),
            settings=self._outcome_settings(num_fewshot) | part_setting(documents, halves),
            found_by={name: value for name, value in found_by.items() if value},
            primary_metric=next((name for name in preferred if name in metrics), metrics[0]),
            weight_by_size=all(metric.weight_by_size for metric in aggregated),
        )


def aggregate(aggregation: str, values: Sequence[MetricValue]) -> float | None:
    """Aggregate a metric over documents with lm-eval's own function.

    Args:
        aggregation: Name of the aggregation in lm-eval.
        values: Metric of each document, a number or JSON.

    Returns:
        The metric of the task; None if lm-eval has no function of this name.
    """
    if aggregation not in AGGREGATION_REGISTRY:
        return None
    items = [json.loads(value) if isinstance(value, str) else value for value in values]
    return float(get_aggregation(aggregation)(items))


def storable_value(value: Any) -> MetricValue:
    """Convert a document's metric to a number, or to JSON if it is a list."""
    if isinstance(value, tuple | list):
        return json.dumps([v.tolist() if hasattr(v, "tolist") else v for v in value])
    return float(value)


def _rename_limit(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's generation settings with the token limit named `max_gen_toks`."""
    aliases = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    lengths = [settings[name] for name in aliases if settings.get(name) is not None]
    limit = {"max_gen_toks": int(lengths[0])} if lengths else {}
    return {name: value for name, value in settings.items() if name not in aliases} | limit


def _first_answer(task: ConfigurableTask, doc: Mapping[str, Any]) -> str:
    """Return the first right answer to a document, preceded by the task's delimiter."""
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.get_config("doc_to_choice") is not None:
        target = task.doc_to_choice(doc)[target]
    return f"{task.config.target_delimiter}{first_text(target)}"


def first_text(value: object) -> str:
    """Convert a value, or the first value of a nested list, to text."""
    while isinstance(value, list | tuple):
        value = value[0] if value else ""
    return str(value)


def answer_request(encoder: RequestEncoder, prompt: Prompt, answer: str) -> Request:
    """Build the request that scores a right answer as the continuation of a prompt.

    An answer is cut to the model's context length. The end-of-text token replaces an empty answer.
    """
    instance = Instance("loglikelihood", doc={}, arguments=(prompt.text, answer), idx=0)
    (request,) = encoder.encode([instance])
    continuation = request.continuation[: encoder.max_length] or (int(encoder.eot_token_id),)
    return Request(request.context, continuation)


def _gold_index(task: ConfigurableTask, doc: Mapping[str, Any], requests: int) -> int | None:
    """Return the index of the request that contains the right answer.

    Returns None if the document has no right answer.
    """
    if task.OUTPUT_TYPE == _ROLLING:
        return None
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        choices = task.doc_to_choice(doc)
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < requests else None
