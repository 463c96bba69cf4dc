"""Define a request: a model, a benchmark, their settings, and the changes to measure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, model_validator

from tracker.schema.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.schema.errors import BenchmarkError, ExperimentError
from tracker.schema.extent import UNLIMITED_SAMPLE, Clusters, DocumentPart, Extent, Positive
from tracker.schema.fields import (
    BenchmarkName,
    Budgets,
    Count,
    Dtype,
    Folders,
    JsonArguments,
    Layers,
    Name,
    QuestionText,
    StrictModel,
    Times,
    as_tuple,
    validate_settings,
)
from tracker.schema.kinds import NUMBERED_COMPONENTS, OUTER_MATRICES, UNITS, Component, Intervention
from tracker.schema.questions import Question, parse_question
from tracker.schema.weight_formats import FORMATS

EXECUTORS = {
    "local": "tracker.measuring.executors.local:LocalExecutor",
    "ray": "tracker.measuring.executors.ray:RayExecutor",
    "slurm": "tracker.measuring.executors.slurm:SlurmExecutor",
}
"""Name of an executor → its class, which is imported on first use."""
EXECUTORS_GROUP = "layer_tracker.executors"
"""The entry-point group in which other packages register executors."""
CORPUS_PREFIX = "corpus:"
TRACES_PREFIX = "traces:"
OFFLOAD_PLACES = ("device", "host", "disk")
"""Places where offloaded layers are stored."""
COMPETITORS = ("vllm",)
"""Programs with which the engine can be compared, in addition to lm-eval with transformers."""


def executor_names() -> tuple[str, ...]:
    """List the names of all executors, including executors from other packages."""
    from importlib.metadata import entry_points

    names = entry_points(group=EXECUTORS_GROUP).names
    return tuple(dict.fromkeys((*EXECUTORS, *sorted(names))))


SpecType = TypeVar("SpecType", bound=BaseModel)


class ModelSpec(StrictModel):
    """Settings that choose a model and its weights."""

    model: Name
    """Model: hub id, folder, .gguf file, or package:NAME."""
    revision: Name | None = None
    """Branch, tag or commit on the Hugging Face hub."""
    dtype: Dtype = "auto"
    """Data type of the weights. auto: the data type of the checkpoint."""
    model_args: JsonArguments | None = None
    """Arguments for loading the model, e.g. peft=ADAPTER or load_in_4bit=True."""

    def __str__(self) -> str:
        return self.model

    @property
    def order(self) -> list[str]:
        """The sort key that places requests for the same model next to each other."""
        return [str(value) for _, value in self]


class BenchmarkSpec(StrictModel):
    """A benchmark and the settings of its prompts; lm-eval uses the same names."""

    benchmark: BenchmarkName
    """Benchmark: task or group of lm-eval, YAML file, corpus:FILE, or traces:TASK."""
    num_fewshot: Count | None = None
    """Number of few-shot examples (default: as defined by the task)."""
    data: Name = "hub"
    """Source of the benchmark's documents: hub, package:NAME or a folder."""
    include_path: Folders = ()
    """Folder with your own tasks, or a list of folders. The code of the tasks is executed."""
    system_instruction: Name | None = None
    """System prompt."""
    apply_chat_template: bool | Name = False
    """Chat template: true, or the name of a template (default: none)."""
    fewshot_as_multiturn: bool | None = None
    """Format few-shot examples as turns of a chat (default: yes if a chat template is used)."""
    chat_template_args: JsonArguments | None = None
    """Arguments of the chat template."""
    enable_thinking: bool | None = None
    """Let the model think before it answers. Needs think_end_token."""
    think_end_token: int | Name | None = None
    """Token that ends the thinking; the answer is the text after it."""
    gen_kwargs: JsonArguments | None = None
    """Arguments of generation, e.g. max_gen_toks=64,until=… or JSON."""
    samples: Positive | None = None
    """Number of texts to sample per document. Needs a temperature in gen_kwargs."""
    budgets: Budgets = ()
    """Smaller numbers of generated tokens after which texts are also judged, e.g. 64,128."""
    metadata: JsonArguments | None = None
    """Metadata for tasks that generate their documents, such as RULER."""

    @model_validator(mode="after")
    def _check_thinking(self) -> BenchmarkSpec:
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError("enable_thinking needs think_end_token, e.g. </think>, as in lm-eval")
        return self

    def __str__(self) -> str:
        return self.benchmark

    @property
    def generation_key(self) -> str | None:
        """The given setting that only generation tasks allow: `samples`, `budgets` or None."""
        return "samples" if self.samples else "budgets" if self.budgets else None

    def renamed(self, benchmark: str) -> BenchmarkSpec:
        """Return a copy of the settings with the name of another benchmark."""
        return self.model_copy(update={"benchmark": benchmark})


