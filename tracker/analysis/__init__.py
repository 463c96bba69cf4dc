"""Derive figures from outcomes, and decide which statements they support.

Modules:
    agreement: Compare the orders of proxies with the measured one, and models layer by layer.
    aligned: Align the outcomes of the documents that all runs share.
    boards: Rank layers, parts and models.
    claims: Decide which statements about layers are supported, and word them.
    comparable: Tell models, cells and editions of tasks apart; select what may be ranked together.
    decisions: Score options, and compare the choices of each run with the intact model's.
    paired: Compare the same documents with and without a change.
    records: Compute the record of a cell.
    runs: Compute the figures of one run.
    stopping: Apply the stopping rules of `until` to stored outcomes.
"""
