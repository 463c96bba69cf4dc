"""How the engine's time grows: with documents, with layers, with ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tracker.bench.compare import Prepared, prepare, timed
from tracker.core.ablations import INTACT, Ablation, ablations_of
from tracker.core.config import CellRequest
from tracker.measuring.job import Options
from tracker.measuring.progress import Progress

if TYPE_CHECKING:
    from tracker.core.documents import Document

PARTS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
"""Parts of the documents, layers and ablations that are timed."""
BATCH_SIZE = 8
"""lm-eval's, for the naive curve."""


@dataclass(frozen=True)
class TimingCurve:
    """Seconds against a size.

    `loop` is lm-eval once per ablation, extrapolated from one evaluation of the intact model at
    each size.
    """

    size: str
    sizes: tuple[int, ...]
    engine: tuple[float, ...]
    loop: tuple[float, ...]

    @property
    def powers(self) -> tuple[float, float]:
        """With which power of the size the engine's and the loop's time grow: log-log slopes."""
        sizes = np.log(self.sizes)
        engine, loop = (np.polyfit(sizes, np.log(y), 1)[0] for y in (self.engine, self.loop))
        return float(engine), float(loop)


@dataclass(frozen=True)
class Curves:
    """All curves of one model and benchmark: against documents, layers and ablations."""

    title: str
    curves: tuple[TimingCurve, ...]

    def as_json(self) -> dict[str, Any]:
        """Give the figures as plain values."""
        return asdict(self)

    def text(self) -> str:
        """Put the figures into words."""
        lines = [self.title]
        for curve in self.curves:
            engine, loop = curve.powers
            lines.append(
                f"{curve.size}: the engine's time grows with the power {engine:.2f}, "
                f"the loop's with {loop:.2f}"
            )
            lines += [
                f"{size:12d}  engine {ours:8.1f} s  lm-eval loop {theirs:8.1f} s"
                for size, ours, theirs in zip(curve.sizes, curve.engine, curve.loop, strict=True)
            ]
        return "\n".join(lines)


def scaling(request: CellRequest, options: Options, progress: Progress) -> Curves:
    """Time growing pieces of a sweep that removes all layers.

    RequestError for something that does not exist.
    """
    ready = prepare(request, options, progress)
    layers = ready.engine.loaded.identity.layers
    every = request.model_copy(update={"layers": tuple(range(layers)), "spans": (1,)})
    ablations = ablations_of(every, layers)
    ready.engine.score(ready.documents[:1], ablations)  # first use of memory is slow

    def curve(name: str, whole: int) -> TimingCurve:
        sizes = tuple(sorted({max(1, round(part * whole)) for part in PARTS}))
        seconds = []
        for size in sizes:
            progress.say(f"{size} {name}")
            seconds.append(_seconds(ready, name, size, ablations))
        engine, loop = zip(*seconds, strict=True)
        return TimingCurve(name, sizes, engine, loop)

    return Curves(
        f"{request.model} · {ready.title}, {len(ready.documents)} documents, {layers} layers, "
        f"{len(ablations)} ablations",
        (
            curve("documents", len(ready.documents)),
            curve("layers", layers),
            curve("ablations", len(ablations)),
        ),
    )


def _seconds(
    ready: Prepared, name: str, size: int, ablations: Sequence[Ablation]
) -> tuple[float, float]:
    """Time one size: the engine, and the lm-eval loop extrapolated from its baseline."""
    documents: Sequence[Document] = ready.documents
    if name == "documents":
        documents = documents[:size]
    elif name == "ablations":
        # Evenly spread, so that the layers do not count.
        places = np.linspace(1, len(ablations) - 1, size - 1).round().astype(int)
        ablations = [INTACT, *(ablations[place] for place in places)]
    removed: tuple[int, ...] = ()
    if name == "layers":
        removed = tuple(range(size, ready.engine.loaded.identity.layers))
        ablations = [a for a in ablations if not {*a.layers, *a.attention, *a.mlp} & {*removed}]
    pruned = ready.engine.without(Ablation(removed)).with_sharing(ready.engine.sharing)
    smaller = replace(ready, engine=pruned)
    engine, _ = timed(lambda: smaller.engine.score(documents, ablations))
    one, _ = smaller.plainly(INTACT, BATCH_SIZE, documents)
    return engine, one * len(ablations)
