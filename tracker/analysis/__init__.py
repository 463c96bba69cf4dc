"""Derive figures from stored outcomes, and decide which statements the figures support.

Modules:
    agreement: Compare rankings by proxies with the measured ranking, and compare models by layer.
    aligned: Align the outcomes of the documents that all runs share.
    boards: Rank layers, parts and models.
    claims: Decide which statements about layers are supported, and word them.
    comparable: Label models, cells and editions of tasks; select cells that are ranked together.
    decisions: Score options, and compare each run's choices with the intact model's choices.
    paired: Compare outcomes of the same documents with and without a change.
    records: Compute the record of a cell.
    runs: Compute the figures of one run.
    stopping: Apply the stopping rules of `until` to stored outcomes.
"""
