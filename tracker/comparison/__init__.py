"""Compare models by their logged answers to the same documents.

- `answers`: types of a model's answers.
- `lm_eval_files`: read the files of `lm_eval --log_samples`.
- `stored_runs`: read runs of a results folder.
- `pairing`: match the documents of two models, and refuse different settings.
- `verdicts`: compute differences, verdicts and the documents that would settle open ones.
- `display`: write a comparison as text, Markdown, JSON or a page.
"""
