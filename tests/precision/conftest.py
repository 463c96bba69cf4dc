"""What the tests of formats take from those of pruning."""

from tests.pruning.conftest import here

__all__ = ["here"]
