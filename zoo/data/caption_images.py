"""Where the images are that a table of captions lists."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, Protocol

from zoo.data.transforms import ImageSource, naming_image
from zoo.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["HubImages", "PathImages", "PlacedImages"]


class PlacedImages(ImageSource, Protocol):
    """Images by position that can say where they are."""

    def place(self, row: int) -> str:
        """Say where an image is.

        Args:
            row: its position, from 0.
        """


class PathImages:
    """Images in files below a folder.

    Args:
        root: the folder.
        names: name of each file, relative to the folder or absolute, an array of pyarrow.

    Raises:
        InputError: a name leads out of the folder. Symbolic links are not looked at: those below the folder are the
            user's own, while the names may come from anywhere.
    """

    def __init__(self, root: str, names: Any) -> None:
        import pyarrow.compute as pc

        self.root = os.path.abspath(root)  # noqa: PTH100 - Path has no function that leaves symbolic links alone
        suspects = pc.or_(pc.match_substring(names, ".."), pc.match_substring_regex(names, r"^[/\\]|^[A-Za-z]:"))
        for name in names.filter(suspects).to_pylist():
            if os.path.commonpath([self.root, self._path(name)]) != self.root:
                raise InputError(f"the image {name!r} lies outside of root={root!r}: names must stay below root")
        self.names = names

    def _path(self, name: str) -> str:
        return os.path.normpath(os.path.join(self.root, name))  # noqa: PTH118

    def place(self, row: int) -> str:
        """Say where an image is.

        Args:
            row: its position, from 0.
        """
        return self._path(self.names[row].as_py())

    def image(self, row: int) -> Image:
        """Decode an image, mode RGB.

        Args:
            row: its position, from 0.

        Raises:
            InputError: it cannot be decoded.
        """
        from PIL import Image

        with naming_image(self.place, row), Image.open(self.place(row)) as image:
            return image.convert("RGB")


class HubImages:
    """The encoded images of a data set of `datasets`.

    Args:
        dataset: the data set, whose image column is not decoded.
        column: that column.
        name: the data set, for messages.
    """

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        self.dataset = dataset
        self.column = column
        self.name = name

    def place(self, row: int) -> str:
        """Say where an image is.

        Args:
            row: its position, from 0.
        """
        return f"{self.name}, row {row}"

    def image(self, row: int) -> Image:
        """Decode an image, mode RGB.

        Args:
            row: its position, from 0.

        Raises:
            InputError: it cannot be decoded.
        """
        from PIL import Image

        value = self.dataset[row][self.column]
        if not value or value["bytes"] is None:  # a path alone could name any file of this machine
            raise InputError(f"{self.place(row)}: the image column {self.column!r} holds no bytes")
        with naming_image(self.place, row):
            return Image.open(io.BytesIO(value["bytes"])).convert("RGB")
