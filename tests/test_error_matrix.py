"""zoo.error_matrix: all modes against one graph over all pairs; what is kept, what is called, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.error_matrix_cases import EXACT, MODES, SmallDenoiser, gradient_of, kept_bytes, plain, run
from zoo.error_matrix import contrast
from zoo.losses import equal_captions, softrepa_loss


@pytest.mark.parametrize("pairs", MODES)
@pytest.mark.parametrize("micro_batch", [None, 1, 3, 10, 1000])
def test_identity_one_graph(pairs: Any, micro_batch: int | None) -> None:
    denoiser = SmallDenoiser()
    expected, errors, expected_gradient = plain(denoiser)
    found = run(denoiser, pairs=pairs, micro_batch=micro_batch)
    torch.testing.assert_close(found.loss.detach(), expected, **EXACT)
    torch.testing.assert_close(found.errors, errors, **EXACT)
    assert not found.errors.requires_grad
    torch.testing.assert_close(gradient_of(found.loss, denoiser), expected_gradient, **EXACT)
    assert all(one.abs().max() > 1e-3 for one in expected_gradient)


@pytest.mark.parametrize("pairs", MODES)
def test_identity_temperature_of_each_image(pairs: Any) -> None:
    """Each part of the rows has its own part of a temperature, a mask and the own captions."""
    denoiser = SmallDenoiser(4, 6)
    options: dict[str, Any] = {"temperature": torch.tensor([[0.05], [0.1], [0.4], [2.0]]), "first_row": 1}
    options |= {"diagonal_weight": 3.0, "mask": torch.arange(24).view(4, 6) % 5 == 0}
    expected, _, expected_gradient = plain(denoiser, **options)
    found = run(denoiser, pairs=pairs, micro_batch=12, **options)
    torch.testing.assert_close(found.loss.detach(), expected, **EXACT)
    torch.testing.assert_close(gradient_of(found.loss, denoiser), expected_gradient, **EXACT)


@settings(deadline=None, max_examples=25)
@given(
    pairs=st.sampled_from(MODES),
    rows=st.integers(1, 5),
    more=st.integers(0, 3),
    micro_batch=st.one_of(st.none(), st.integers(1, 20)),
    masked=st.booleans(),
    temperature=st.sampled_from([0.07, 0.5, "rows", "columns", "entries"]),
    diagonal_weight=st.sampled_from([0.0, 10.0]),
    backward_scale=st.sampled_from([1.0, 1024.0]),
    seed=st.integers(0, 2**16),
)
def test_properties_one_graph(
    pairs: Any,
    rows: int,
    more: int,
    micro_batch: int | None,
    masked: bool,
    temperature: Any,
    diagonal_weight: float,
    backward_scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = rows + more
    denoiser = SmallDenoiser(rows, columns, seed=seed)
    options: dict[str, Any] = {
        "first_row": int(torch.randint(more + 1, (), generator=generator)),
        "diagonal_weight": diagonal_weight,
        "scale": 3.0,
        "temperature": temperature,
    }
    if isinstance(temperature, str):
        shape = {"rows": (rows, 1), "columns": (columns,), "entries": (rows, columns)}[temperature]
        options["temperature"] = 0.05 + torch.rand(shape, generator=generator)
    if masked:
        options["mask"] = torch.rand(rows, columns, generator=generator) < 0.4
    expected, errors, expected_gradient = plain(denoiser, **options)
    found = run(denoiser, pairs=pairs, micro_batch=micro_batch, backward_scale=backward_scale, **options)
    torch.testing.assert_close(found.loss.detach(), expected, **EXACT)
    torch.testing.assert_close(gradient_of(found.loss, denoiser), expected_gradient, **EXACT)
    evaluated = ~found.errors.isnan()
    torch.testing.assert_close(found.errors[evaluated], errors[evaluated], **EXACT)
    own = torch.zeros(rows, columns, dtype=torch.bool)
    own.diagonal(options["first_row"]).fill_(value=True)
    assert torch.equal(evaluated, own | ~options.get("mask", torch.zeros_like(own)))
    # No pair is evaluated that does not count, and none more often than the mode says.
    assert sum(denoiser.calls) == evaluated.sum() * (2 if pairs == "two_pass" else 1)
    assert max(denoiser.calls) <= (micro_batch or (rows * columns if pairs == "full" else columns))


def test_calls() -> None:
    def calls(**options: Any) -> list[int]:
        denoiser = SmallDenoiser(3, 4)
        run(denoiser, **options)
        return denoiser.calls

    assert calls(pairs="full") == [12]
    assert calls(pairs="full", micro_batch=5) == [5, 5, 2]
    assert calls() == [4, 4, 4]
    assert calls(micro_batch=3) == [3, 1, 3, 1, 3, 1]
    assert calls(micro_batch=9) == [8, 4]
    assert calls(pairs="two_pass") == [4, 4, 4, 4, 4, 4]
    assert calls(pairs="two_pass", micro_batch=7) == [7, 5, 7, 5]
    assert calls(negatives=1) == [2, 2, 2]


def test_kept_bytes() -> None:
    """The order of the modes' memory; a row's graph is gone before the next one's; nothing but the gradient outlives."""
    most = {}
    for name, options in {
        "full": {"pairs": "full"},
        "full in parts": {"pairs": "full", "micro_batch": 8},
        "rows": {},
        "two rows": {"micro_batch": 16},
        "row in parts": {"micro_batch": 2},
        "two_pass 4": {"pairs": "two_pass", "micro_batch": 4},
        "two_pass 1": {"pairs": "two_pass", "micro_batch": 1},
    }.items():
        denoiser = SmallDenoiser(8, 8)
        given_options: dict[str, Any] = options
        with kept_bytes() as kept:
            loss = run(denoiser, **given_options).loss
            most[name] = kept["most"]
            tokens = sum(token.numel() * token.element_size() for token in denoiser.tokens)
            assert kept["now"] == tokens, "the loss keeps its gradient and nothing else"
            del loss
            assert kept["now"] == 0
    # Frozen weights and tokens are kept beside the activations, whatever the mode.
    assert most["rows"] < 0.25 * most["full"]
    assert most["rows"] < most["two rows"] < 0.4 * most["full"]
    assert most["two_pass 1"] < 0.7 * most["two_pass 4"] < 0.5 * most["rows"]
    assert most["full in parts"] > 0.9 * most["full"]
    assert most["rows"] < most["row in parts"] < 2 * most["rows"]  # the weights once for each call
    with kept_bytes() as kept, torch.no_grad():
        run(SmallDenoiser(8, 8), pairs="full")
    assert kept["most"] == 0


