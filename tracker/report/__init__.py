"""Turns cell records into figures, tables and one self-contained HTML page."""
