"""The words that all speak: what is asked for, what is found, and what goes wrong."""
