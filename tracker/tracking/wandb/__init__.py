"""Publish results to Weights & Biases, and read published results back.

Modules:
    backend: Update a W&B project with the results of a results folder.
    service: Define the interface to W&B for other packages, without importing W&B.
    sweep: Read a sweep, and log results to the runs of its trials.
    views: Write W&B Reports and the saved workspace.
    writing: Configure the W&B SDK, and open, write and close runs.
"""
