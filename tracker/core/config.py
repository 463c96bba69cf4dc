"""What is asked for: one (model, benchmark) with its settings, and the kinds of their values."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from tracker.core.arguments import Arguments
from tracker.core.errors import RequestError
from tracker.core.extent import DEFAULT_SEED, EVERY, Extent, Part, Positive
from tracker.core.kinds import Component, Intervention
from tracker.core.problems import first_problem
from tracker.core.questions import Question, question
from tracker.core.safe_yaml import short

T = TypeVar("T")


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


def _folders(given: Any) -> Any:
    """Take one folder, or several as a list, also as W&B writes one."""
    if isinstance(given, str) and given.startswith("["):
        with suppress(ValueError):
            given = json.loads(given.replace("'", '"'))
    return (
        tuple(given) if isinstance(given, list) else (given,) if isinstance(given, str) else given
    )


def _asked(text: str) -> str:
    """Write a question as it is understood."""
    return str(question(text))


Folders = Annotated[tuple[Name, ...], BeforeValidator(_folders)]
Layers = Annotated[tuple[Count, ...], BeforeValidator(_ascending)]
MAX_LAYERS = 10_000
"""Of a model; no model has a tenth of it."""


class Strict(BaseModel):
    """What somebody wrote: no unknown field, no other kind of value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class CellRequest(Strict):
    """One (model, benchmark) as it was asked for, with all its layers."""

    model: Name
    benchmark: Name
    layers: tuple[int, ...]
    components: tuple[Component, ...] = ("layer",)
    """What of the layers is removed, one after the other."""
    spans: tuple[Positive, ...] = (1,)
    """How many layers are removed together, from each of `layers` on."""
    interventions: tuple[Intervention, ...] = ("remove",)
    """What is done to them, one after the other; only whole single layers are replaced."""
    only: tuple[tuple[Component, int, int, Intervention], ...] | None = None
    """Which (component, span, layer, intervention) of these are asked for; None = every
    combination."""
    removed: Layers = ()
    """Layers that are removed as a whole besides, in every run; ascending."""
    revision: Name | None = None
    dtype: Dtype = "auto"
    num_fewshot: Count | None = None
    """None = what the task itself asks for, as in lm-eval."""
    part: Part | None = None
    """Of two sets of documents that never meet: the training split and the scored one, or else two
    halves of the scored one, drawn with `seed`; None = all that lm-eval scores."""
    limit: Positive | None = None
    """Documents per task, from the first; None = all, as in lm-eval."""
    sample: Positive | None = None
    """Documents per task, drawn at random with `seed`; None = not drawn."""
    until: Annotated[Name, AfterValidator(_asked)] | None = None
    """A question: documents come in the random order of `seed` until it is answered."""
    metric: Name | None = None
    """None = the metric that the benchmark's field reports."""
    seed: int = DEFAULT_SEED
    data: Name = "hub"
    # What follows has lm-eval's names and meanings.
    model_args: Arguments | None = None
    """How the model is loaded: peft, load_in_4bit, attn_implementation, subfolder."""
    include_path: Folders = ()
    """Folders with tasks of one's own: YAML files, and the Python that they name."""
    system_instruction: Name | None = None
    apply_chat_template: bool | Name = False
    """Whether, or the name of the template."""
    fewshot_as_multiturn: bool | None = None
    """None = lm-eval's default: yes, with a chat template."""
    chat_template_args: Arguments | None = None
    enable_thinking: bool | None = None
    think_end_token: int | Name | None = None
    """What of a generated text comes before it is no answer."""
    gen_kwargs: Arguments | None = None
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


def cell_request(**settings: Any) -> CellRequest:
    """Make a request of options (None = not said); RequestError for a value of the wrong kind."""
    try:
        return CellRequest(**{name: v for name, v in settings.items() if v is not None})
    except ValidationError as error:
        raise RequestError(first_problem(error, CellRequest, "--", IN_THE_FILE)) from None


IN_THE_FILE = {
    "layers": "layer",
    "components": "component",
    "spans": "span",
    "interventions": "intervention",
}
