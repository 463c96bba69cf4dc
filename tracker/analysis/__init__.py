"""Derive figures from outcomes, and decide which statements they support.

Modules:
    ranks: Rank layers, parts, models and proxies.
    aligned: Align the outcomes of the documents that all runs share.
    claims: Decide which statements about layers are supported, and word them.
    comparable: Select the records that may be ranked together.
    decisions: Compare the chosen options of each run with the intact model's.
    editions: Tell editions of an edited task apart.
    labels: Tell models and cells apart.
    layer_figures: Compute the figures of one whole layer.
    options: Score the options of documents.
    paired: Compare the same documents with and without a change.
    records: Compute the record of a cell.
    runs: Compute the figures of one run.
    stopping: Apply the stopping rules of `until` to stored outcomes.
"""
