"""Searching which parts to take out, and telling what was found."""
