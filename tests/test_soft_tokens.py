"""The bank of soft tokens, and soft tokens on our own small network and on networks that cannot have any."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.architectures.tiny_mmdit import TinyMMDiT
from zoo.errors import InputError
from zoo.soft_tokens import SoftTokens, attach, detach

TEXT = {"encoder_hidden_states": (2, 5, 12), "pooled_projections": (2, 6)}


@pytest.fixture(scope="module")
def network() -> TinyMMDiT:
    torch.manual_seed(0)
    made = TinyMMDiT(width=16, depth=3, heads=2, joint_attention_dim=12, pooled_projection_dim=6).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)  # the modulation begins at zero, where no token has an effect
    return made.requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _nothing_left(network: TinyMMDiT) -> Iterator[None]:
    yield
    detach(network)
    network.disable_gradient_checkpointing()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def given_arguments(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (2, 1, 8, 8), **TEXT}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def run(network: nn.Module, timestep: Any, **given: Tensor) -> Tensor:
    return network(**(given or given_arguments()), timestep=torch.as_tensor(timestep))[0]


def by_hand(network: TinyMMDiT, bank: SoftTokens, places: list[int], times: list[float]) -> Tensor:
    """The network's answer from each block as a function: put the tokens in front, run the block, take them away."""
    held = {}
    for index, block in enumerate(network.transformer_blocks):
        held[index] = block.forward

        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, *, index: int = index, **rest: Any) -> Any:
            if index in places:
                layer = places.index(index)
                rows = [bank.base[layer] + bank.offset[int(min(t, 999)) // 10, layer] for t in times]
                encoder_hidden_states = torch.cat([torch.stack(rows).double(), encoder_hidden_states], 1)
            text, image = held[index](hidden_states, encoder_hidden_states, **rest)
            return (text[:, -5:] if text is not None else None), image

        block.forward = forward
    try:
        return run(network, times)
    finally:
        for block in network.transformer_blocks:
            del block.forward


BUCKETS = {0: 0, 9: 0, 9.99: 0, 10: 1, 123: 12, 850: 85, 998.999: 99, 999: 99, 1000: 99, 8.928571701049805: 0}


def test_golden_buckets() -> None:
    # The spec's section 5.
    bank = SoftTokens(1, 1, 1)
    assert bank.bucket(torch.tensor(list(BUCKETS))).tolist() == list(BUCKETS.values())
    assert [bank.bucket(time).item() for time in BUCKETS] == list(BUCKETS.values())
    assert bank.bucket(torch.tensor([-3, 2000])).tolist() == [0, 99]


@given(st.integers(1, 1000), st.lists(st.floats(0, 1000), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_properties_of_buckets(buckets: int, times: list[float]) -> None:
    found = SoftTokens(1, 1, 1, buckets).bucket(torch.tensor(sorted(times), dtype=torch.float64))
    assert found.min() >= 0
    assert found.max() < buckets
    assert (found.diff() >= 0).all()


def test_tokens_are_base_and_offset_of_the_time() -> None:
    bank = SoftTokens(depth=3, tokens=2, width=5, buckets=10)
    tokens = bank(torch.tensor([0, 850]))
    assert tokens.shape == (2, 3, 2, 5)
    for row, bucket in enumerate((0, 8)):
        for layer in range(3):
            for token in range(2):
                expected = bank.base[layer, token] + bank.offset[bucket, layer]
                torch.testing.assert_close(tokens[row, layer, token], expected, rtol=0, atol=0)
    still = SoftTokens(3, 2, 5, buckets=0)
    assert list(still.state_dict()) == ["base"]
    assert torch.equal(still(torch.tensor([0, 850])), torch.stack([still.base, still.base]))
    assert still(7).shape == (1, 3, 2, 5)


def test_parameters_of_the_papers_banks() -> None:
    # The spec's section 1.1: released tokens of Stable Diffusion 1.5, XL and 3.
    sizes = {(1, 4, 768, 100): 79_872, (1, 4, 2048, 0): 8_192, (5, 4, 1536, 100): 798_720}
    for arguments, count in sizes.items():
        assert sum(p.numel() for p in SoftTokens(*arguments).parameters()) == count


def test_tokens_begin_apart_and_stay_apart(network: TinyMMDiT) -> None:
    def gradients(init_std: float) -> Tensor:
        bank = SoftTokens(1, 3, 16, init_std=init_std)
        bank.start_at(torch.ones(16))
        with attach(network, bank, [0]):
            run(network, 500).square().sum().backward()
        return bank.base.grad[0]

    # What happens to the authors' tokens of Stable Diffusion 1.5, which are equal to the bit.
    torch.testing.assert_close(gradients(0.0).std(0), torch.zeros(16))
    assert (gradients(0.02).std(0) > 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"tokens": 2.0}, "tokens must be a whole number of at least 1, got 2.0"),
        ({"width": -1}, "width must be"),
        ({"buckets": 1001}, "buckets must be a whole number of at least 0 and at most 1000, got 1001"),
        ({"init_std": -0.1}, "init_std must be finite and not negative"),
    ],
)
def test_bad_sizes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftTokens(**{"depth": 1, "tokens": 1, "width": 1, **arguments})


def test_bad_start() -> None:
    for shape in ((3,), (2, 2, 4), (1, 1, 1, 4)):
        with pytest.raises(InputError, match="embedding must be of shape"):
            SoftTokens(1, 2, 4).start_at(torch.zeros(shape))


@pytest.mark.parametrize("places", [[0], [0, 1], [2], [0, 1, 2], [2, 0]])
def test_equals_the_blocks_by_hand(network: TinyMMDiT, places: list[int]) -> None:
    bank, times = SoftTokens(len(places), 4, 16), [1000.0, 37.5]
    expected = by_hand(network, bank, places, times)
    wanted = torch.autograd.grad(expected.square().sum(), list(bank.parameters()))
    with attach(network, bank, places):
        found = run(network, times)
        gradients = torch.autograd.grad(found.square().sum(), list(bank.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().sum() > 0


def test_one_layer_is_shared_by_all_blocks(network: TinyMMDiT) -> None:
    shared, each = SoftTokens(1, 2, 16), SoftTokens(3, 2, 16)
    with torch.no_grad():
        each.base.copy_(shared.base.expand_as(each.base))
        each.offset.copy_(shared.offset.expand_as(each.offset))
    with attach(network, shared, "transformer_blocks"):
        found = run(network, 5)
    with attach(network, each, "transformer_blocks"):
        torch.testing.assert_close(found, run(network, 5), rtol=0, atol=0)


def test_identity_order_of_the_tokens_does_not_matter(network: TinyMMDiT) -> None:
    bank = SoftTokens(2, 4, 16)
    other = copy.deepcopy(bank)
    with torch.no_grad():
        other.base.copy_(bank.base[:, [2, 0, 3, 1]])
    with attach(network, bank, [0, 1]):
        found = run(network, 5)
    with attach(network, other, [0, 1]):
        torch.testing.assert_close(found, run(network, 5), rtol=0, atol=1e-12)


def test_detached_is_the_network_itself(network: TinyMMDiT) -> None:
    plain, names = run(network, 400), list(network.state_dict())
    attachment = attach(network, SoftTokens(2, 4, 16), [0, 1])
    assert list(network.state_dict()) == names
    assert not torch.equal(run(network, 400), plain)
    attachment.detach()
    assert torch.equal(run(network, 400), plain)
    later = attach(network, SoftTokens(2, 4, 16), [0, 1])
    attachment.detach()  # has none left, and leaves those of another alone
    assert not torch.equal(run(network, 400), plain)
    later.detach()
    with pytest.raises(KeyError), attach(network, SoftTokens(2, 4, 16), [0, 1]):
        raise KeyError
    assert torch.equal(run(network, 400), plain)


def test_only_the_bank_and_the_rows_of_the_times_have_gradients(network: TinyMMDiT) -> None:
    bank = SoftTokens(2, 4, 16)
    with attach(network, bank, [0, 1]):
        run(network, [123, 850.0]).square().sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert (bank.base.grad.flatten(1).norm(dim=1) > 0).all()
    reached = bank.offset.grad.norm(dim=2)
    assert reached.sum(1).nonzero().flatten().tolist() == [12, 85]
    assert (reached[[12, 85]] > 0).all()


@pytest.mark.parametrize("timestep", [500, torch.tensor(500), torch.tensor([500.0]), torch.tensor([500.0, 500.0])])
def test_one_time_serves_the_batch(network: TinyMMDiT, timestep: Any) -> None:
    with attach(network, SoftTokens(2, 4, 16), [0, 1]):
        torch.testing.assert_close(run(network, timestep), run(network, [500, 500]), rtol=0, atol=1e-12)


def test_by_position_and_by_keyword(network: TinyMMDiT) -> None:
    given_ = given_arguments()
    with attach(network, SoftTokens(2, 4, 16), [0, 1]):
        expected = run(network, 500.0)
        positional = network(*given_.values(), torch.tensor(500.0), {"unknown": 1})[0]
    assert torch.equal(positional, expected)


def interleaved(network: TinyMMDiT) -> list[Tensor]:
    torch.manual_seed(3)
    bank = SoftTokens(2, 4, 16)
    with attach(network, bank, [0, 1]):
        first = run(network, 120, **given_arguments(1))
        second = run(network, 980, **given_arguments(2))
        (first.square().sum() + 3 * second.square().sum()).backward()
    return [bank.base.grad, bank.offset.grad]


def test_checkpointing_gives_the_same_gradients_with_another_pass_between(network: TinyMMDiT) -> None:
    expected = interleaved(network)
    network.enable_gradient_checkpointing()
    found = interleaved(network)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert found[1].flatten(1).norm(dim=1).nonzero().flatten().tolist() == [12, 98]


def test_the_callers_arguments_are_not_changed(network: TinyMMDiT) -> None:
    extras: dict[str, Any] = {"unknown": 1}
    with attach(network, SoftTokens(2, 4, 16), [0, 1]):
        network(**given_arguments(), timestep=torch.tensor(5.0), joint_attention_kwargs=extras)
    assert extras == {"unknown": 1}


def test_blocks_see_nothing_of_the_tokens_way(network: TinyMMDiT) -> None:
    seen: list[Any] = []

    def look(_block: nn.Module, _args: Any, given_: dict[str, Any], _output: Any) -> None:
        seen.append((given_["joint_attention_kwargs"], given_["encoder_hidden_states"].shape[1]))

    bank = SoftTokens(1, 4, 16)
    with attach(network, bank, [1]):
        handles = [b.register_forward_hook(look, with_kwargs=True) for b in network.transformer_blocks]
        run(network, 5)
        network(**given_arguments(), timestep=torch.tensor(5.0), joint_attention_kwargs={"unknown": 1})
        for handle in handles:
            handle.remove()
    assert seen == [(None, 5), (None, 9), (None, 5), *[({"unknown": 1}, length) for length in (5, 9, 5)]]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_of_the_network_has_a_copy_of_the_bank(network: TinyMMDiT, way: str) -> None:
    plain, bank = run(network, 5), SoftTokens(2, 4, 16)
    with attach(network, bank, [0, 1]):
        expected = run(network, 5)
        if way == "deepcopy":
            twin = copy.deepcopy(network)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(network))
        else:
            file = io.BytesIO()
            torch.save(network, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        with torch.no_grad():
            bank.base.zero_()
        assert torch.equal(run(twin, 5), expected)
        with pytest.raises(InputError, match="has soft tokens already"):
            attach(twin, bank, [0, 1])
        detach(twin)
        assert torch.equal(run(twin, 5), plain)
        assert not torch.equal(run(network, 5), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(network: TinyMMDiT, dtype: torch.dtype) -> None:
    half = copy.deepcopy(network).to(dtype)
    given_ = {name: value.to(dtype) for name, value in given_arguments().items()}
    bank = SoftTokens(2, 4, 16)
    with attach(half, bank, [0, 1]):
        found = run(half, 500.0, **given_)
        found.float().square().mean().backward()
    with attach(network, bank, [0, 1]):
        torch.testing.assert_close(found.double(), run(network, 500.0), rtol=0.1, atol=0.1)
    assert found.dtype == dtype
    assert bank.base.grad.dtype == torch.float32
    assert bank.base.grad.isfinite().all()


# Dynamo asks a tensor that comes out of a hook for its gradient; it hides the warning itself unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_before_attaching_and_detaching(network: TinyMMDiT) -> None:
    twin = copy.deepcopy(network)
    del twin.transformer_blocks[1:]  # one block compiles sooner
    compiled = torch.compile(twin, backend="eager")
    plain = run(compiled, 500.0)
    torch.testing.assert_close(run(twin, 500.0), plain)
    with attach(compiled, SoftTokens(1, 4, 16)) as attachment:
        assert attachment.network is twin
        found = run(compiled, 500.0)
        torch.testing.assert_close(found, run(twin, 500.0))
    assert not torch.allclose(found, plain)
    torch.testing.assert_close(run(compiled, 500.0), plain)


def test_bad_banks(network: TinyMMDiT) -> None:
    with pytest.raises(InputError, match="bank must be as wide as the text inside TinyMMDiT, 16, got 12"):
        attach(network, SoftTokens(1, 4, 12))
    with pytest.raises(InputError, match=r"bank must have one layer for each of 3 blocks.*or 1 that they share, got 2"):
        attach(network, SoftTokens(2, 4, 16))


@pytest.mark.parametrize("same", [True, False])
def test_bad_second_bank(network: TinyMMDiT, same: bool) -> None:
    bank = SoftTokens(1, 4, 16)
    with attach(network, bank), pytest.raises(InputError, match=r"has soft tokens already.*detach\(\)"):
        attach(network, bank if same else SoftTokens(1, 2, 16), [2])


def test_bad_calls(network: TinyMMDiT) -> None:
    with attach(network, SoftTokens(1, 4, 16), [0]):
        with pytest.raises(InputError, match="timestep must be one time, or one for each of the 2 texts, got 3"):
            network.transformer_blocks[0](
                torch.zeros(2, 4, 16),
                torch.zeros(2, 5, 16),
                torch.zeros(2, 16),
                {"soft_tokens": torch.zeros(3, 1, 4, 16)},
            )
        with pytest.raises(InputError, match="was not called as a whole"):
            network.forward(**given_arguments(), timestep=torch.tensor(5.0))
