"""From a table of interactions as it was read to one that is split and checked."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

import numpy as np

from zoo.data.interaction_splits import SplitRule, k_core, leave_one_out_split, random_user_split, temporal_split
from zoo.data.interaction_tables import InteractionTable
from zoo.data.splits import Indices
from zoo.errors import InputError

__all__ = ["GapRule", "RepeatRule", "require_numbers", "split_table"]

RepeatRule = Literal["error", "first"]
GapRule = Literal["error", "allow"]


def split_table(
    table: InteractionTable, rule: SplitRule | None, *, k: int, seed: int, repeats: RepeatRule
) -> tuple[InteractionTable, Indices]:
    """Split a table by a rule, or take the split that it has.

    With a rule: exact duplicates are left out, then repeats are treated, then the k-core is kept, and what is left numbered
    anew. Otherwise users and items keep their numbers.

    Args:
        table: the interactions.
        rule: the rule; None takes the table's split.
        k: of the k-core, 0 keeps all.
        seed: number of the random split.
        repeats: what to do if a user and an item meet several times: refuse it, or let the first count.

    Returns:
        The table, and 0, 1 or 2 for training, validation and test of each row.

    Raises:
        InputError: there is neither a rule nor a split, a pair occurs several times and must not, or nothing is left.
    """
    if table.incomplete:
        warnings.warn(f"{table.incomplete} interactions lack a user, an item or a time and are left out", stacklevel=2)
    if rule is None:
        if table.labels is None:
            raise InputError("the interactions have no column of the split: choose split='random', or set split_column")
        kept = _first_of_each(table, np.argsort(table.labels, kind="stable"), repeats)
        labels = table.labels[kept]
        return replace(table, users=table.users[kept], items=table.items[kept], labels=labels, times=None), labels
    kept = _first_of_each(table, _distinct(table), repeats)
    kept = kept[k_core(table.users[kept], table.items[kept], k)]
    if len(kept) == 0:
        raise InputError(
            f"no interaction is left: there is no part in which users and items have {k} each; lower k_core"
        )
    table = table.take(kept)
    if rule == "random":
        return table, random_user_split(table.users, seed=seed)
    if rule == "temporal":
        return table, temporal_split(table.times)
    return table, leave_one_out_split(table.users, table.times)


def _distinct(table: InteractionTable) -> Indices:
    """Return the first row of each user, item and time; all rows if there is no time."""
    if table.times is None:
        return np.arange(len(table.users))
    order = np.lexsort((table.times, table.items, table.users))
    users, items, times = table.users[order], table.items[order], table.times[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(users) != 0) | (np.diff(items) != 0) | (np.diff(times) != 0)
    return np.sort(order[new])  # the sort is stable: the first of equal rows


def _first_of_each(table: InteractionTable, order: Indices, repeats: RepeatRule) -> Indices:
    """Return the rows that come first in an order with their user and item, ascending."""
    keys = table.users[order] * len(table.item_ids) + table.items[order]
    _, first = np.unique(keys, return_index=True)
    if len(first) < len(order) and repeats == "error":
        again = np.setdiff1d(np.arange(len(order)), first)
        row = order[again[0]]
        raise InputError(
            f"{len(again)} interactions repeat a pair of user and item, the first is row {row}: user "
            f"{table.user_ids[table.users[row]]!r}, item {table.item_ids[table.items[row]]!r}; duplicates='first' keeps one"
        )
    return np.sort(order[first])


def require_numbers(table: InteractionTable) -> None:
    """Refuse a table in which a number of a user or item has no interaction.

    Args:
        table: a table whose ids are numbers.

    Raises:
        InputError: there is such a number.
    """
    for what, codes, ids in (("user", table.users, table.user_ids), ("item", table.items, table.item_ids)):
        unused = np.flatnonzero(np.bincount(codes, minlength=len(ids)) == 0)
        if len(unused):
            raise InputError(
                f"{len(unused)} numbers of {what}s below the highest, {len(ids) - 1}, have no interaction, the first is "
                f"{unused[0]}; gaps='allow' takes them as {what}s without any"
            )