@pytest.mark.parametrize("pairs", MODES)
def test_stop_gradient_all_else(pairs: Any) -> None:
    """Weights of the denoiser that require a gradient get none, nor does a temperature; frozen parameters are left out."""
    denoiser = SmallDenoiser()
    denoiser.weights.requires_grad_()
    expected = plain(denoiser, temperature=0.2)
    temperature = torch.tensor(0.2, requires_grad=True, dtype=torch.float64)
    denoiser.tokens[0].requires_grad_(requires_grad=False)
    unused = torch.ones(3, requires_grad=True, dtype=torch.float64)
    found = contrast(
        denoiser, rows=4, columns=4, parameters=[*denoiser.tokens, unused], pairs=pairs, temperature=temperature
    )
    found.loss.backward()
    assert denoiser.weights.grad is temperature.grad is denoiser.tokens[0].grad is None
    torch.testing.assert_close(denoiser.tokens[1].grad, expected[2][1], **EXACT)
    assert unused.grad is not None, "DDP waits for the gradient of every parameter"
    assert (unused.grad == 0).all()


@pytest.mark.parametrize("pairs", MODES)
def test_shared_tokens(pairs: Any) -> None:
    """Tokens that are made once a step, from a bank that is not in the calls: they are what is handed over."""
    denoiser = SmallDenoiser()
    expected = plain(denoiser)[2]
    base, offset = (token.detach().clone().requires_grad_() for token in denoiser.tokens)
    denoiser.tokens = [base + 0 * offset, offset + 0 * base]
    run(denoiser, pairs=pairs).loss.backward()
    torch.testing.assert_close((base.grad, offset.grad), expected, **EXACT)


