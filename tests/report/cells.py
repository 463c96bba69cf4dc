"""Cells of every kind, as records of what tests show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.helpers.ablations import with_change, with_figures
from tracker.schema.estimates import Estimate
from tracker.schema.records import CellRecord, RunRecord

from .conftest import LAYERS, build_cell, digest

LOSS_REASON = "bits_per_byte is no accuracy"
CHOICE_DROPS = {0: 0.15, 1: 0.2, 2: -0.09, 3: 0.003}
"""Layer → mean drop of the choice probability, of `cell_of_choices`; 0.08 for all other layers."""


def cell_of_choices(
    benchmark: str = "arc_easy", n: int = 100, half_width: float = 0.05, **changes: Any
) -> CellRecord:
    """Make a cell whose accuracy shows one layer, and whose choice probabilities show four."""
    cell = build_cell(benchmark, n=n, **changes)
    runs = []
    for run in cell.runs:
        choice, drop = CHOICE_DROPS.get(run.change.layer, 0.08), 0.4 * (run.change.layer == 1)
        small = half_width / (10 if run.change.layer in CHOICE_DROPS else 0.5)
        estimates = {
            "choice_drop": Estimate(choice, choice - small, choice + small),
            "drop": Estimate(drop, drop - 0.1, drop + 0.1, 1e-9 if drop else 0.9),
            "options_drop": Estimate(drop, drop - 0.1, drop + 0.1),
        }
        runs.append(run.model_copy(update=estimates))
    return cell.model_copy(update={"runs": tuple(runs)})


def loss_cell() -> CellRecord:
    cell = build_cell("wikitext")
    metrics = {"bits_per_byte": "bits_per_byte"}
    task = cell.benchmark.tasks[0].model_copy(
        update={"metrics": metrics, "higher_is_better": {"bits_per_byte": False}}
    )
    layers = tuple(
        with_figures(
            record,
            accuracy=3.25 + record.drop.value,
            accuracy_relevance=None,
            mcnemar_p=None,
            metrics={"bits_per_byte": 3.25 + record.drop.value},
            reasons={"accuracy_relevance": LOSS_REASON, "mcnemar_p": "not 0/1"},
        )
        for record in cell.runs
    )
    return cell.model_copy(
        update={
            "metric": "bits_per_byte",
            "higher_is_better": False,
            "chance_accuracy": None,
            "baseline": Estimate(3.25, 3.1, 3.4),
            "baseline_metrics": {"bits_per_byte": 3.25},
            "runs": layers,
            "benchmark": cell.benchmark.model_copy(update={"tasks": (task,)}),
            "reasons": {"chance_accuracy": LOSS_REASON},
        }
    )


NO_ROUNDING_REASON = "rounding errors are unknown, because no document was evaluated twice"


def half_precision_cell(**changes: Any) -> CellRecord:
    """Build a cell in bfloat16 whose layer 3 costs 4 pp, of which rounding moves 5."""
    cell = build_cell(baseline_rounded=7, baseline_rounding=0.0123)
    runs = [run.model_copy(update={"rounded": 5, "drop_rounding": 0.01}) for run in cell.runs]
    drop = replace(runs[3].drop, value=0.04, low=0.01, high=0.07)
    rounding_fields = {"rounded": 12, "drop_rounding": 0.05, "drop": drop}
    runs[3] = runs[3].model_copy(update=rounding_fields)
    model = cell.model.model_copy(update={"dtype": "bfloat16"})
    return cell.model_copy(update={"model": model, "runs": tuple(runs), **changes})


WHOLE_LAYERS_REASON = "this value is measured only for the removal of a single whole layer"


PROXIES = ("cosine_similarity", "cosine_score", "angular_distance", "relative_update")


def run_of_kind(record: RunRecord, component: str, span: int) -> RunRecord:
    """Make a run of another kind from that of a whole layer, with a drop of its own."""
    factor = {"layer": 1.0, "attention": 0.5, "mlp": 0.75}[component] * span
    return with_change(
        record,
        component=component,
        span=span,
        accuracy_drop=(record.drop.value or 0) * factor,
        **dict.fromkeys(PROXIES),
        reasons=dict.fromkeys(PROXIES, WHOLE_LAYERS_REASON),
    )


def cell_of_kinds(
    components: tuple[str, ...] = ("layer", "attention", "mlp"),
    spans: tuple[int, ...] = (1, 2, 4),
    **changes: Any,
) -> CellRecord:
    """Make a cell with a run of every component, span and layer that is left."""
    cell = build_cell()
    removed = set(changes.get("removed", ()))
    layers = tuple(
        record if (component, span) == ("layer", 1) else run_of_kind(record, component, span)
        for component in components
        for span in spans
        for record in cell.runs
        if record.change.layer + span <= LAYERS
        and not removed & set(range(record.change.layer, record.change.layer + span))
    )
    return cell.model_copy(update={"runs": layers, **changes})


def cell_without(*removed: int, **changes: Any) -> CellRecord:
    """Make a cell whose runs all lack some layers."""
    fields = {"remaining": Estimate(0.41, 0.34, 0.49)}
    return cell_of_kinds(("layer",), (1,), removed=removed, **{**fields, **changes})


def part_run(record: RunRecord, **fields: Any) -> RunRecord:
    """Make a run of a head, or of a stretch that is passed again, from that of a whole layer."""
    return with_change(record, **fields, **dict.fromkeys(PROXIES))


def edited_cell(
    fingerprint_text: str, measured: str | None, model: str = "SmolLM2", **changes: Any
) -> CellRecord:
    """Return a cell of a task that was edited: the same but for its fingerprint."""
    cell = build_cell("our_sums", model=model)
    (task,) = cell.benchmark.tasks
    tasks = (task.model_copy(update={"fingerprint": digest(fingerprint_text)}),)
    benchmark_fields = changes.pop("benchmark", {})
    benchmark = cell.benchmark.model_copy(update={"tasks": tasks, **benchmark_fields})
    fields = {
        "key": digest(fingerprint_text + model),
        "benchmark": benchmark,
        "measured": measured,
        **changes,
    }
    return cell.model_copy(update=fields)


OLD_EDITION = edited_cell("one", "2026-11-25T08:00:00+00:00")


NEW_EDITION = edited_cell("two", "2026-11-28T09:30:00+00:00")


MIDDLE_EDITION = edited_cell("three", "2026-11-28T07:15:00+00:00")


def models_sharing_one() -> list[CellRecord]:
    """Make three models that share a benchmark."""
    return [
        *(build_cell(b, model="solid", seed=1, baseline=0.9) for b in ("arc_easy", "piqa")),
        build_cell("arc_easy", model="weak", seed=1, baseline=0.5),
        build_cell("arc_easy", model="other", seed=1, baseline=0.6),
        build_cell("rte", model="weak", baseline=0.25),
    ]


def keep_layers(cell: CellRecord, *layers: int) -> CellRecord:
    runs = tuple(run for run in cell.runs if run.change.layer in layers)
    return cell.model_copy(update={"runs": runs})


def models_sharing_some() -> list[CellRecord]:
    """Make four models, of which one shares nothing with the others."""
    return [
        *(build_cell(b, model=m, seed=1) for m in ("a", "b") for b in ("arc_easy", "piqa", "sciq")),
        *(build_cell(b, model="c", seed=2) for b in ("arc_easy", "sciq")),
        build_cell("piqa", model="d"),
    ]
