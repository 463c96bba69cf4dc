"""Define the interface of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tracker.core.documents import Document, DocumentText, Response
from tracker.core.extent import Extent
from tracker.core.identities import BenchmarkIdentity

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder

MetricValue = float | str
"""Metric of one document: a number, or JSON if the task aggregates pairs of values."""


class Benchmark(Protocol):
    """Documents to score, and the code that judges a model's responses to the documents.

    Attributes:
        identity: Identity of the scored documents and of their prompts.
        public: True if all documents come from the hub or a package, and may be published.
        is_model_specific: True if the documents are made for one model.
    """

    identity: BenchmarkIdentity
    public: bool
    is_model_specific: bool

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Tokenise the documents of the benchmark.

        Args:
            encoder: Tokenisation of the model by lm-eval.
            extent: Documents to tokenise.

        Returns:
            The documents of each task in turn, in the order of the task's split.

        Raises:
            BenchmarkError: A document lacks a column that the benchmark reads.
        """

    def rows_digest(self, task: str) -> str:
        """Hash the rows of a task's scored split; the data source does not affect the hash.

        Args:
            task: Name of a task of the benchmark.

        Returns:
            The digest; tasks over the same rows have the same digest.
        """

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, MetricValue | None]:
        """Compute all metrics of a model's responses to one document.

        Args:
            document: One of `documents()`.
            responses: Responses to the document's requests, in order.

        Returns:
            Metric → value: a number, or JSON if the task aggregates pairs. All values are None if
            a log-likelihood is not finite, because no accuracy can be computed then.
        """

    def text(self, document: Document) -> DocumentText:
        """Return the question and the right answer of a document.

        Args:
            document: One of `documents()`.

        Returns:
            The text of the document.
        """
