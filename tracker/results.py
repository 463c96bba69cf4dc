"""What was measured, as notebooks and scripts read it.

A progress bar stands where a notebook runs.
"""

from __future__ import annotations

import html
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.core.errors import RequestError, did_you_mean
from tracker.core.records import CellRecord
from tracker.ledger.store import Ledger
from tracker.measuring.derive import every_record
from tracker.measuring.progress import Progress, Silent
from tracker.runner import Finished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd
    import plotly.graph_objects as go

    from tracker.analysis.ranks.layers import LayerBoard


def default_progress() -> Progress:
    """Listen with a bar in a notebook, and not at all elsewhere."""
    # What was not imported does not run; importing it takes half a second.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Bar() if getattr(shell, "kernel", None) is not None else Silent()


class Bar(Progress):
    """Shows a run below a notebook's code: a bar, and lines above it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def say(self, message: str) -> None:
        """Print a line."""
        print(message)  # noqa: T201

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Open the bar of some work."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is plain text without ipywidgets
            from tqdm.auto import tqdm
        self._bar = tqdm(total=total, desc=title, unit=f" {unit}", disable=False)

    def expect(self, more: int) -> None:
        """Let the bar be longer, or shorter."""
        if self._bar is not None:
            self._bar.total += more
            self._bar.refresh()

    def advance(self, responses: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(responses)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


_ROWS = 10
"""Layers in the table that a notebook or a terminal shows."""


@dataclass(frozen=True)
class Results:
    """What was measured; a notebook shows the answer and the layers that cost most.

    Attributes:
        cells: One record a (model, benchmark), in the order of the experiment.
        report: The report page of the results folder; None where it could not be written.
        outcome: What failed, what was not published, and where the runs can be seen.
        experiment: Where the results folder keeps what was asked for, as an experiment file.
        folder: The results folder.

    Example:
        >>> results = tracker.load("results")
        >>> results.layers.sort_values("accuracy_drop")
        >>> results.plot()
    """

    cells: tuple[CellRecord, ...] = field(repr=False)  # thousands of figures
    report: Path | None
    outcome: Finished = field(repr=False)
    experiment: Path | None = None
    folder: Path = Path("results")

    @property
    def layers(self) -> pd.DataFrame:
        """One row a (model, benchmark, run): fractions; `layer` is its first layer, 0-based.

        `shown` is what the page shows of the run on its benchmark, all runs of its kind at once:
        `matters`, `better without`, `below 5 pp` or `open`.

        Example:
            >>> results.layers.query("shown == 'matters'")
            >>> results.layers[["layer", "accuracy_drop", "cosine_score"]]
        """
        from tracker.report.frames import layer_frame

        return layer_frame(self.cells)

    @property
    def correlations(self) -> pd.DataFrame:
        """One row a (model, benchmark, proxy, coefficient, subset of layers).

        `low` and `high` say where `value` would be with other documents and the same layers,
        `p_value` how often unrelated layers, as smooth over depth, would correlate as strongly.

        Example:
            >>> results.correlations.query("proxy == 'cosine_score'")
        """
        from tracker.report.frames import correlation_frame

        return correlation_frame(self.cells)

    @property
    def documents(self) -> pd.DataFrame:
        """One row a (model, benchmark, run, document): what the model answers, intact and without.

        `change` is `lost`, `won` or `same`; `score_intact` and `score` are the document's metric,
        of which more is better. Texts are there where the results folder holds them.

        Example:
            >>> documents = results.documents
            >>> documents.query("layer == 11 and change == 'lost'")[["question", "answer"]]
        """
        from tracker.analysis.decisions import decisions
        from tracker.report.frames import document_frame

        mine = {cell.place: cell for cell in self.cells}
        records = every_record(Ledger.existing(self.folder).contents()) if mine else ()
        found = [(r, decisions(s, asked.view)) for r, s, asked in records if r.place in mine]
        return document_frame([(r, each) for r, each in found if each], changed=False)

    def plot(self, model: str | None = None) -> go.Figure:
        """Draw what each layer costs, above its cosine score.

        Args:
            model: Which model, by its name in `layers`; None where there is one.

        Returns:
            The figure, which a notebook shows.

        Raises:
            RequestError: There is no such model, there are several, or no benchmark counts.

        Example:
            >>> results.plot().write_html("layers.html")
        """
        from tracker.report.charts.headline import headline

        boards = {name: board for name, _, board in self._models()}
        names = list(boards)
        if model is None and len(boards) > 1:
            raise RequestError(f"there are several models; say which: plot({names[0]!r})")
        name = names[0] if model is None and names else model or ""
        if name not in boards:
            near = did_you_mean(name, names)
            raise RequestError(f"there is no model {name!r} here.{near}")
        if not boards[name].layers:
            why = "; ".join(f"{what}: {reason}" for what, reason in boards[name].left_out.items())
            raise RequestError(f"no benchmark of {name} has a picture of all layers. {why}")
        return headline(boards[name], name).figure()

    @property
    def answer(self) -> str:
        """Answer in a few sentences, a line a model: which layers and parts are shown to matter.

        Example:
            >>> print(results.answer)
        """
        return "\n".join(answer for _, answer, _ in self._models()) or "Nothing is measured."

    def _models(self) -> Iterator[tuple[str, str, LayerBoard]]:
        """Yield the name of each model, its answer (beside others with the name), its layers."""
        from tracker.analysis.comparable import named_models
        from tracker.analysis.ranks.layers import layer_board
        from tracker.analysis.ranks.parts import model_answer, part_boards

        groups = named_models(self.cells)
        for name, group in groups.items():
            board = layer_board(group)
            answer = model_answer(board.claims, part_boards(group), group)
            yield name, f"{name}: {answer}" if len(groups) > 1 else answer, board

    def _render(self, line: Callable[[str], str], table: Callable[[pd.DataFrame], str]) -> str:
        """Render the answers, the layers that matter most, and what went wrong."""
        from tracker.report.export import texts
        from tracker.report.leaderboard import layer_board_table

        parts = [] if self.cells else [line(self.answer)]
        for name, answer, board in self._models():
            parts.append(line(answer))
            if board.layers:
                frame = texts(layer_board_table(board, name))
                parts.append(table(frame.head(_ROWS)))
                if len(frame) > _ROWS:
                    parts.append(line(f"{_ROWS} of {len(frame)} layers; all are in .layers"))
        problems = {**self.outcome.failed, **self.outcome.damaged}
        return "".join([*parts, *(line(f"{name}: {reason}") for name, reason in problems.items())])

    def __str__(self) -> str:
        """Return the answer, and the table that `tracker leaderboard` prints."""
        style: dict[str, Any] = {"index": False, "tablefmt": "simple", "disable_numparse": True}
        text = self._render("{}\n".format, lambda frame: f"\n{frame.to_markdown(**style)}\n")
        return text.rstrip("\n")

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        return self._render(
            lambda text: f"<p>{html.escape(text)}</p>",
            lambda frame: frame.to_html(index=False, border=0),
        )


def load(folder: Path) -> Results:
    """Read what a results folder holds; ResultsError where there is none."""
    contents = Ledger.existing(folder).contents()
    cells = [record for record, _, _ in every_record(contents) if record.n]
    outcome = Finished(cells=cells, damaged=contents.damaged)
    page = folder / "report.html"
    return Results(tuple(cells), page if page.exists() else None, outcome, folder=folder)
