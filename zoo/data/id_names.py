"""The ids that MMRec's numbers of users and items stand for."""

from __future__ import annotations

from zoo.errors import InputError

__all__ = ["read_id_names"]


def read_id_names(file: str, count: int) -> list[str]:
    """Read MMRec's ``u_id_mapping.csv`` or ``i_id_mapping.csv``: the id that each number stands for.

    Args:
        file: a table with tabs between its two columns: the id, and the number, one of ``userID`` and ``itemID``.
        count: how many numbers there are.

    Returns:
        The id of each number.

    Raises:
        InputError: the file cannot be read, or does not name each number once.
    """
    import pyarrow as pa
    import pyarrow.csv as pc

    try:
        parse = pc.ParseOptions(delimiter="\t", quote_char=False)
        with pc.open_csv(file, parse_options=parse) as reader:
            names = reader.schema.names
        number = next((name for name in names if name in ("userID", "itemID")), None)
        if number is None or len(names) != 2:
            raise InputError(f"{file} must have two columns, one of them userID or itemID, it has {', '.join(names)}")
        kinds = {name: pa.int64() if name == number else pa.large_string() for name in names}
        table = pc.read_csv(file, parse_options=parse, convert_options=pc.ConvertOptions(column_types=kinds))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is no readable table of ids: {error}") from error
    ids = table.column(next(name for name in names if name != number)).to_pylist()
    pairs = dict(zip(table.column(number).to_pylist(), ids, strict=True))
    lacking = next((row for row in range(count) if pairs.get(row) is None), None)
    if lacking is not None or len(pairs) != len(ids) or len(set(ids)) != len(ids):
        what = f"lacks number {lacking}" if lacking is not None else "names a number or an id twice"
        raise InputError(f"{file} must name each of the numbers 0 … {count - 1} once; it {what}")
    return [pairs[row] for row in range(count)]
