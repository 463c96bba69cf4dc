"""The engine against the lm-eval loop, timed side by side."""
