"""Constructor arguments as JSON and back, and the refusal of everything that would choose code."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zoo.arguments import Supplied, capture, check_json, decode, encode, parameter_names, refuse_code
from zoo.errors import InputError


@dataclass(frozen=True)
class Window:
    size: tuple[int, int]
    stride: float = 1.0
    area: int = field(init=False, default=0)


class Component:
    def __init__(
        self,
        network: str | nn.Module,
        sizes: tuple[int, ...] = (),
        pair: tuple[int, str] = (0, ""),
        *,
        mode: Literal["a", "b", 1] = "a",
        rate: float = 0.1,
        count: int = 1,
        flag: bool = False,
        window: Window | None = None,
        windows: list[Window] | None = None,
        options: dict[str, Any] | None = None,
        table: Mapping[str, Sequence[float]] | None = None,
        number: float | int = 1,
        old_style: Optional[int] = None,  # noqa: UP045 - users write it
        untyped=None,
    ) -> None: ...


def round_trip(**arguments: Any) -> dict[str, Any]:
    stored = {name: encode(name, value) for name, value in arguments.items()}
    return decode(Component, json.loads(json.dumps(stored)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet="xyz"), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=50)
@given(options=st.dictionaries(st.text(alphabet="xyz"), JSON))
def test_properties_json_comes_back_as_it_was(options: dict[str, Any]) -> None:
    assert round_trip(options=options)["options"] == options
    assert encode("options", options) == options


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.integers(), st.text()),
    mode=st.sampled_from(["a", "b", 1]),
    rate=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9),
    flag=st.booleans(),
    window=st.none() | st.builds(Window, st.tuples(st.integers(), st.integers()), st.floats(-1, 1)),
    table=st.none() | st.dictionaries(st.text(max_size=3), st.lists(st.floats(-1, 1), max_size=2), max_size=2),
    number=st.integers() | st.floats(allow_nan=False, allow_infinity=False),
)
def test_properties_annotated_values_come_back_in_their_types(**arguments: Any) -> None:
    back = round_trip(network="zoo/resnet8", **arguments)
    assert back == {"network": "zoo/resnet8", **arguments}
    for name in ("sizes", "pair", "flag", "number", "window"):
        assert type(back[name]) is type(arguments[name]), name
    assert type(back["rate"]) is float


@settings(deadline=None, max_examples=100)
@given(value=JSON, name=st.sampled_from(parameter_names(Component)))
def test_properties_decode_gives_the_type_or_refuses(value: Any, name: str) -> None:
    """Whatever a stored file says, nothing but InputError is raised and the value is JSON, a tuple or the dataclass."""
    refused = ""
    try:
        decoded = decode(Component, {name: value})[name]
    except InputError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(f"args.{name}")
    else:
        assert json.loads(json.dumps(encode(name, decoded))) == json.loads(json.dumps(value))


def test_golden_values() -> None:
    windows = [Window((1, 2)), Window((3, 4), 0.5)]
    assert encode("w", windows) == [{"size": [1, 2], "stride": 1.0}, {"size": [3, 4], "stride": 0.5}]
    assert round_trip(windows=windows)["windows"] == windows
    assert encode("s", torch.Size([2, 3])) == [2, 3]
    scalars = encode("n", [np.int64(3), np.float32(0.5), np.bool_(True)])
    assert scalars == [3, 0.5, True]
    assert [type(value) for value in scalars] == [int, float, bool]
    assert check_json([1], list, "x") == [1]
    assert check_json([1], tuple, "x") == (1,)
    assert check_json({"a": 1}, dict, "x") == {"a": 1}
    assert check_json(3, float | int, "x") == 3
    assert type(check_json(3, float | int, "x")) is int
    assert type(check_json(3, float, "x")) is float
    assert round_trip(old_style=3, untyped={"anything": [None]}) == {"old_style": 3, "untyped": {"anything": [None]}}


# -- refusals ------------------------------------------------------------------------------------------------------

CODE_KEYS = ["class_path", "init_args", "dict_kwargs", "_target_", "_class_path", "_instantiator"]


@pytest.mark.parametrize("key", CODE_KEYS)
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda inner: inner, r"args"),
        (lambda inner: {"options": inner}, r"args\.options"),
        (lambda inner: {"options": {"a": [0, {"b": inner}]}}, r"args\.options\.a\[1\]\.b"),
        (lambda inner: {"window": inner}, r"args\.window"),
        (lambda inner: {"unknown": inner}, r"args\.unknown"),
        (lambda inner: {"untyped": [[inner]]}, r"args\.untyped\[0\]\[0\]"),
    ],
    ids=["top", "option", "nested", "dataclass", "unknown", "list"],
)
def test_bad_keys_that_choose_code(key: str, wrap: Any, path: str) -> None:
    stored = wrap({key: "os.system"})
    with pytest.raises(InputError, match=rf"{path}\.{key} is refused: a stored model may not choose code"):
        decode(Component, stored)
    with pytest.raises(InputError, match=f"{key} is refused"):
        refuse_code(stored, "hyper_parameters")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"networks": "x"}, r"args\.networks: Component takes no such argument\. Did you mean network"),
        ({"self": 1}, r"args\.self: Component takes no such argument"),
        ({"count": True}, r"args\.count must be int, got true"),
        ({"count": "3"}, r'args\.count must be int, got "3"'),
        ({"count": 3.0}, r"args\.count must be int, got 3\.0"),
        ({"count": None}, r"args\.count must be int, got null"),
        ({"flag": 1}, r"args\.flag must be bool, got 1"),
        ({"rate": True}, r"args\.rate must be float, got true"),
        ({"rate": "0.1"}, r"args\.rate must be float"),
        ({"rate": float("nan")}, r"args\.rate must be a finite number, got nan"),
        ({"rate": float("-inf")}, r"args\.rate must be a finite number, got -inf"),
        ({"rate": 10**400}, r"args\.rate must be a finite number"),
        ({"mode": "c"}, r"args\.mode must be typing\.Literal\['a', 'b', 1\], got \"c\""),
        ({"mode": True}, r"args\.mode must be typing\.Literal"),
        ({"mode": 1.0}, r"args\.mode must be typing\.Literal"),
        ({"pair": [1]}, r"args\.pair must have 2 items, got 1"),
        ({"pair": [1, "a", 2]}, r"args\.pair must have 2 items, got 3"),
        ({"pair": ["a", "b"]}, r'args\.pair\[0\] must be int, got "a"'),
        ({"sizes": [1, 2, "x"]}, r'args\.sizes\[2\] must be int, got "x"'),
        ({"sizes": 3}, r"args\.sizes must be tuple\[int, \.\.\.\], got 3"),
        ({"network": 3}, r"args\.network must be str, got 3"),
        ({"network": {"a": 1}}, r'args\.network must be str, got \{"a": 1\}'),
        ({"options": [1]}, r"args\.options must be dict\[str, typing\.Any\]"),
        ({"window": {"size": [1, 2], "strid": 1}}, r"args\.window\.strid: Window takes.*Did you mean stride"),
        ({"window": {"size": [1, "2"]}}, r"args\.window\.size\[1\] must be int"),
        ({"window": {"stride": 1.0}}, r"args\.window cannot be a Window: .*size"),
        ({"window": {"size": [1, 2], "area": 5}}, r"args\.window\.area: Window takes no such argument"),
        ({"windows": [{"size": [1, 2]}, {"size": 3}]}, r"args\.windows\[1\]\.size must be tuple"),
        ({"table": {"a": [1.0, "x"]}}, r"args\.table\.a\[1\] must be float"),
        ({"old_style": "3"}, r'args\.old_style must be int or None, got "3"'),
    ],
)
def test_bad_stored_value(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(Component, stored)


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("a"), r"'x\.y\[1\]' cannot be stored: pathlib\.\w+ has no JSON form"),
        ({1, 2}, r"'x\.y\[1\]' cannot be stored: builtins\.set"),
        (len, r"'x\.y\[1\]' cannot be stored: builtins\.builtin_function_or_method"),
        (b"ab", r"'x\.y\[1\]' cannot be stored: builtins\.bytes"),
        (range(3), r"'x\.y\[1\]' cannot be stored: builtins\.range"),
        (torch.float32, r"'x\.y\[1\]' cannot be stored: torch\.dtype"),
        (torch.zeros(2), r"'x\.y\[1\]' cannot be stored: torch\.Tensor"),
        (np.zeros(2), r"'x\.y\[1\]' cannot be stored: numpy\.ndarray"),
        (nn.ReLU(), r"'x\.y\[1\]' cannot be stored: torch\.nn\..*ReLU"),
        (Colour.RED, r"'x\.y\[1\]' cannot be stored: .*Colour"),
        (Window, r"'x\.y\[1\]' cannot be stored: builtins\.type"),
        (float("nan"), r"'x\.y\[1\]' is nan, and JSON has no such number"),
        (np.float64("inf"), r"'x\.y\[1\]' is inf, and JSON has no such number"),
        ({1: "a"}, r"'x\.y\[1\]' has the key 1: keys must be strings"),
        ({"k": {None: 1}}, r"'x\.y\[1\]\.k' has the key None"),
    ],
)
def test_bad_value_to_store_names_its_place(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"argument {message}"):
        encode("x", {"y": [0, value]})


# -- what a call was -----------------------------------------------------------------------------------------------


def test_capture_records_defaults_and_modules() -> None:
    module = nn.ReLU()
    captured = capture(Component, (module, (1, 2)), {"count": 3})
    assert captured.keys() == set(parameter_names(Component))
    assert captured["network"] == Supplied("torch.nn.modules.activation.ReLU")
    assert (captured["sizes"], captured["count"], captured["rate"]) == ((1, 2), 3, 0.1)
    assert capture(Component, (), {"no": 1}) == {}


class Extended(Component):
    def __init__(self, extra: int, *rest: int, **kwargs: Any) -> None: ...


def test_arguments_that_are_passed_on_belong_to_the_class_that_is_extended() -> None:
    captured = capture(Extended, (1,), {"network": "x", "count": 2})
    assert captured == {"extra": 1, "network": "x", "count": 2}
    assert decode(Extended, captured) == captured
    assert parameter_names(Extended) == ["extra", *parameter_names(Component)]
    with pytest.raises(InputError, match=r"args\.count must be int"):
        decode(Extended, {"count": "2"})
    with pytest.raises(InputError, match=r"args\.nothing: Extended takes no such argument"):
        decode(Extended, {"nothing": 1})
    with pytest.raises(InputError, match=r"args\.rest: Extended takes no such argument"):
        decode(Extended, {name: list(v) if name == "rest" else v for name, v in capture(Extended, (1, 2), {}).items()})


def test_bad_annotation_that_cannot_be_resolved() -> None:
    class Local:
        def __init__(self, x: NotImported) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(InputError, match=r"annotations of .*Local\.__init__ cannot be resolved.*NotImported"):
        decode(Local, {"x": 1})
