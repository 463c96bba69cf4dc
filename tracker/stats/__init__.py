"""Compute statistics with pure functions of arrays.

Modules:
    accuracy: Compute accuracies, drops and intervals, and the drops that a sample can reveal.
    arrays: Define the arrays that other modules take.
    confidence: Compute intervals of means that are valid after every document.
    correlation: Correlate a proxy with measured drops.
    decisions: Compute the chosen options of documents, and the margins of these choices.
    effects: Test interactions and growth, and compute the best of many gains by chance.
    rank_agreement: Compute ranks, ties and rank correlations.
    reliability: Compute how well samples of documents, and measures of equal cost, agree.
    resampling: Compute bootstrap and jackknife intervals.
    stopping: Decide after every block whether a question is answered.
    support: Combine estimates, and decide which statements about layers are supported.
    task_dependence: Estimate how relevance varies between tasks.
"""
