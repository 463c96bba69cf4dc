"""Define the results that the Python API returns, and a progress bar for notebooks."""

from __future__ import annotations

import html
import os
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tracker.measuring.progress import Progress, Silent
from tracker.runner import RunOutcome
from tracker.schema.errors import RequestError, did_you_mean
from tracker.schema.records import CellRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd
    import plotly.graph_objects as go
    from tqdm import tqdm

    from tracker.analysis.boards import LayerBoard
    from tracker.export.facts import ExportedModel
    from tracker.schema.findings import FindingRecord
    from tracker.schema.prune_records import PruneRecord
    from tracker.team.collect import CollectedCells


def default_progress() -> Progress:
    """Return a progress bar in a notebook, and silent progress elsewhere."""
    # If IPython is not imported, it does not run; importing it takes half a second.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Bar() if getattr(shell, "kernel", None) is not None else Silent()


class Bar(Progress):
    """Progress bar for a notebook, with lines of text above the bar."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def say(self, message: str) -> None:
        """Print a line of text."""
        print(message)  # noqa: T201

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Show a new bar with a title and a total."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is plain text without ipywidgets
            from tqdm.auto import tqdm
        self._bar = tqdm(total=total, desc=title, unit=f" {unit}", disable=False)

    def expect(self, more: int) -> None:
        """Increase the expected total of the bar."""
        if self._bar is not None:
            self._bar.total += more
            self._bar.refresh()

    def advance(self, responses: int) -> None:
        """Advance the bar by a number of steps."""
        if self._bar is not None:
            self._bar.update(responses)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


FOLDER_FORMS = ("csv", "parquet", "png", "pdf", "every_eval_ever", "dataset")
"""Formats of a report that consist of several files in a folder."""
_MAX_ROWS = 10
"""Maximum number of layers in the table of a notebook or a terminal."""


@dataclass(frozen=True)
class Results:
    """Results of a run, a study, a search or a report.

    A notebook displays a summary and a table of the layers with the largest drops.

    Attributes:
        outcome: Results of each model and benchmark, errors, and the locations of published runs.
        report: The report page of the results folder; None if it could not be written.
        folder: The results folder.
        experiment: The stored copy of the experiment file; None without such a file.
        finding: The answers, tables and charts of a study or of searches; None for other results.
        searches: Records of the pruning searches, with the removed layers and the test results of
            each step.
        exports: Shell commands that save the best pruned models as checkpoints.
        saved: The saved recommended model; None if there is none.
        files: Paths of additional files that were written.
        notes: Further remarks about the results.

    Example:
        >>> results = tracker.load("results")
        >>> results.table("layers").sort_values("accuracy_drop")
        >>> results.plot()
        >>> results.save("figures", "pdf")
    """

    outcome: RunOutcome = field(repr=False)  # thousands of figures
    report: Path | None = None
    folder: Path = Path("results")
    experiment: Path | None = None
    finding: FindingRecord | None = field(default=None, repr=False)
    searches: tuple[PruneRecord, ...] = field(default=(), repr=False)
    exports: tuple[str, ...] = ()
    saved: ExportedModel | None = field(default=None, repr=False)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    sources: CollectedCells | None = field(default=None, repr=False, compare=False)

    @property
    def cells(self) -> tuple[CellRecord, ...]:
        """One record of results per model and benchmark, in the order of the experiment."""
        return tuple(self.outcome.cells)

    @property
    def layers(self) -> pd.DataFrame:
        """The data frame of all runs, equal to `table("layers")`."""
        return self.table("layers")

    @property
    def correlations(self) -> pd.DataFrame:
        """The data frame of correlations, equal to `table("correlations")`."""
        return self.table("correlations")

    @property
    def documents(self) -> pd.DataFrame:
        """The data frame of documents, equal to `table("documents")`."""
        return self.table("documents")

    def table(self, name: str = "") -> pd.DataFrame:
        """Return one table of the results as a data frame, with unrounded fractions.

        `layers` has one row per model, benchmark and run. The column `layer` is the first changed
        layer of the run, 0-based. The column `shown` contains the verdict on the run: `matters`,
        `better without`, `below 5 pp`, or `open` (undecided).

        `correlations` has one row per model, benchmark, proxy, coefficient and subset of layers.
        A proxy is, for example, the cosine score; a coefficient is, for example, Spearman's. One
        subset contains all layers, and the other subset excludes the first two and the last two.
        `low` and `high` are the confidence bounds of `value`. The bounds account for the sampling
        of documents, but not for the sampling of layers. For layers, `p_value` comes from a
        permutation test that preserves how smoothly the values vary over depth.

        `documents` has one row per model, benchmark, run and document, with the responses of the
        intact and the ablated model. The column `change` is `lost`, `won` or `same`. `score_intact`
        and `score` are the metric of the intact and the ablated model; higher is better. The table
        includes the texts if the results folder has them.

        `layer_leaderboard` and `model_leaderboard` rank layers and models by means over the
        benchmarks. `part_leaderboard` ranks heads, experts or ranges of layers, if any. Rows are
        sorted by the lower bound of the accuracy drop, in descending order. The intervals of the
        drops are simultaneous over all layers. `best_rank` and `worst_rank` are the bounds of the
        rank.

        Args:
            name: Name of a table listed above, or of a table of the study, such as
                `STUDY--EXPERIMENT-1`. Empty selects the study's first table, or `layers` if there
                is no study.

        Returns:
            The data frame.

        Raises:
            RequestError: There is no such table.

        Example:
            >>> results.table("layers").query("shown == 'matters'")
            >>> results.table("correlations").query("proxy == 'cosine_score'")
            >>> results.table("documents").query("layer == 11 and change == 'lost'")
        """
        from tracker.report.export import board_data
        from tracker.report.frames import correlation_frame, layer_frame, table_frame
        from tracker.report.page.studies import study_frames

        tables = study_frames([self.finding] if self.finding else [])
        name = name or next(iter(tables), "layers")
        if name in tables:
            return tables[name]
        builders: dict[str, Callable[[], pd.DataFrame]] = {
            "layers": partial(layer_frame, self.cells),
            "correlations": partial(correlation_frame, self.cells),
            "documents": self._documents,
        }
        if name in builders:
            return builders[name]()
        boards = board_data(self.cells)
        if name not in boards:
            names = [*tables, *builders, *boards]
            near, listing = did_you_mean(name, names), ", ".join(names)
            raise RequestError(f"there is no table {name!r}.{near} Choose from: {listing}")
        return table_frame(boards[name])

    def _documents(self) -> pd.DataFrame:
        """Build the table `documents`: one row per model, benchmark, run and document."""
        from tracker.report.frames import document_frame
        from tracker.team.collect import CollectedCells

        collected = self._collected() if self.cells else CollectedCells()
        pairs = ((cell, collected.read_answers(cell)) for cell in self.cells)
        measured = [(cell, decisions) for cell, decisions in pairs if decisions]
        return document_frame(measured, only_changed=False)

    def _collected(self) -> CollectedCells:
        """Return the results of all models, and the stored answers to each document."""
        if self.sources is not None:
            return self.sources
        from tracker.team.collect import collect_cells

        collected = collect_cells([str(self.folder)], Silent())
        collected.cells = self.cells
        if self.finding is not None:
            collected.findings = (self.finding,)
        return collected

    def plot(self, name: str = "") -> go.Figure:
        """Draw a chart of the study, or each layer's accuracy drop against its cosine score.

        Args:
            name: Name of a chart of the study, such as `STUDY--EXPERIMENT-1`, or name of a model,
                as in the table `layers`. Empty selects the study's first chart or, without a chart,
                the only model.

        Returns:
            The plotly figure, which a notebook displays.

        Raises:
            RequestError: The chart or model does not exist, `name` is needed to choose a model, or
                results are missing.

        Example:
            >>> results.plot().write_html("layers.html")
        """
        from tracker.report.charts.headline import headline_chart
        from tracker.report.page.studies import study_charts

        charts = study_charts([self.finding] if self.finding else [])
        name = name or next(iter(charts), "")
        if name in charts:
            return charts[name].to_figure()
        boards = {model: board for model, _, board in self._models()}
        names = [*charts, *boards]
        if not name and len(boards) > 1:
            raise RequestError(f"there are several models; name one: plot({names[0]!r})")
        name = name or next(iter(boards), "")
        if name not in boards:
            suggestion = did_you_mean(name, names)
            raise RequestError(f"there is no model or chart {name!r} here.{suggestion}")
        if not boards[name].parts:
            reasons = "; ".join(f"{label}: {text}" for label, text in boards[name].left_out.items())
            raise RequestError(f"no benchmark of {name} has results for all layers. {reasons}")
        return headline_chart(boards[name], name).to_figure()

    def save(
        self, output: str | os.PathLike[str], form: str = "", publish_documents: bool = False
    ) -> tuple[Path, ...]:
        """Write the results as a report page, as tables or as figures.

        Args:
            output: A file for `html`, `md` and `tex`, a folder for all other formats.
            form: The format. Empty selects the format by the file name's extension, or `csv` if the
                name has no extension.
            publish_documents: Whether `every_eval_ever` and `dataset` contain document texts from a
                folder or a corpus too.

        Returns:
            The paths of the written files.

        Raises:
            RequestError: The format does not exist, or `output` is a folder instead of a file (or
                vice versa).
            WorkError: The disk is full or not writable.

        Example:
            >>> results.save("report.html")
            >>> results.save("figures", "pdf")
        """
        from tracker.team import reports

        path = Path(output)
        form = form or path.suffix[1:] or "csv"
        if path.exists() and path.is_dir() != (form in FOLDER_FORMS):
            problem = f"{path} is a file; name a folder"
            if path.is_dir():
                problem = f"{path} is a folder; name a file, e.g. {path}/report"
            raise RequestError(f"--output: {problem}")
        return tuple(reports.write_collected(self._collected(), form, path, publish_documents))

    @property
    def answer(self) -> str:
        """The answer of a study, or sentences that name the important layers of each model.

        Example:
            >>> print(results.answer)
        """
        if self.finding is not None:
            return "\n".join(self.finding.answers)
        return "\n".join(answer for _, answer, _ in self._models()) or "Nothing is measured."

    def _models(self) -> Iterator[tuple[str, str, LayerBoard]]:
        """Yield each model's name, a text that names the important layers, and the leaderboard."""
        from tracker.analysis.boards import layer_board, part_boards
        from tracker.analysis.comparable import named_models
        from tracker.report.wording import model_answer

        groups = named_models(self.cells)
        for name, group in groups.items():
            board = layer_board(group)
            answer = model_answer(board.claims, part_boards(group), group)
            yield name, f"{name}: {answer}" if len(groups) > 1 else answer, board

    def _render(self, line: Callable[[str], str], table: Callable[[pd.DataFrame], str]) -> str:
        """Render the answers, the layers with the largest drops, and errors.

        `line` formats a line of text, and `table` formats a data frame.
        """
        from tracker.report.export import text_frame
        from tracker.report.leaderboard import layer_board_table

        parts = [line(self.answer)] if self.finding or not self.cells else []
        for name, answer, board in self._models():
            parts.append(line(answer))
            if board.parts:
                frame = text_frame(layer_board_table(board, name))
                parts.append(table(frame.head(_MAX_ROWS)))
                if len(frame) > _MAX_ROWS:
                    shown = f"The table shows {_MAX_ROWS} of {len(frame)} layers"
                    parts.append(line(f"{shown}; for all layers, use the attribute `layers`."))
        problems = {**self.outcome.failed, **self.outcome.damaged}
        return "".join([*parts, *(line(f"{name}: {reason}") for name, reason in problems.items())])

    def __str__(self) -> str:
        """Return the answer and the leaderboard of layers as plain text."""
        style: dict[str, Any] = {"index": False, "tablefmt": "simple", "disable_numparse": True}
        text = self._render("{}\n".format, lambda frame: f"\n{frame.to_markdown(**style)}\n")
        return text.rstrip("\n")

    def _repr_html_(self) -> str:
        """Return the text of `__str__` as HTML for a notebook."""
        table = methodcaller("to_html", index=False, border=0)
        return self._render(lambda text: f"<p>{html.escape(text)}</p>", table)
