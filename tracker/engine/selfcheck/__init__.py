"""Test that shared computation is exact, by comparison with changed copies of the model.

Modules:
    check: Test a model on documents of its benchmark.
    miniature_check: Test an architecture on a small model with random weights and texts.
    quirks: Find how a model reacts to text lengths, to repeated calls, and to a missing layer.
    reference: Score requests on really changed models, and explain why sharing is disabled.
"""
