"""Fixtures of ledgers and cells made by hand."""

from tests.helpers.stored_cells import cell, cell_of, ledger

__all__ = ["cell", "cell_of", "ledger"]
