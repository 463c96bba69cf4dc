"""The layer sweep: every ablation's responses to every document, by the fastest exact way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tracker.ablations import INTACT, Ablation
from tracker.documents import Document, Response
from tracker.engine.rows import Row, flat_rows, tree_rows
from tracker.engine.score import RowScores, score_row
from tracker.engine.streams import StreamPlan, plan_streams
from tracker.models.layers import layers_removed
from tracker.models.load import LoadedModel

ROW_TOKENS = 256
"""Nodes of a prefix tree: enough to keep a matrix product busy, few enough for a dense mask."""


@dataclass(frozen=True)
class Sharing:
    """What the ablations of a model share, exactly.

    Attributes:
        depth: Layers below the removed one are computed once for all ablations.
        tokens: Tokens that requests have in common are computed once.
    """

    depth: bool = True
    tokens: bool = True


FULL = Sharing()
DEPTH_ONLY = Sharing(tokens=False)
PLAIN = Sharing(depth=False, tokens=False)


@dataclass(frozen=True)
class DocumentScores:
    """What all ablations say about one document.

    Attributes:
        document: The document.
        responses: For every ablation, in order, one response a request.
        proxy_tokens: Tokens of the document's context and gold continuation.
        proxy_sums: Sums over those tokens [3, layers]: cosine similarity, angular distance and
            relative update of the intact model.
    """

    document: Document
    responses: list[list[Response]]
    proxy_tokens: int
    proxy_sums: Tensor


@dataclass(frozen=True)
class Engine:
    """Scores documents for many ablations of one model.

    Attributes:
        loaded: The model.
        max_length: Tokens that it reads at most, as lm-eval determines it.
        sharing: What is shared; `check` lowers it where sharing is not exact.
        row_tokens: Size of a row.
    """

    loaded: LoadedModel
    max_length: int
    sharing: Sharing = FULL
    row_tokens: int = ROW_TOKENS

    def with_sharing(self, sharing: Sharing) -> Engine:
        """Make the same engine with other sharing."""
        return replace(self, sharing=sharing)

    def rows(self, documents: Sequence[Document]) -> Iterator[Row]:
        """Pack documents the way this engine scores them."""
        if self.sharing.tokens:
            return tree_rows(documents, self.max_length, self.row_tokens)
        # While streams fork, a mask that a model builds itself must broadcast: one sequence a row.
        return flat_rows(documents, self.max_length, 1 if self.sharing.depth else self.row_tokens)

    def score(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[DocumentScores]:
        """Score documents.

        Args:
            documents: What to score.
            ablations: What to remove; must include the baseline.
            progress: Called with the tokens of each finished row.

        Returns:
            One result a document, in the same order.
        """
        layers = len(self.loaded.layers)
        shape = (len(ablations), max(len(document.requests) for document in documents))
        loglikelihoods = torch.zeros(len(documents), *shape)
        greedy = torch.zeros(len(documents), *shape, dtype=torch.bool)
        sums = torch.zeros(len(documents), 3, layers, dtype=torch.float64)
        tokens = [0] * len(documents)
        for row in self.rows(documents):
            scores = self._score_row(row, ablations)
            which = torch.tensor(row.requests)
            loglikelihoods[which[:, 0], :, which[:, 1]] = scores.loglikelihoods.T
            greedy[which[:, 0], :, which[:, 1]] = scores.greedy.T
            for (document, path), proxies in zip(row.gold, scores.proxies, strict=True):
                sums[document] = proxies
                tokens[document] = len(path)
            progress(row.tokens)
        return [
            DocumentScores(
                document=document,
                responses=[
                    [Response(*pair) for pair in zip(lls, flags, strict=True)]
                    for lls, flags in zip(
                        loglikelihoods[number, :, : len(document.requests)].tolist(),
                        greedy[number, :, : len(document.requests)].tolist(),
                        strict=True,
                    )
                ],
                proxy_tokens=tokens[number],
                proxy_sums=sums[number],
            )
            for number, document in enumerate(documents)
        ]

    def _score_row(self, row: Row, ablations: Sequence[Ablation]) -> RowScores:
        """Score one row for every ablation, in the order of the ablations."""
        if self.sharing.depth:
            plan = plan_streams(ablations, len(self.loaded.layers))
            scores = score_row(self.loaded.model, self.loaded.layers, plan, row)
            order = torch.tensor(plan.stream_of)
            return replace(
                scores,
                loglikelihoods=scores.loglikelihoods[order],
                greedy=scores.greedy[order],
            )
        each = [self._score_pruned(row, ablation) for ablation in ablations]
        intact = each[list(ablations).index(INTACT)]
        return RowScores(
            loglikelihoods=torch.cat([scores.loglikelihoods for scores in each]),
            greedy=torch.cat([scores.greedy for scores in each]),
            proxies=intact.proxies,
        )

    def _score_pruned(self, row: Row, ablation: Ablation) -> RowScores:
        """Score one row with the layers really taken out: nothing is shared."""
        loaded = self.loaded
        with layers_removed(loaded.model, ablation.layers):
            remaining = torch.nn.ModuleList(
                layer for i, layer in enumerate(loaded.layers) if i not in ablation.layers
            )
            plan: StreamPlan = plan_streams([INTACT], len(remaining))
            return score_row(loaded.model, remaining, plan, row)
