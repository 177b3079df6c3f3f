"""What the fuzz tests draw and what they ask of every loss and metric.

A case is a function with its arguments. Most arguments are right, one in three cases has one that is not. Whatever they
are, the function has to give finite numbers and finite gradients, or refuse with an `InputError`, and leaves its arguments
alone. Where NaN or infinity is the defined result, the case says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.errors import InputError

__all__ = ["DTYPES", "Case", "Drawer", "Strategies", "check", "fuzz"]

T = TypeVar("T")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FILLINGS = ("normal", "normal", "zeros", "ones", "duplicates", "zero row", "mixed", "huge", "tiny", "one axis")
_LAYOUTS = ("plain", "transposed", "strided", "expanded", "sliced")


@dataclass
class Case:
    """A call and what is known about its result.

    Attributes:
        call: the function.
        arguments: its arguments by name.
        undefined: whether NaN or infinity is the documented result for these arguments.
        spoiled: whether an argument was replaced; NaN may have been put into it.
    """

    call: Callable[..., Any]
    arguments: dict[str, Any]
    undefined: Callable[[dict[str, Any]], bool] = lambda arguments: False
    spoiled: str | None = None


class Drawer:
    """Draws sizes, tensors and options.

    Args:
        draw: of hypothesis.
    """

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        self.dtype: torch.dtype = self.choice(*DTYPES)

    def choice(self, *options: T) -> T:
        """One of several values, the first for the simplest example."""
        chosen: T = self._draw(st.sampled_from(options))
        return chosen

    def rows(self) -> int:
        """The size of a batch: none, one, a few."""
        return self.choice(3, 2, 1, 0, 5, 8)

    def width(self) -> int:
        """A number of dimensions: none, one, a few."""
        return self.choice(4, 1, 0, 2, 7)

    def floats(self, *shape: int, dtype: torch.dtype | None = None, learns: bool = True) -> Tensor:
        """Features: of any type, size and layout, with a graph or not."""
        # One tensor in six has another type than the rest.
        dtype = dtype or self.choice(*[self.dtype] * 5, torch.float32)
        values = self._filled(shape, dtype).to(dtype)
        values = self._laid_out(values)
        return values.requires_grad_(learns and self.choice(True, False))

    def shares(
        self, *shape: int, lowest: float = 0.0, highest: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Numbers between two bounds, both of them among them."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (highest - lowest) + lowest
        kind = self.choice("random", "lowest", "highest")
        if kind != "random":
            values.fill_(lowest if kind == "lowest" else highest)
        return self._laid_out(values.to(dtype or self.dtype))

    def labels(self, rows: int, classes: int) -> Tensor:
        """Whole numbers of any type."""
        values = torch.randint(0, max(classes, 1), (rows,), generator=self.generator)
        if self.choice(False, False, True):
            values.fill_(max(classes, 1) - 1)
        return self._laid_out(values.to(self.choice(torch.int64, torch.int32, torch.uint8, torch.int8)))

    def mask(self, *shape: int) -> Tensor:
        """Truth values."""
        kind = self.choice("random", "all", "none")
        values = torch.rand(shape, generator=self.generator) < 0.5
        return self._laid_out(values if kind == "random" else torch.full(shape, kind == "all"))

    def arguments(self, **given: Any) -> tuple[dict[str, Any], str | None]:
        """The arguments, and the name of the one that was spoiled, if any was."""
        names = [name for name, value in given.items() if value is not None]
        if not names or self.choice(False, False, True) is False:
            return given, None
        name = self.choice(*names)
        return {**given, name: self._spoiled(given[name])}, name

    def _filled(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        kind = self.choice(*_FILLINGS)
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if kind in ("zeros", "ones"):
            values = torch.full_like(values, float(kind == "ones"))
        if values.ndim and len(values):
            if kind == "duplicates":
                values = values[:1].expand_as(values).clone()
            if kind == "zero row":
                values[0] = 0
            if kind == "mixed":
                powers = torch.randint(-30, 31, (len(values), *[1] * (values.ndim - 1)), generator=self.generator)
                values = values * 10.0**powers
            if kind == "one axis" and values.numel():
                values = torch.zeros_like(values)
                values[..., 0] = 1
        if kind in ("huge", "tiny"):
            values = values * (1e30 if kind == "huge" else 1e-30)
        # The largest number itself leaves no room for a difference of two.
        return values.clamp(-torch.finfo(dtype).max / 4, torch.finfo(dtype).max / 4)

    def _laid_out(self, values: Tensor) -> Tensor:
        """The same values, or copies of the first row, at other places in memory."""
        layout = self.choice(*_LAYOUTS)
        if layout == "transposed" and values.ndim > 1:
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "strided" and values.ndim:
            return values.repeat_interleave(2, -1)[..., ::2]
        if layout == "sliced" and values.ndim:
            return torch.cat([values, values])[: len(values)]
        if layout == "expanded" and values.ndim and len(values):
            return values[:1].expand_as(values)
        return values

    def _spoiled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._spoiled_tensor(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.choice(-1, 0, 1, 1000)
        if isinstance(value, float):
            return self.choice(-1.0, 0.0, torch.nan, torch.inf, 1e-6, 1e6, 1e-30, 1e30)
        if isinstance(value, str):
            return "nonsense"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*[self._spoiled(part) for part in value])
        if isinstance(value, (list, tuple)):
            return type(value)(self._spoiled(part) for part in value) if self.choice(True, False) else type(value)()
        return value

    def _spoiled_tensor(self, value: Tensor) -> Tensor:
        plain = value.detach()
        changes: list[Callable[[], Tensor]] = [
            lambda: plain.unsqueeze(0),
            plain.flatten,
            lambda: plain[:0] if plain.ndim else plain.unsqueeze(0),
            lambda: plain[1:] if plain.ndim else plain.unsqueeze(0),
            lambda: torch.cat([plain, plain]) if plain.ndim else plain.unsqueeze(0),
            lambda: plain[..., :0] if plain.ndim else plain.unsqueeze(0),
            lambda: plain.reshape(-1)[:1].reshape(()) if plain.numel() else plain,
            plain.bool,
            lambda: plain.to(torch.complex64),
            lambda: plain.clamp(-100, 100).to(torch.int32) if plain.is_floating_point() else plain.float(),
            lambda: -plain.abs() - 1 if plain.dtype not in (torch.bool, torch.uint8) else ~plain,
            lambda: plain + 100 if plain.dtype != torch.bool else ~plain,
            lambda: torch.full_like(plain, torch.nan) if plain.is_floating_point() else plain.to(torch.int16),
            lambda: torch.full_like(plain, torch.inf) if plain.is_floating_point() else plain.long() * 2**40,
        ]
        return self.choice(*changes)()


def check(case: Case) -> None:
    """Ask of a call what the module's docstring says.

    Args:
        case: the call.
    """
    given = list(_tensors(case.arguments))
    before = [(x, x._version, x.detach().clone()) for x in given]
    finite_input = all(bool(x.isfinite().all()) for x in given)
    try:
        result = case.call(**case.arguments)
    except InputError:
        pass
    else:
        strict = finite_input and not case.undefined(case.arguments)
        found = list(_tensors(result))
        _check_results(found, strict=strict)
        _check_gradients(found, given, strict=strict)
    for x, version, values in before:
        assert x._version == version, "an argument was changed in place"
        assert torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(values)), "an argument was changed"


def _check_results(found: list[Tensor], *, strict: bool) -> None:
    assert found, "there is no result"
    for x in found:
        assert not strict or bool(x.isfinite().all()), f"{x} is not finite"


def _check_gradients(found: list[Tensor], given: list[Tensor], *, strict: bool) -> None:
    total = [x.sum() for x in found if x.requires_grad]
    if not total:
        return
    torch.autograd.backward(total)
    for x in given:
        if x.grad is None:
            continue
        assert x.grad.shape == x.shape
        assert x.grad.dtype == x.dtype
        if strict:
            assert not bool(x.grad.isnan().any()), f"the gradient {x.grad} is NaN"
            # A vector of 1e-5 has a direction whose gradient is 1e5, which float16 does not hold.
            assert x.dtype == torch.float16 or bool(x.grad.isfinite().all()), f"the gradient {x.grad} is infinite"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


class Strategies(dict[str, Callable[[Drawer], Case]]):
    """What draws the cases of each name."""

    def of(self, *names: str) -> Callable[[Callable[[Drawer, str], Case]], Callable[[Drawer, str], Case]]:
        """Register what draws the cases of some names."""

        def register(make: Callable[[Drawer, str], Case]) -> Callable[[Drawer, str], Case]:
            for name in names:
                self[name] = lambda draw, name=name: make(draw, name)  # type: ignore[misc]
            return make

        return register


def fuzz(strategy: Callable[[Drawer], Case], *, examples: int) -> None:
    """Draw cases of a strategy, the same ones each time, and check each."""

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(strategy(Drawer(data.draw)))

    run()
