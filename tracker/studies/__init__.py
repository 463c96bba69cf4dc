"""Questions of the paper and of its reviewers, each as a command over an experiment file.

A study is a folder of its name, and its rooms are called alike in all of them:

- `__init__`: the study itself, a class with `requests` and `say`, and the sentences of its answer;
- `figures`: what is computed from outcomes and observations (where that is much, `measures` are
  those of one cell alone);
- `tables` and `charts`: how these figures are laid out.

What one study alone needs has a name of its own (`theorem` has `building` and `lessons`).
What all share stands beside the folders: `base` says what a study is, `registry` which there are,
`conduct` takes one from its file to its section; `documents` reads a cell document by document,
`observing` observes more than outcomes, `layout` writes entries, tables and figures in sentences.
"""
