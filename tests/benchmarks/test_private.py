"""Test the private parts of lm-eval that we use, in every version that we allow."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from lm_eval.utils import apply_template
from packaging.requirements import Requirement

import tracker
from tracker.benchmarks import private

ROOT = Path(tracker.__file__).parents[1]


def test_the_oldest_and_the_newest_that_we_allow_is_this_one() -> None:
    """Both ends of the range are one version: the tests below hold for all that can be installed.

    A wider range needs an environment with its other end; lm-eval's next release chooses few-shot
    examples otherwise, so it is to be looked at before it is let in.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    (lm_eval,) = [text for text in requirements if text.name == "lm-eval"]
    assert version("lm-eval") in lm_eval.specifier
    assert "0.4.12" not in lm_eval.specifier
    assert "0.4.14" not in lm_eval.specifier


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (private.TaskFactory.__init__, ["self", "meta"]),
        (private.TaskFactory._load_full_config, ["self", "entry", "overrides"]),
        (private.TaskFactory._build_task, ["self", "entry", "overrides"]),
        (private.TaskFactory.build, ["self", "entry", "overrides", "registry"]),
        (private.TaskIndex.build, ["paths", "resolve_includes"]),
        (private.TaskIndex.entry_from_path, ["path"]),
        (private.Entry, ["name", "kind", "yaml_path", "cfg", "tags"]),
        (private.HFLM._loglikelihood_tokens, ["self", "requests", "disable_tqdm", "override_bs"]),
        (
            private.HFLM._model_generate,
            ["self", "context", "max_length", "stop", "generation_kwargs"],
        ),
    ],
)
def test_it_is_called_as_we_call_it(function, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compile_it = private.env.compile
    monkeypatch.setattr(
        private.env,
        "compile",
        lambda *arguments, **keywords: (
            calls.append(arguments) or compile_it(*arguments, **keywords)
        ),
    )
    texts = [apply_template("of {{n}} test documents", {"n": n}) for n in (3, 4)]
    assert texts == ["of 3 test documents", "of 4 test documents"]
    assert len(calls) == 1


def test_no_other_module_leans_on_a_private_part() -> None:
    """A name that begins with an underscore, of a module of lm-eval."""
    imports = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "tracker").rglob("*.py"))
        if path.name != "private.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(from|import) lm_eval\S*\._|from lm_eval\S* import _", line)
    ]
    assert imports == []
