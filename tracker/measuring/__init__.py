"""Measure one cell: find it, plan it, compute it, derive its record.

Modules:
    calibrate: Choose calibration text for fitted replacements.
    derive: Derive records and answers from the ledger.
    fill: Compute the missing blocks of a cell.
    job: Define a job and its options.
    meter: Measure documents of a cell on a loaded model.
    observing: Observe more than outcomes, block by block.
    planning: Estimate the cost of an experiment without loading weights.
    prepare: Find cells in the ledger, and check requests before anything is computed.
    progress: Report progress.
    scorer: Combine the engine's scores with generated texts, in rows of the fastest size.
    worker: Hold a loaded model and its cell, also in a process of its own.
"""
