"""Compare models by their logged answers to the same documents.

Modules:
    answers: Define a model's answers, and match the documents of two models.
    logged: Build answers from the samples that evaluation programs log.
    lm_eval_files: Read the files of `lm_eval --log_samples`.
    lighteval_files: Read the files of `lighteval --save-details`.
    stored_runs: Read runs of a results folder or data set.
    sources: Find and read the answers that an argument names.
    verdicts: Compute differences, and decide verdicts.
    display: Write a comparison as Markdown, JSON or a page.
"""
