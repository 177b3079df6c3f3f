"""Small sets of interactions in the formats that people have them in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["FEATURES", "ROWS", "rows_of", "write_mmrec"]

# user, item, time, label: 3 users, 4 items; item 3 is in the test alone.
ROWS = [
    (0, 0, 5, 0), (0, 1, 3, 0), (0, 2, 9, 1), (1, 1, 1, 0), (1, 2, 2, 0), (1, 3, 8, 2), (2, 0, 4, 0), (2, 3, 7, 2),
]  # fmt: skip
FEATURES = {"image": np.arange(1.0, 9.0).reshape(4, 2), "text": np.arange(12, dtype=np.float32).reshape(4, 3) - 20}


def write_mmrec(folder: Path, rows: Sequence[tuple[int, ...]] = ROWS, *, labels: bool = True) -> str:
    """Write a folder as MMRec does: image features in float64, text in float32."""
    header = ["userID", "itemID", "rating", "timestamp", *(["x_label"] if labels else [])]
    lines = ["\t".join(header)]
    for user, item, time, label in rows:
        lines.append("\t".join(map(str, [user, item, 5.0, time, *([label] if labels else [])])))
    (folder / "toy.inter").write_text("\n".join(lines) + "\n")
    for name, values in FEATURES.items():
        np.save(folder / f"{name}_feat.npy", values)
    return str(folder)


def rows_of(data: object, split: str) -> list[tuple[str, str]]:
    """The interactions of a split by their external ids."""
    users, items = data.interactions[split].tolist()  # type: ignore[attr-defined]
    return [(data.user_ids[u], data.item_ids[i]) for u, i in zip(users, items, strict=True)]  # type: ignore[attr-defined]
