"""The engine: scores every ablation at once, sharing what is the same over depth and over tokens."""
