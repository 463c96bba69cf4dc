"""Test that sharing is exact, against models that were really changed.

Modules:
    check: Test a model on documents of its benchmark.
    miniature_check: Test an architecture on a small model with random weights.
    probe_texts: Generate texts that expose dependence on lengths.
    quirks: Find how a model reacts to lengths and to repeated calls.
    reasons: Explain in one sentence why a model shares less.
    reference: Score requests one at a time on the really changed model.
    removability: Find what a model without a layer computes.
"""
