"""Choose formats of weights within a budget of bits.

Modules:
    budget: Compute the bits of a choice.
    cell_requests: Request cells with one linear map in one format.
    choose: Choose formats by sums of measured losses.
    export: Save a model with rounded weights.
    measured: Improve a choice by measuring whole models.
    observed: Compute the errors of rounded linear maps.
    recipes: Write the same formats for llama.cpp, llm-compressor, mlx-lm and GPTQModel.
"""
