"""One extension of each kind, as `docs/extending.md` explains them."""
