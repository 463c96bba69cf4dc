"""Compute statistics from stored outcomes, and test statements about layers for significance.

Modules:
    agreement: Compare rankings of layers by proxies with the measured ranking; compare models.
    aligned: Restrict the outcomes to the documents that all runs measured.
    boards: Rank layers, parts of layers (e.g. heads), and models.
    claims: Decide which statements about layers are statistically supported, and phrase them.
    comparable: Label models, cells and task versions; select the cells that are ranked together.
    decisions: Score answer options, and compare the choices of ablated and intact models.
    metrics: Compute the metrics of each document from stored values and log-likelihoods.
    paired: Compare outcomes of the intact and the changed model on the same documents.
    records: Compute the record (all results) of a cell: one model on one benchmark.
    runs: Compute the statistics of one run (one ablation on one benchmark).
    stopping: Decide from stored outcomes whether measurements with `until` can stop early.
"""
