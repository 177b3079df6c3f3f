"""The tiny MMDiT: its block is diffusers', its call is that of SD3Transformer2DModel, and padding is no text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import towers
from zoo.architectures.tiny_mmdit import JointBlock, TinyMMDiT, TinyTextToImage, sincos_positions
from zoo.architectures.tiny_text_encoder import TinyTextEncoder
from zoo.errors import InputError

SMALL: dict[str, Any] = {"width": 16, "depth": 3, "heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 6}


def opened(network: nn.Module) -> nn.Module:
    """A network in float64 whose modulations are no longer zero."""
    for name, parameter in network.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.3)
    return network.double()


def inputs(count: int = 3, length: int = 5, size: int = 4, channels: int = 1) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(count, channels, size, size, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(count, length, 8, dtype=torch.float64),
        "pooled_projections": torch.randn(count, 6, dtype=torch.float64),
        "timestep": torch.tensor([3.0, 500.0, 1000.0], dtype=torch.float64)[:count],
    }


# -- the block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_block_is_that_of_diffusers(last: bool) -> None:
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = attention.JointTransformerBlock(16, 2, 8, context_pre_only=last).double()
    ours = JointBlock(16, 2, context_pre_only=last).double()
    put = ours.load_state_dict
    state = theirs.state_dict()

    def stacked(kind: str, *names: str) -> Tensor:
        return torch.cat([state[f"attn.{name}.{kind}"] for name in names])

    renamed: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        renamed |= {
            f"image.modulation.{kind}": state[f"norm1.linear.{kind}"],
            f"image.projections.{kind}": stacked(kind, "to_k", "to_v", "to_q"),
            f"image.out.{kind}": state[f"attn.to_out.0.{kind}"],
            f"image.mlp.0.{kind}": state[f"ff.net.0.proj.{kind}"],
            f"image.mlp.2.{kind}": state[f"ff.net.2.{kind}"],
        }
        modulation = state[f"norm1_context.linear.{kind}"]
        if last:  # theirs has the scale first there
            modulation = torch.cat(modulation.chunk(2)[::-1])
        renamed[f"text.modulation.{kind}"] = modulation
        names = ("add_k_proj", "add_v_proj") if last else ("add_k_proj", "add_v_proj", "add_q_proj")
        renamed[f"text.projections.{kind}"] = stacked(kind, *names)
        if not last:
            renamed |= {
                f"text.out.{kind}": state[f"attn.to_add_out.{kind}"],
                f"text.mlp.0.{kind}": state[f"ff_context.net.0.proj.{kind}"],
                f"text.mlp.2.{kind}": state[f"ff_context.net.2.{kind}"],
            }
    put(renamed)
    image, text = (torch.randn(2, n, 16, dtype=torch.float64) for n in (6, 4))
    given = {"hidden_states": image, "encoder_hidden_states": text, "temb": torch.randn(2, 16, dtype=torch.float64)}
    expected, got = theirs(**given), ours(**given)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-12)
    if last:
        assert got[0] is None
        assert expected[0] is None
    else:
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-12)


def test_blocks_begin_as_the_identity() -> None:
    image, text = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    after = JointBlock(16, 2)(image, text, torch.randn(2, 16))
    assert torch.equal(after[0], text)
    assert torch.equal(after[1], image)


# -- the denoiser --------------------------------------------------------------------------------------------------


def test_time_may_come_in_any_form() -> None:
    model = opened(TinyMMDiT(**SMALL))
    given = inputs()
    given["timestep"] = torch.full((3,), 500.0, dtype=torch.float64)
    expected = model(**given, return_dict=False)[0]
    for time in (torch.tensor(500), torch.tensor([500.0]), torch.full((3,), 500, dtype=torch.int32)):
        assert torch.equal(model(**{**given, "timestep": time})[0], expected)
    assert not torch.equal(model(**{**given, "timestep": torch.tensor(501)})[0], expected)


def test_every_input_matters() -> None:
    model = opened(TinyMMDiT(**SMALL))
    given = inputs()
    expected = model(**given)[0]
    for name, value in given.items():
        assert not torch.equal(model(**{**given, name: value * 0.9})[0], expected), name


def test_text_has_no_order_and_any_length() -> None:
    model = opened(TinyMMDiT(**SMALL))
    given = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, order]}
    torch.testing.assert_close(model(**shuffled)[0], model(**given)[0])
    longer = {**given, "encoder_hidden_states": torch.randn(3, 9, 8, dtype=torch.float64)}
    assert model(**longer)[0].shape == (3, 1, 4, 4)


def test_patches_come_back_where_they_were() -> None:
    """At the start the blocks are the identity, so that a patch sees itself alone."""
    model = TinyMMDiT(**SMALL, in_channels=2).double()
    given = inputs(count=1, channels=2, size=6)
    before = model(**given)[0]
    given["hidden_states"] = given["hidden_states"].clone()
    given["hidden_states"][:, :, 2:4, 4:6] += 1
    changed = (model(**given)[0] != before).squeeze(0).any(0)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(changed, expected)


def test_same_content_differs_by_place() -> None:
    model = opened(TinyMMDiT(**SMALL))
    given = inputs(count=1, size=4)
    given["hidden_states"] = torch.ones_like(given["hidden_states"])
    patches = model(**given)[0].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)[0, 0].flatten(0, 1)
    assert (torch.cdist(patches, patches) + torch.eye(4, dtype=torch.float64) > 1e-6).all()


@pytest.mark.parametrize(("height", "width", "channels", "patch"), [(32, 32, 3, 4), (4, 8, 1, 2)])
def test_images_of_any_size(height: int, width: int, channels: int, patch: int) -> None:
    model = TinyMMDiT(**SMALL, in_channels=channels, patch_size=patch)
    given = {name: value.float() for name, value in inputs(2).items()}
    given["hidden_states"] = torch.randn(2, channels, height, width)
    assert model(**given)[0].shape == (2, channels, height, width)


def test_checkpointing_changes_no_gradient() -> None:
    model = opened(TinyMMDiT(**SMALL))
    given = inputs()
    model(**given)[0].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(**given)[0].square().sum().backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())  # type: ignore[arg-type]
    model.disable_gradient_checkpointing()
    assert not model.gradient_checkpointing


def test_all_parameters_learn_once_the_gates_are_open() -> None:
    model = opened(TinyMMDiT(**SMALL))
    model(**inputs())[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_half_precision_is_close() -> None:
    model = opened(TinyMMDiT(**SMALL))
    given = inputs()
    expected = model(**given)[0]
    half = {name: value.bfloat16() if name != "timestep" else value for name, value in given.items()}
    got = model.bfloat16()(**half)[0]
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).abs().max() < 0.1 * expected.abs().max()


def test_blocks_are_called_with_keywords_and_one_dict() -> None:
    model = TinyMMDiT(**SMALL)
    seen: list[Any] = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    told = {"note": 1}
    model(**{name: value.float() for name, value in inputs().items()}, joint_attention_kwargs=told)
    names = {"hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"}
    assert len(seen) == 3
    assert all(not args and kwargs.keys() == names for args, kwargs in seen)
    assert all(kwargs["joint_attention_kwargs"] is told for _, kwargs in seen)


def test_refusals() -> None:
    model = TinyMMDiT(**SMALL)
    given = {name: value.float() for name, value in inputs().items()}
    with pytest.raises(InputError, match="return_dict=False"):
        model(**given, return_dict=True)
    with pytest.raises(InputError, match="multiples of patch_size 2, got 5 x 4"):
        model(**{**given, "hidden_states": torch.zeros(3, 1, 5, 4)})
    with pytest.raises(InputError, match="multiple of 4 and of heads, got 18 and 2"):
        TinyMMDiT(**{**SMALL, "width": 18})
    with pytest.raises(InputError, match="depth must be positive, got 0"):
        TinyMMDiT(**{**SMALL, "depth": 0})


def test_positions() -> None:
    table = sincos_positions(3, 4, 8)
    assert table.shape == (12, 8)
    torch.testing.assert_close(table.square().sum(1), torch.full((12,), 4.0))  # sin^2 + cos^2, four times
    assert (torch.cdist(table, table) + torch.eye(12) > 0.1).all()
    # Row 2, column 1; the second rate is 10000 ** -1/2.
    row, column = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    torch.testing.assert_close(table[9], torch.cat([row.sin(), row.cos(), column.sin(), column.cos()]))


# -- the text and the backbone -------------------------------------------------------------------------------------


def test_padding_is_no_text() -> None:
    encoder = TinyTextEncoder(vocab_size=20, context_length=8, width=12)
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0, 0]])
    embedded, pooled = encoder(long)
    torch.testing.assert_close(pooled, encoder(short)[1])
    assert torch.equal(embedded[:, :3], encoder(short)[0])
    assert not embedded[:, 3:].any()
    embedded.sum().backward()
    assert not encoder.tokens.weight.grad[0].any()  # type: ignore[index]
    assert not torch.equal(encoder(torch.tensor([[6, 5, 7]]))[0], embedded)


def test_no_text_is_the_null_condition() -> None:
    backbone = TinyTextToImage(vocab_size=20, width=16, depth=1, heads=2)
    null, empty = backbone.null_condition(2), backbone.condition(torch.zeros(2, 3, dtype=torch.int64))
    assert null.keys() == empty.keys()
    assert all(torch.equal(null[name], empty[name]) for name in null)
    assert not null["encoder_hidden_states"].any()


def test_any_number_of_fillings() -> None:
    backbone = TinyTextToImage(vocab_size=20, width=16, depth=1, heads=2, context_length=4)
    told = [backbone.condition(torch.tensor([[3, 4, *[0] * fill]])) for fill in (0, 1, 9)]
    for name, value in told[0].items():
        assert torch.equal(told[1][name], value)
        assert torch.equal(told[2][name], value)


def test_texts_are_read_by_the_tokenizer() -> None:
    backbone = TinyTextToImage(width=16, depth=1, heads=2, text_width=8, context_length=6)
    tokens = torch.tensor([[49406, 518, 27472, 2097, 49407]])  # of "the digit three", CLIP's numbers
    told, expected = backbone.condition(["the digit three"]), backbone.condition(tokens)
    assert all(torch.equal(told[name], expected[name]) for name in expected)
    assert told["encoder_hidden_states"].shape == (1, 6, 8)


def test_backbone_is_its_parts() -> None:
    backbone = TinyTextToImage(vocab_size=20, width=16, depth=2, heads=2)
    images, times, text = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 700.0]), torch.tensor([[3, 4], [5, 0]])
    assert backbone.latents(images) is images
    assert backbone.images(images) is images
    velocity = backbone.process.predict(backbone.denoiser, images, times, backbone.condition(text))
    assert torch.equal(backbone(images, times, text), velocity)
    named = towers.create("zoo/tiny_text_to_image", sample_size=32, channels=3, patch_size=4, vocab_size=9).network
    assert named.latent_shape == (3, 32, 32)


def test_backbone_refusals() -> None:
    backbone = TinyTextToImage(vocab_size=20, width=16, depth=1, heads=2, context_length=4)
    with pytest.raises(InputError, match=r"images must be \(B, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        backbone.latents(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="more tokens than context_length 4"):
        backbone.condition(torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="token numbers"):
        backbone.condition(torch.ones(1, 3))
    with pytest.raises(InputError, match="patch_size must divide sample_size, got 3 and 8"):
        TinyTextToImage(patch_size=3)
