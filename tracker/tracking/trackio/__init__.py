"""Write cells to Trackio's files on this machine, and read them back.

Modules:
    backend: Keep a Trackio project in step with the ledger.
    service: Describe Trackio to the other packages, without importing it.
"""
