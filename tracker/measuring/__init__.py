"""Measure one cell (a model on a benchmark), plan its cost, and derive its record.

Modules:
    calibrate: Choose calibration text for fitted replacements.
    derive: Derive figures, and answers to `until` questions, from the outcomes in the ledger.
    executors: Measure cells in one process, several processes, Ray or SLURM.
    fill: Compute the missing blocks of a cell.
    job: Define a job and its options.
    meter: Measure documents of a cell on a loaded model.
    observing: Compute and store the per-document statistics of a model that studies need.
    planning: Estimate the cost of an experiment without loading weights.
    prepare: Find cells in the ledger, and check requests before computation starts.
    progress: Report progress.
    scorer: Score documents with the engine or by generating text, and set the fastest row size.
    worker: Measure cells with a loaded model, in this process or a separate one.
"""
