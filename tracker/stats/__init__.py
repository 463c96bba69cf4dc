"""Compute statistics with pure functions of arrays.

Modules:
    accuracy: Compute accuracies, accuracy drops, their intervals, and statistical power.
    arrays: Define array types, and average proxies over tokens.
    confidence: Compute confidence sequences: intervals of means, valid after every document.
    correlation: Correlate a proxy with measured accuracy drops over layers.
    decisions: Compute the answer options that a model chooses, margins, and effects of rounding.
    effects: Test whether two drops add up, whether values grow, and the largest of many gains.
    rank_agreement: Compute ranks, ties and rank correlations.
    reliability: Compute how well rankings of layers by different documents or measures agree.
    resampling: Compute bootstrap and jackknife intervals.
    stopping: Decide after every block of documents whether more documents are needed.
    support: Combine estimates, and decide which statements about many layers hold at the same time.
    task_dependence: Estimate how much the relevance of a layer varies between benchmarks.
"""
