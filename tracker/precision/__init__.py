"""Which weights may have fewer bits: chosen within a budget, tested, and written."""
