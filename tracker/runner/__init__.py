"""The runner: from cells to the ledger, and from the ledger to backends and pages."""
