"""Scoring: tokens in, log-likelihoods of every ablation out, sharing over depth and over tokens."""
