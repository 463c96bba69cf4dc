"""The one HTML page: its sections, files within it, templates."""
