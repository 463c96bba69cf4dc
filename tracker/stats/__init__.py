"""Compute statistics: pure functions of arrays.

Modules:
    sequential: Test after every block of documents.
    accuracy: Compute accuracies, drops and their intervals.
    arrays: Define the arrays that other modules take.
    budgets: Compare measures at equal cost.
    combined: Compute intervals of ratios, differences and means of estimates.
    correlation: Correlate a proxy with measured drops.
    decisions: Compute choices between options and their margins.
    growth: Estimate growth rates and test them.
    interaction: Test whether two removals cost the sum of both.
    power: Compute which changes a number of documents reveals.
    rank_agreement: Compute ranks, ties and rank correlations.
    reliability: Compute how well samples of documents agree.
    resampling: Compute bootstrap and jackknife intervals.
    selection: Compute the best score of many that chance produces.
    support: Decide whether statements about layers are supported.
    task_dependence: Estimate how relevance varies between tasks.
"""
