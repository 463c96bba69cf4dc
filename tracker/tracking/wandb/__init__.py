"""Write cells to Weights & Biases, and read them back.

Modules:
    backend: Keep a W&B project in step with the ledger.
    service: Describe W&B to the other packages, without importing it.
    session: Set up the SDK, log in, open and close runs.
    sweep: Read a sweep and log into its trials.
    views: Write W&B Reports and the saved workspace.
    writing: Write one run.
"""
