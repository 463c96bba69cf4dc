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
"""One document's metric: a number, or JSON where pairs are aggregated."""


class Benchmark(Protocol):
    """Documents that are scored, and the judge of the responses to them.

    Attributes:
        identity: Identity of the scored documents, and of how they are put to the model.
        public: Whether all documents come from the hub or a package, and may be published.
        of_model: Whether its documents are made for one model.
    """

    identity: BenchmarkIdentity
    public: bool
    of_model: bool

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Tokenise the documents.

        Args:
            encoder: lm-eval's tokenisation for the model.
            extent: Documents to tokenise.

        Returns:
            The documents, task by task, in the order of their splits.

        Raises:
            BenchmarkError: A document lacks a column that the benchmark reads.
        """

    def rows(self, task: str) -> str:
        """Hash the rows of a task's scored split, independent of the data source.

        Args:
            task: One of the tasks.

        Returns:
            The digest; tasks over the same rows have the same digest.
        """

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, MetricValue | None]:
        """Judge the responses to one document.

        Args:
            document: One of `documents()`.
            responses: Responses to the document's requests, in order.

        Returns:
            Every metric: a number, or JSON where pairs are aggregated. All metrics are None if a
            log-likelihood is not finite, because no accuracy can be computed from it.
        """

    def text(self, document: Document) -> DocumentText:
        """Return the question and the right answer of a document.

        Args:
            document: One of `documents()`.

        Returns:
            Its text.
        """
