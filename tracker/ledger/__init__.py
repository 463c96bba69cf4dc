"""The ledger: the results on disk, from which runs, tables and reports derive. Needs no torch."""
