"""Make packages callable that share their name with a function of the API."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class ApiPackage(ModuleType):
    """A package that is called as the function of the API that has its name.

    Once a module of it is imported, it takes the function's place in `tracker`.
    """

    @property
    def __call__(self) -> Any:
        """The function."""
        return getattr(import_module("tracker.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        """The function's signature."""
        from inspect import signature

        return signature(self.__call__)
