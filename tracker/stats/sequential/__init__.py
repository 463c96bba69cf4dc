"""Test after every block, with errors bounded over all looks.

Modules:
    confidence: Compute confidence sequences of means.
    smallest: Find the smallest of several means without bounds.
    stopping: Decide when a question is answered.
    top_k: Find the largest means by their differences.
"""
