"""Define the interface that all benchmarks implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tracker.schema.documents import Document, DocumentText, Response
from tracker.schema.extent import Clusters, Extent
from tracker.schema.identities import BenchmarkIdentity

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder

MetricValue = float | str
"""Metric of one document: a number, or JSON if the task aggregates pairs of values."""


class Benchmark(Protocol):
    """Documents to score, and the metrics of a model's responses to them.

    Attributes:
        identity: Identity of the scored documents and of their prompts.
        public: True if all documents come from the hub or a package, and may be published.
        is_model_specific: True if the documents are generated for one specific model.
    """

    identity: BenchmarkIdentity
    public: bool
    is_model_specific: bool

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Tokenise the documents of the benchmark.

        Args:
            encoder: Encoder that tokenises requests for the model as lm-eval does.
            extent: Selection of the documents to tokenise.

        Returns:
            The documents, grouped by task.

        Raises:
            BenchmarkError: A document lacks a column that the benchmark reads.
        """

    def rows_digest(self, task: str) -> str:
        """Hash all rows of the split on which a task is scored.

        Args:
            task: Name of a task of the benchmark.

        Returns:
            The hash, which is equal for tasks that are scored on the same rows.
        """

    def clusters(self, column: str) -> Clusters:
        """Group the documents by the value of a column.

        Args:
            column: Name of a column of the data, or `task`.

        Returns:
            The cluster of each document of the benchmark.

        Raises:
            BenchmarkError: The data lacks the column, or all documents have the same value.
        """

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, MetricValue | None]:
        """Compute all metrics of a model's responses to one document.

        Args:
            document: Document that `documents()` returned.
            responses: Responses to the document's requests, in order.

        Returns:
            The value of each metric by name: a number, or a pair of numbers as JSON text. If a
            log-likelihood is not finite, all values are None.
        """

    def text(self, document: Document) -> DocumentText:
        """Return the question and the right answer of a document.

        Args:
            document: Document that `documents()` returned.

        Returns:
            The question and the right answer as text.
        """
