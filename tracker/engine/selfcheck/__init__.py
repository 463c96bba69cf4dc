"""Test that sharing computation between ablations changes no result.

Modules:
    check: Compare scores with and without shared computation, on documents of the benchmark.
    miniature_check: Test an architecture on a small model with random weights and texts.
    quirks: Find effects of text lengths, repeated calls and removed layers on a model.
    reference: Score requests on really changed models, and explain why sharing is disabled.
"""
