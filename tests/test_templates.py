"""Texts of templates: lines become sentences, and an unknown name is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracker.schema.text_templates import TextTemplate

TEMPLATE = """
{% macro greeting(names, end) %}
Hello
{% for name in names %}
{{ name }}{{ "," if not loop.last }}
{% endfor %}
({{ count_text(names|length, "name") }}
{% if end %}
, {{ end }}
{% endif %}
).
---
{% if names|length > 1 %}
{{ names|length|thousands }} greet.
{% endif %}
{% endmacro %}
"""


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextTemplate:
    folder = tmp_path / "words_of_a_test"
    (folder / "templates").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "templates" / "greetings.j2").write_text(TEMPLATE)
    monkeypatch.syspath_prepend(tmp_path)
    return TextTemplate(folder.name, "greetings")


def test_lines_are_joined_and_empty_texts_left_out(texts: TextTemplate) -> None:
    assert texts.render_all("greeting", ["Ann"], "") == ["Hello Ann (1 name)."]
    assert texts.render_all("greeting", ["Ann", "Bo"], "no more") == [
        "Hello Ann, Bo (2 names, no more).",
        "2 greet.",
    ]
    assert texts.render("greeting", ["Ann", "Bo"], "").endswith("(2 names). 2 greet.")


def test_an_unknown_name_is_an_error(texts: TextTemplate) -> None:
    with pytest.raises(AttributeError, match="farewell"):
        texts.render("farewell")
