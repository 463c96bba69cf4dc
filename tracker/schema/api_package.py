"""Make a package callable like the API function with the same name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class ApiPackage(ModuleType):
    """Package that can be called like the API function with the same name.

    Importing a module of the package replaces the API function in the namespace `tracker` by the
    package.
    """

    @property
    def __call__(self) -> Any:
        """The API function that runs when the package is called."""
        return getattr(import_module("tracker.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        """The signature of the API function."""
        from inspect import signature

        return signature(self.__call__)
