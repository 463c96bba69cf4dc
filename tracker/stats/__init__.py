"""Compute statistics with pure functions of arrays.

Modules:
    accuracy: Compute accuracies, their drops and intervals, statistical power, and pass@k.
    arrays: Define array types, and average proxies over tokens.
    confidence: Compute intervals of means that are valid after every document.
    correlation: Correlate a proxy with measured accuracy drops over layers.
    decisions: Compute the answer options that a model chooses, margins, and effects of rounding.
    effects: Test interactions of layers, trends, and the largest of many gains.
    rank_agreement: Compute ranks, ties and rank correlations.
    reliability: Compute how well two rankings of layers agree.
    resampling: Compute bootstrap and jackknife intervals.
    stopping: Decide after every block of documents whether more documents are needed.
    support: Combine estimates, and correct them for multiple comparisons.
    task_dependence: Estimate how much the relevance of a layer varies between benchmarks.
"""
