"""Compute statistics of arrays by pure functions.

Modules:
    accuracy: Compute accuracies, their drops and intervals, statistical power, and pass@k.
    arrays: Define array types, and compute means of proxies over tokens.
    confidence: Compute intervals of means that are valid after every document.
    correlation: Correlate a proxy with measured accuracy drops over layers.
    decisions: Compute the options that a model chooses, their margins, and rounding errors.
    effects: Estimate interactions of layers, growth factors, and the largest of many gains.
    rank_agreement: Compute ranks, ties and rank correlations.
    reliability: Compute how well two rankings of layers agree.
    resampling: Compute bootstrap and jackknife intervals.
    stopping: Define stopping rules, which end a measurement when enough documents are measured.
    support: Combine estimates, and correct them for multiple comparisons.
    task_dependence: Estimate how much the relevance of a layer varies between benchmarks.
"""