@pytest.mark.parametrize("pairs", MODES)
def test_backward_as_any_loss(pairs: Any) -> None:
    """Factors, sums with other losses, accumulation, and a gradient scaler act as on the loss of one graph."""
    denoiser = SmallDenoiser()
    expected = plain(denoiser)[2]
    for _ in range(2):
        (run(denoiser, pairs=pairs).loss / 2 + denoiser.tokens[0].sum()).backward()
    torch.testing.assert_close(denoiser.tokens[0].grad, expected[0] + 2, **EXACT)
    torch.testing.assert_close(denoiser.tokens[1].grad, expected[1], **EXACT)

    for token in denoiser.tokens:
        token.grad = None
    optimizer = torch.optim.SGD(denoiser.tokens, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [token.detach().clone() for token in denoiser.tokens]
    scaler.scale(run(denoiser, pairs=pairs, backward_scale=scaler.get_scale()).loss).backward()
    torch.testing.assert_close(denoiser.tokens[0].grad, 1024 * expected[0], **EXACT)
    scaler.step(optimizer)
    moved = [start - token.detach() for start, token in zip(before, denoiser.tokens, strict=True)]
    torch.testing.assert_close(tuple(moved), expected, **EXACT)
    loss = run(denoiser, pairs=pairs).loss
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(torch.autograd.grad(loss, denoiser.tokens[0], create_graph=True)[0].sum(), denoiser.tokens)


@pytest.mark.parametrize("pairs", MODES)
def test_without_gradient(pairs: Any) -> None:
    """Validation: the same value and errors, one pass, in calls of the same size."""
    denoiser = SmallDenoiser()
    expected, errors, _ = plain(denoiser)
    with torch.no_grad():
        found = run(denoiser, pairs=pairs, micro_batch=6)
    assert denoiser.calls == [6, 6, 4]
    frozen = SmallDenoiser()
    frozen.tokens = [token.detach() for token in frozen.tokens]
    for result in (found, run(frozen, pairs=pairs)):
        assert not result.loss.requires_grad
        torch.testing.assert_close(result.loss, expected, **EXACT)
        torch.testing.assert_close(result.errors, errors, **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(run(denoiser, pairs=pairs).loss, expected, **EXACT)


@pytest.mark.parametrize("pairs", MODES)
def test_negatives(pairs: Any) -> None:
    denoiser = SmallDenoiser(4, 9)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[1, 2:8], mask[2] = True, True  # one left to image 1 besides 0 and 8, none to image 2
    options: dict[str, Any] = {"pairs": pairs, "first_row": 3, "mask": mask, "negatives": 3}
    found = run(denoiser, generator=torch.Generator().manual_seed(5), **options)
    evaluated = ~found.errors.isnan()
    assert evaluated.sum(1).tolist() == [4, 4, 1, 4]
    assert evaluated.diagonal(3).all()
    assert not (evaluated & mask)[[0, 3]].any()
    assert evaluated[1].nonzero().flatten().tolist() == [0, 1, 4, 8]
    # The loss is that of the captions that were drawn, and the gradient that of this loss.
    expected, errors, expected_gradient = plain(denoiser, mask=~evaluated, first_row=3)
    torch.testing.assert_close(found.loss.detach(), expected, **EXACT)
    torch.testing.assert_close(found.errors[evaluated], errors[evaluated], **EXACT)
    torch.testing.assert_close(gradient_of(found.loss, denoiser), expected_gradient, **EXACT)
    again = run(denoiser, generator=torch.Generator().manual_seed(5), **options)
    torch.testing.assert_close(again.errors, found.errors, equal_nan=True, **EXACT)
    assert run(denoiser, **{**options, "negatives": 1}).loss < run(denoiser, **{**options, "negatives": None}).loss


def test_negatives_are_drawn_evenly() -> None:
    denoiser = SmallDenoiser(40, 44)
    generator = torch.Generator().manual_seed(0)
    drawn = [~run(denoiser, negatives=10, generator=generator, first_row=2).errors.isnan() for _ in range(5)]
    counts = torch.stack(drawn).sum((0, 1)) - 5 * torch.tensor([0, 0, *[1] * 40, 0, 0])
    assert counts.sum() == 5 * 40 * 10
    assert all(20 < count < 75 for count in counts.tolist()), "46 and a half of each, as a rule"
    denoiser = SmallDenoiser(1, 5)
    for negatives in (4, 100):
        exact = run(denoiser, negatives=negatives, first_row=2)
        torch.testing.assert_close(exact.loss.detach(), plain(denoiser, first_row=2)[0], **EXACT)


def test_equal_captions() -> None:
    """Images with the same caption: their pairs cost nothing and count for nothing."""
    denoiser = SmallDenoiser()
    denoiser.texts[3] = denoiser.texts[1]
    found = run(denoiser, mask=equal_captions(denoiser.texts))
    assert found.errors.isnan().nonzero().tolist() == [[1, 3], [3, 1]]
    assert denoiser.calls == [4, 3, 4, 3] or sum(denoiser.calls) == 14
    with torch.no_grad():
        loss = softrepa_loss(found.errors, mask=found.errors.isnan())
    torch.testing.assert_close(found.loss.detach(), loss, **EXACT)


@pytest.mark.parametrize("pairs", MODES)
def test_checkpointed_denoiser(pairs: Any) -> None:
    """What makes its activations anew in the backward pass does so within its own part."""
    denoiser = SmallDenoiser()
    expected = plain(denoiser)[2]

    def errors_of(image: Tensor, text: Tensor) -> Tensor:
        return checkpoint(denoiser, image, text, use_reentrant=False)  # type: ignore[no-any-return]

    loss = contrast(errors_of, rows=4, columns=4, parameters=denoiser.tokens, pairs=pairs).loss
    torch.testing.assert_close(gradient_of(loss, denoiser), expected, **EXACT)


def test_training_lowers_the_loss() -> None:
    denoiser = SmallDenoiser(6, 6)
    optimizer = torch.optim.Adam(denoiser.tokens, lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = run(denoiser).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
