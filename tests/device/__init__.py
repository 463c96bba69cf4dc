"""Tests on a simulated accelerator.

It becomes torch's accelerator in the process, so these tests run in one of their own: `make test`
runs `pytest tests/device` after all others.
"""
