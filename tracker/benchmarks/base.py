"""What a benchmark is."""

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
        identity: Which documents are scored, and how they are put to the model.
        public: Whether all documents come from the hub or a package, so that anybody may read them.
    """

    identity: BenchmarkIdentity
    public: bool

    def documents(self, encoder: RequestEncoder, extent: Extent) -> list[Document]:
        """Tokenise the documents.

        Args:
            encoder: lm-eval's tokenisation for the model.
            extent: Which documents.

        Returns:
            The documents, task by task, in the order of their splits.

        Raises:
            BenchmarkError: A document lacks what the benchmark reads.
        """

    def rows(self, task: str) -> str:
        """Hash what the scored split of a task holds, however it is read.

        Args:
            task: One of the tasks.

        Returns:
            The digest; tasks over the same rows have the same one.
        """

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, MetricValue | None]:
        """Judge the responses to one document.

        Args:
            document: One of `documents()`.
            responses: One response a request, in order.

        Returns:
            Every metric: a number, or JSON where pairs are aggregated. None for every metric when
            a log-likelihood is not finite: no accuracy can be read off it.
        """

    def text(self, document: Document) -> DocumentText:
        """Say what a document asks, and what the right answer is.

        Args:
            document: One of `documents()`.

        Returns:
            Its text.
        """
