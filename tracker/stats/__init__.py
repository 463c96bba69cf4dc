"""Compute statistics: pure functions of arrays.

Modules:
    accuracy: Compute accuracies, drops, their intervals, and which drops documents reveal.
    arrays: Define the arrays that other modules take.
    confidence: Compute confidence sequences of means, valid after every document.
    correlation: Correlate a proxy with measured drops.
    decisions: Compute choices between options and their margins.
    effects: Test interactions and growth, and the best of many that chance produces.
    rank_agreement: Compute ranks, ties and rank correlations.
    reliability: Compute how well samples of documents and measures of one cost agree.
    resampling: Compute bootstrap and jackknife intervals.
    stopping: Decide after every block whether a question is answered.
    support: Combine estimates, and decide whether statements about layers are supported.
    task_dependence: Estimate how relevance varies between tasks.
"""