def names_corpus(benchmark: str) -> bool:
    """Return whether a benchmark's name denotes a text corpus, not a task of lm-eval."""
    return benchmark.startswith(CORPUS_PREFIX)


def names_traces(benchmark: str) -> bool:
    """Return whether a benchmark's name begins with `traces:`.

    For the benchmark `traces:TASK`, the intact model generates texts, and changed models score the
    generated texts.
    """
    return benchmark.startswith(TRACES_PREFIX)


def generation_spec(spec: BenchmarkSpec) -> BenchmarkSpec:
    """Return a copy of the settings that names TASK instead of `traces:TASK`.

    For `traces:TASK`, the intact model generates texts from the documents of TASK. The settings of
    other benchmarks are returned unchanged. BenchmarkError is raised if TASK is empty or not a task
    of lm-eval.
    """
    task = spec.benchmark.removeprefix(TRACES_PREFIX)
    if names_traces(spec.benchmark) and (not task or names_traces(task) or names_corpus(task)):
        raise BenchmarkError(
            f"{spec.benchmark!r} does not name a generation task; write traces:TASK, e.g. "
            "traces:gsm8k"
        )
    return spec.renamed(task)


class DocumentSpec(StrictModel, Extent):
    """Selection of a benchmark's documents, e.g. a random sample of the test part."""

    part: DocumentPart | None = None
    """Part of the documents: calibration to choose the pruned parts, or test to evaluate them. The
    two parts are the training split and the scored split. Without a training split, they are two
    random halves of the scored split (default: all documents that lm-eval scores)."""


class ChangeGrid(StrictModel):
    """Grid of requested changes: all combinations of layers, components, spans and other
    settings."""

    layers: tuple[Count, ...]
    """Layer to change, 0-based (default: all)."""
    components: tuple[Component, ...] = ("layer",)
    """Component to change: the whole layer, one of its sublayers, or a part of a sublayer."""
    spans: tuple[Positive, ...] = (1,)
    """Number of consecutive layers that are removed together, beginning with the given layer."""
    interventions: tuple[Intervention, ...] = ("remove",)
    """Intervention on the component: remove it, or replace it by a fitted mean update (mean),
    factor (scale) or linear map (linear). A weight format (int4, q4_k, …) rounds the weights. The
    intervention repeat executes the layers of the span again."""
    heads: tuple[Count, ...] = ()
    """Head of the layer (component head), or group of heads that share keys and values (component
    kv_head), 0-based (default: all)."""
    experts: tuple[Count, ...] = ()
    """Routed expert of the layer (component expert), 0-based (default: all)."""
    neurons: tuple[Count, ...] = ()
    """Group of neurons of the layer's MLP (component neuron), 0-based. Groups are sorted by the
    norms of their weights; group 0 has the largest norms (default: all)."""
    maps: tuple[Name, ...] = ()
    """Linear map of the layer (component linear), by its name in the checkpoint: self_attn.q_proj,
    mlp.down_proj, mlp.experts.down_proj (all experts), mlp.experts.7.down_proj (one expert).
    attention or mlp: all maps of the sublayer. embedding or lm_head: a matrix outside the layers
    (default: each map of the layer separately)."""
    repeats: tuple[Times, ...] = (2,)
    """Number of times that the layers are executed (intervention repeat)."""
    control: Literal["random"] | None = None
    """random: also measure 40 random sets with as many layers as a span, as a control for spans."""


