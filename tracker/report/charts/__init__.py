"""Draws records as plotly charts: what a cell, a model and several models show."""
