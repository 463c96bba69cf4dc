"""Answer research questions, each a command over an experiment file.

A study declares its requirements and settings, returns requests, and answers from what was
measured with sentences, tables and charts. Sentences, assumptions and notes are macros of the
study's template in `templates`. The figures decide which macros are written. The audit is a folder;
its module `figures` computes the figures.

Modules:
    base: Define a study, and run a study from its file to its section of the report.
    registry: List the studies and their settings, which define the options and help of commands.
    layout: Build charts, and tables from the labelled fields of figures.
    audit: Compare every proxy of a layer's relevance with the layer's measured drop.
    calibration: Count the documents that make a ranking of layers stable.
    joint: Compare the drop of two layers with the sum of both drops.
    precision: Measure the cost of rounding each linear map.
    prune: Compare pruning by measured drops with pruning by proxies.
    quantise: Choose formats of weights within a budget of bits.
    repeat: Test whether a model improves if some layers are passed again.
    rescale: Test whether a fitted replacement recovers the loss of a removed layer.
    savings: Count the documents that need not be measured because of `until`.
    snowball: Test whether later layers amplify the effect of a removed layer.
    theorem: Build the paper's counterexample, in which the cosine score misleads.
"""
