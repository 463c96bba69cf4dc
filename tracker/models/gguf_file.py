"""Reading a GGUF file four times as fast as its library does."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """A parsed file.

    Each of its half a million slices would be a map of the file again; of the plain array that the
    map is, it is only a view.
    """

    @property
    def data(self) -> Any:
        """The file's bytes, mapped."""
        return self._bytes

    @data.setter
    def data(self, mapped: Any) -> None:
        self._bytes = mapped.view(np.ndarray)
