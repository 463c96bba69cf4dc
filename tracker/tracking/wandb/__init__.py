"""Publishes cells to Weights & Biases, and reads them back.

What a cell's runs should be is described in `runs`, written by `writing`, and kept in step with a
project by `backend`; `sweep` has the runs of a sweep's trials, `views` are W&B's own pages. The SDK
is set up, logged in and ended in `session`, and lives in a process of its own: see `isolated`.
"""
