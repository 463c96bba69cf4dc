"""Studies: commands that answer a research question from the results of an experiment file.

A study declares its requirements and settings, and lists the models, benchmarks and ablations to
measure. From the results, the study writes an answer with sentences, tables and charts. The texts
are macros of Jinja templates in the folder `templates`.

Modules:
    base: Define the base class of studies, and run a study from its file to its report section.
    registry: List the studies with their settings, which define the command-line options and help.
    layout: Build charts, and build tables from dataclasses with labelled fields.
    audit: Compare every proxy of a layer's relevance with the measured accuracy drop of the layer.
    calibration: Estimate how many documents a stable ranking of layers needs.
    displacement: Test whether the KL divergence of a changed model predicts the lost accuracy.
    joint: Compare the accuracy drop when two layers are removed with the sum of their single drops.
    precision: Measure how much accuracy the rounding of each linear map costs.
    protocol: Compare what the same changes cost under several evaluation protocols.
    prune: Compare models pruned by measured accuracy with models pruned by proxies.
    quantise: Choose a number format for each weight matrix within a budget of bits.
    repeat: Test whether a model improves if it runs some layers a second time.
    rescale: Test whether a fitted replacement of a removed layer recovers the lost accuracy.
    savings: Count the documents that need not be measured if `until` stops a measurement early.
    snowball: Test whether later layers amplify the effect of a removed layer.
    theorem: Build the paper's counterexample, in which the cosine score misleads.
"""