class Changes(ChangeGrid):
    """Requested changes, either as a grid or as an explicit list."""

    layers: tuple[Count, ...] = ()
    exact: tuple[Change, ...] | None = None
    """A list of the changes, if they are not all combinations of the grid; else None."""

    def expand(self) -> Iterator[Change]:
        """Yield the requested changes without checking them."""
        if self.exact is not None:
            yield from self.exact
            return
        fields = (self.components, self.interventions, self.spans, self.layers)
        for component, intervention, span, layer in product(*fields):
            numbers = self.numbers(component) if component in NUMBERED_COMPONENTS else (None,)
            maps = self.maps if component == "linear" else (None,)
            repeats = self.repeats if intervention == "repeat" else (2,)
            for number, name, passes in product(numbers, maps, repeats):
                layers = () if name in OUTER_MATRICES else (*range(layer, layer + span),)
                part = name if number is None else number
                yield Change(component, layers, intervention, part, passes)

    def with_exact(self, changes: Iterable[Change]) -> Changes:
        """Return a copy that requests only the listed changes instead of a grid."""
        return self.model_copy(update={"exact": tuple(changes)})

    def numbers(self, component: Component) -> tuple[int, ...]:
        """Return which heads, experts or neurons (0-based) are requested; empty means all."""
        numbers: tuple[int, ...] = getattr(self, number_field(component))
        return numbers

    @property
    def numbered(self) -> list[Component]:
        """The requested components that have several numbered parts per layer, such as heads."""
        return [component for component in self.components if component in NUMBERED_COMPONENTS]

    @property
    def has_parts(self) -> bool:
        """True if the request includes heads, experts, neurons or linear maps of a layer."""
        return bool(self.numbered) or "linear" in self.components

    @property
    def lacks_maps(self) -> bool:
        """True if the request includes linear maps but does not list their names."""
        return "linear" in self.components and not self.maps

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that are removed by a change of one whole layer, sorted."""
        return tuple(sorted(change.layer for change in self.expand() if change.kind == WHOLE_LAYER))

    @property
    def first_change(self) -> Change:
        """The first requested change.

        ExperimentError is raised if heads, experts, neurons or linear maps are requested, but none
        is named.
        """
        if self.lacks_maps:
            raise ExperimentError(
                "the name of the linear map is missing; give e.g. --map mlp.down_proj (in a sweep "
                "file: 'map: {values: [mlp.down_proj]}'). For all linear maps of the layer at "
                "once, give --component layer"
            )
        for component in self.numbered:
            if not self.numbers(component):
                key = FILE_KEYS[number_field(component)]
                raise ExperimentError(
                    f"the number of the {component} is missing; give e.g. --{key} 0"
                )
        return next(self.expand())


class CellSettings(ChangeGrid, DocumentSpec, BenchmarkSpec, ModelSpec):
    """Settings for measuring one model on one benchmark.

    The fields define the keys of experiment files and the options of the command line.
    """

    removed: Layers = ()
    """Layers that are removed in every run, e.g. 3,17 or 3-7 or [3, 17]."""
    until: QuestionText | None = None
    """Question about all runs of the benchmark, such as 'top 5'. The measurement ends when the
    question is answered."""
    metric: Name | None = None
    """Metric to report (default: the primary metric of the benchmark)."""
    cluster: Name | None = None
    """Column that identifies clusters of dependent documents, such as passage or subject. task: the
    tasks of a group are the clusters. Intervals then only assume that clusters are independent
    (default: documents are independent)."""
    observe: Annotated[tuple[Literal["kl"], ...], BeforeValidator(as_tuple)] = ()
    """Additional statistics to measure for every run. kl: KL divergence of the output at the tokens
    of right answers."""

    @model_validator(mode="after")
    def _check_until(self) -> CellSettings:
        keys = [k for k in ("sample", "limit", "observe") if getattr(self, k) not in (None, ())]
        if self.until is not None and keys:
            raise ValueError(f"until and {keys[0]} are both given; leave one of them out")
        if self.until is not None and self.cluster is not None:
            raise ValueError(
                "until and cluster are both given; leave one of them out. The intervals of a "
                "stopping rule (until) do not take clusters into account"
            )
        return self

    def spec(self, kind: type[SpecType]) -> SpecType:
        """Return the settings of one class, such as `ModelSpec`, as an object of this class."""
        return kind(**{name: value for name, value in self if name in kind.model_fields})

    @property
    def request(self) -> CellRequest:
        """The settings as a request, grouped into model, benchmark, documents and changes."""
        return CellRequest(
            model=self.spec(ModelSpec),
            benchmark=self.spec(BenchmarkSpec),
            documents=self.spec(DocumentSpec),
            changes=self.spec(Changes),
            removed=self.removed,
            until=None if self.until is None else parse_question(self.until),
            metric=self.metric,
            clusters=None if self.cluster is None else Clusters(column=self.cluster),
            observe=self.observe,
        )


_DEFAULT_DOCUMENTS, _NO_CHANGES = DocumentSpec(), Changes()


@dataclass(frozen=True)
class CellRequest:
    """A request to measure changes of one model on documents of one benchmark.

    Attributes:
        model: The settings that choose the model's weights.
        benchmark: The benchmark and the settings of its prompts.
        documents: The selection of documents to measure.
        changes: The changes to measure, e.g. the removal of each layer.
        removed: The layers that are removed in every run, ascending.
        until: The stopping rule; None to measure all documents. The rule `top 5`, for example, ends
            the measurement when the five largest drops are known.
        metric: The reported metric; None for the benchmark's primary metric.
        clusters: The clusters of dependent documents; None if all documents are independent.
        observe: The statistics to measure in addition to the outcomes, such as `kl`.
    """

    model: ModelSpec
    benchmark: BenchmarkSpec
    documents: DocumentSpec = _DEFAULT_DOCUMENTS
    changes: Changes = _NO_CHANGES
    removed: tuple[int, ...] = ()
    until: Question | None = None
    metric: str | None = None
    clusters: Clusters | None = None
    observe: tuple[str, ...] = ()

    @property
    def settings(self) -> CellSettings:
        """The request's settings as one flat object; extra statistics (`observe`) are left out."""
        settings: dict[str, Any] = {"removed": self.removed, "metric": self.metric}
        settings["until"] = None if self.until is None else str(self.until)
        settings["cluster"] = None if self.clusters is None else self.clusters.column
        for group in (self.model, self.benchmark, self.documents, self.changes):
            settings |= {name: value for name, value in group if name != "exact"}
        return CellSettings.model_construct(**settings)

    @property
    def extent(self) -> Extent:
        """The requested documents; if `until` is set, all documents in random order."""
        if self.until is not None:
            return Extent(sample=UNLIMITED_SAMPLE, seed=self.documents.seed)
        return self.documents

    @property
    def title(self) -> str:
        """The name of the request in messages, such as `llama × piqa without 3, 17`."""
        removed = f" without {', '.join(map(str, self.removed))}" if self.removed else ""
        metric = f" by {self.metric}" if self.metric else ""
        part = f" ({self.documents.part})" if self.documents.part else ""
        cluster = f" clustered by {self.clusters.column}" if self.clusters else ""
        return f"{self.model} × {self.benchmark}{part}{removed}{metric}{cluster}"

    def with_changes(self, changes: Iterable[Change] | None = None, **grid: Any) -> CellRequest:
        """Return a copy of the request with the list `changes`, or with the grid `grid`."""
        if changes is not None:
            return replace(self, changes=self.changes.with_exact(changes))
        return replace(self, changes=Changes(**grid))

    def on_part(self, part: DocumentPart, **size: int | None) -> CellRequest:
        """Return a copy of the request for the documents of one part of the benchmark.

        The keyword argument `limit` or `sample` sets the number of documents.
        """
        update = {"part": part, **size}
        return replace(self, documents=self.documents.model_copy(update=update))

    def invalid_reason(self, change: Change, layers: int) -> str | None:
        """Return the reason why a change cannot be measured; None if the change is valid.

        Args:
            change: The change to check.
            layers: Number of layers of the intact model.

        Returns:
            The reason; None if the change is valid.
        """
        component, intervention = change.component, change.intervention
        if component not in (*UNITS, "linear") and (intervention, change.span) != ("remove", 1):
            return f"component {component} allows only the removal from one layer at a time"
        if component == "linear" and (intervention not in FORMATS or change.span != 1):
            return "a linear map can only be quantised, e.g. to int4, and in one layer at a time"
        if change.is_outer:
            return None
        if intervention == "repeat" and component != "layer":
            return "repeat applies to whole layers only"
        if intervention in FORMATS and component not in ("layer", "linear"):
            return f"{intervention} applies to layers, or to linear maps (component: linear)"
        if intervention not in ("remove", "repeat") and change.span != 1:
            return f"{intervention} applies to single layers only"
        if intervention not in ("remove", "repeat", *FORMATS) and component != "layer":
            return f"{intervention} applies to single whole layers only"
        if change.stop > layers:
            return f"{change.layer_words} cannot be changed: the last layer is {layers - 1}"
        if removed := {*change.layers} & {*self.removed}:
            reason = f"every run removes layer {min(removed)}"
            return f"{change.layer_words} cannot be changed: {reason}"
        if len(Ablation.from_changes(change, removed=self.removed).removed()) >= layers:
            return "no layer would be left"
        return None

    def valid_changes(self, layers: int) -> list[Change]:
        """List the requested changes that are valid for a model with `layers` layers, once each."""
        changes = dict.fromkeys(self.changes.expand())
        return [change for change in changes if self.invalid_reason(change, layers) is None]

    def ablations(self, layers: int) -> list[Ablation]:
        """List the ablations to measure, starting with the baseline."""
        runs = [(), *((change,) for change in self.valid_changes(layers))]
        ablations = (Ablation.from_changes(*run, removed=self.removed) for run in runs)
        return list(dict.fromkeys([INTACT, *ablations]))


