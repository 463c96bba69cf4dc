"""Measure one cell (a model on a benchmark), estimate its cost, and compute its results.

Modules:
    calibrate: Choose calibration texts for fitting the functions that replace layers.
    derive: Compute figures and results of `until` settings from stored outcomes.
    executors: Measure cells in one process, several processes, Ray or SLURM.
    fill: Measure the missing outcomes of a cell.
    job: Define a job (unfinished requests of one cell) and the options of a run.
    meter: Measure documents of a cell on a loaded model.
    observing: Compute and store the per-document statistics of a model that studies need.
    planning: Estimate the cost of an experiment without loading weights.
    prepare: Find cells in the ledger, and check requests before computation starts.
    progress: Report progress.
    scorer: Score documents by log-likelihood or by generating text.
    worker: Measure cells with a loaded model, in this process or a separate one.
"""
