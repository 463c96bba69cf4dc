"""Compare models by their logged answers to the same documents.

Modules:
    answers: Define a model's answers, and match the documents of two models.
    logged: Build answers from the samples that evaluation programs log.
    log_formats: Read the files that lm-eval, lighteval and every_eval_ever write.
    stored_runs: Read runs of a results folder or data set.
    sources: Find and read the answers that an argument of `tracker compare` names.
    verdicts: Compute differences between models, and the verdict on each difference.
    display: Write a comparison as Markdown, JSON or a page.
"""
