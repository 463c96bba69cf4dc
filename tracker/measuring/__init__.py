"""Measure one cell: find, plan and compute the cell, and derive its record.

Modules:
    calibrate: Choose calibration text for fitted replacements.
    derive: Derive records and answers from the ledger.
    fill: Compute the missing blocks of a cell.
    job: Define a job and its options.
    meter: Measure documents of a cell on a loaded model.
    observing: Compute further observations of a model and store them, block by block.
    planning: Estimate the cost of an experiment without loading weights.
    prepare: Find cells in the ledger, and check requests before computation starts.
    progress: Report progress.
    scorer: Combine the engine's scores with generated texts, and set the fastest row size.
    worker: Measure cells with a loaded model, in this process or a separate one.
"""
