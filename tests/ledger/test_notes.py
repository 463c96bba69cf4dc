from __future__ import annotations

import json

import pytest

from tracker.core.provenance import content_hash
from tracker.ledger.files import read_note, sealed, unsealed, write_note

EDITED = "its digest is not that of what it says: it was edited or damaged"
CONTENT = {"who": "größe", "numbers": [1, 2.5, None]}


def test_a_note_is_a_text_that_people_can_read():
    """In requests and identities too: they are looked at, and compared line by line."""
    digest = content_hash({"who": "me"})
    assert sealed({"who": "me"}) == f'{{\n  "who": "me",\n  "digest": "{digest}"\n}}'


def test_what_is_written_is_read_back(tmp_path):
    write_note(tmp_path / "new" / "note.json", CONTENT)
    assert read_note(tmp_path / "new" / "note.json") == CONTENT
    assert unsealed(sealed(CONTENT)) == CONTENT
    assert unsealed(sealed(CONTENT).encode()) == CONTENT


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ("[1, 2]", "it holds no JSON object"),
        ("null", "it holds no JSON object"),
        (json.dumps(CONTENT), EDITED),
        (sealed(CONTENT).replace("2.5", "2.6"), EDITED),
        (sealed(CONTENT).replace('"digest": "', '"digest": "0'), EDITED),
    ],
)
def test_what_is_no_note_is_said_in_words(tmp_path, text, why):
    """`tracker verify` prints them after the file's name."""
    with pytest.raises(ValueError, match=f"^{why}$"):
        unsealed(text)
    (tmp_path / "note.json").write_text(text)
    for path in (tmp_path / "note.json", tmp_path / "missing.json", tmp_path):
        assert read_note(path) == {}


class TestCopies:
    """A note is believed only under the name that it was written as."""

    def test_a_copy_of_another_note_is_not_believed(self, tmp_path):
        note, other = tmp_path / "note.json", tmp_path / "other.json"
        write_note(note, CONTENT)
        other.write_bytes(note.read_bytes())
        assert read_note(other) == {}
        with pytest.raises(ValueError, match=r"^it is a copy of note\.json$"):
            unsealed(other.read_bytes(), other.name)
        assert unsealed(other.read_bytes()) == CONTENT, "without a name: what a server sends"

    def test_notes_of_earlier_versions_are_read(self, tmp_path):
        """They do not hold their names."""
        (tmp_path / "note.json").write_text(sealed(CONTENT))
        assert read_note(tmp_path / "note.json") == CONTENT