def number_field(component: Component) -> Literal["heads", "experts", "neurons"]:
    """Return the field of `ChangeGrid` for a component's numbers, such as `heads`."""
    if component == "neuron":
        return "neurons"
    return "experts" if component == "expert" else "heads"


def all_ablations(requests: Iterable[CellRequest], layers: int) -> list[Ablation]:
    """List the ablations of all requests, without duplicates."""
    ablations = (request.ablations(layers) for request in requests)
    return list(dict.fromkeys(chain.from_iterable(ablations)))


def cell_request(**settings: Any) -> CellRequest:
    """Build a request from keyword arguments; ignore settings that are None.

    RequestError is raised for an invalid setting.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return validate_settings(CellSettings, given, "--", FILE_KEYS).request


def stored_request(settings: Mapping[str, Any]) -> CellRequest:
    """Build a request from settings that this or a former version stored."""
    fields = {name: settings[name] for name in CellSettings.model_fields if name in settings}
    return CellSettings.model_validate_json(json.dumps(fields)).request


def run_request(settings: Mapping[str, Any]) -> CellRequest:
    """Build a request for one run from settings with the keys of experiment files.

    For example, an experiment file has the key `layer` for the field `layers`.
    """
    fields = {FIELDS_BY_KEY.get(k, k): value for k, value in settings.items() if value is not None}
    return cell_request(**{f: (v,) if f in FILE_KEYS else v for f, v in fields.items()})


FILE_KEYS = {
    "layers": "layer",
    "components": "component",
    "spans": "span",
    "interventions": "intervention",
    "heads": "head",
    "experts": "expert",
    "neurons": "neuron",
    "maps": "map",
    "repeats": "repeats",
}
"""Field that can have several values → its key in experiment files and its option."""
_FIRST_FIELDS = (
    *("model", "benchmark", *ChangeGrid.model_fields, "removed", "revision", "dtype"),
    *("num_fewshot", "part", "limit", "sample", "until", "metric", "seed", "data", "model_args"),
)
"""First fields in experiment files and in `--help`; all other fields follow them."""
FIELDS_BY_KEY: Mapping[str, str] = {
    FILE_KEYS.get(field, field): field
    for field in dict.fromkeys((*_FIRST_FIELDS, *CellSettings.model_fields))
}
"""Keys of experiment files, options and keywords → the field of `CellSettings`."""
