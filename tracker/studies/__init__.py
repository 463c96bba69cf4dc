"""Answer research questions, each a command over an experiment file.

A study declares its requirements and settings, returns requests, and answers from what was
measured with sentences, tables and charts. Its sentences, assumptions and notes are macros of its
template in `templates`; its figures decide which of them are written. The audit is a folder with
the module `figures`, which computes.

Modules:
    base: Define a study, and run one from its file to its section of the report.
    registry: List the studies and their settings, which are their commands' options and help.
    layout: Build tables from the labelled fields of figures, and charts.
    audit: Compare every proxy of a layer's relevance with its measured drop.
    calibration: Count the documents that make a ranking of layers stable.
    joint: Compare the drop of two layers with the sum of both drops.
    precision: Measure what it costs to round each linear map.
    prune: Compare pruning by measured drops with pruning by proxies.
    quantise: Choose formats of weights within a budget of bits.
    repeat: Test whether a model improves if some layers are passed again.
    rescale: Test whether a fitted replacement recovers what a removed layer costs.
    savings: Count the documents that `until` saves.
    snowball: Test whether later layers amplify the effect of a removed layer.
    theorem: Build the paper's counterexample, in which the cosine score misleads.
"""
