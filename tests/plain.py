"""Plain lm-eval, which tracker is compared with: no code of ours."""

from __future__ import annotations

from typing import Any

import lm_eval
import lm_eval.evaluator
import pytest


def evaluate(model: Any, **settings: Any) -> dict[str, Any]:
    """Run lm-eval's own loop, but do not let it ask pip, git and compilers what is installed."""
    with pytest.MonkeyPatch.context() as there:
        there.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        there.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
        found: dict[str, Any] = lm_eval.simple_evaluate(model, bootstrap_iters=0, **settings)
    return found
