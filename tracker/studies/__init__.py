"""Studies: commands that answer a research question from the results of an experiment file.

A study declares its requirements and settings, and returns the requests to measure. From the
results, the study writes an answer with sentences, tables and charts. Sentences, assumptions and
notes are macros of the study's template in the folder `templates`. Which macros are rendered
depends on the results. The study `audit` is a package; its module `figures` computes the
statistics.

Modules:
    base: Define the base class of studies, and run a study from its file to its report section.
    registry: List the studies with their settings, which define the command-line options and help.
    layout: Build charts, and build tables from dataclasses with labelled fields.
    audit: Compare every proxy of a layer's relevance with the measured accuracy drop of the layer.
    calibration: Estimate how many documents a stable ranking of layers needs.
    displacement: Compare the KL divergence of the output with the cost of each change.
    joint: Compare the drop of removing two layers together with the sum of their single drops.
    precision: Measure how much accuracy the rounding of each linear map costs.
    prune: Compare models pruned by measured accuracy drops with models pruned by proxies.
    quantise: Choose formats of weights within a budget of bits.
    repeat: Test whether a model improves if it runs some layers a second time.
    rescale: Test whether a fitted replacement recovers the loss of a removed layer.
    savings: Count the documents that the setting `until` saves.
    snowball: Test whether later layers amplify the effect of a removed layer.
    theorem: Build the paper's counterexample, in which the cosine score misleads.
"""
