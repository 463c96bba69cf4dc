"""A study: the settings are its command, the study is its answer."""

from pydantic import Field

from tracker.studies.registry import StudySettings


class ParitySettings(StudySettings):
    """Do even layers matter more than odd ones?"""

    study = "example_extension.parity:Parity"
    at_least: float = Field(0.0, ge=0)
    """The smallest difference that counts."""
