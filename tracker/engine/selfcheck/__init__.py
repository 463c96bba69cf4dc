"""Test that sharing computation between ablations changes no result.

Modules:
    check: Compare scores with and without shared computation, on documents of the benchmark.
    miniature_check: Test an architecture on a small model with random weights and texts.
    quirks: Find how a model reacts to text lengths, repeated calls, and missing layers.
    reference: Score requests on really changed models, and explain why sharing is disabled.
"""
