"""The engine: scores all ablations at once, sharing over depth and over tokens."""
