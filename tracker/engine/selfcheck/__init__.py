"""Trust, then verify: what is shared is held against models that were really changed."""
