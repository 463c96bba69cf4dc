"""Ranks the layers of a model, models, and how well proxies do it; pairs of models beside it."""
