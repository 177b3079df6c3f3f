"""The parameter randomisation check: which weights become random, what is compared, and that nothing is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.saliency_networks import GoldenNetwork, images
from tests.saliency_parts import counted, hooks, quiet
from zoo.errors import InputError
from zoo.randomization import RandomizationCheck, randomize
from zoo.saliency import randomization_check, saliency


class FixedConv(nn.Conv2d):
    """A convolution whose initial weights are known."""

    def reset_parameters(self) -> None:
        assert self.bias is not None
        with torch.no_grad():
            for phase, parameter in enumerate((self.weight, self.bias)):
                parameter.copy_(torch.arange(parameter.numel()).add(phase).sin().view_as(parameter))


class FixedLinear(nn.Linear):
    """The same of a linear layer."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for phase, parameter in enumerate((self.weight, self.bias)):
                parameter.copy_(torch.arange(parameter.numel()).add(phase).mul(3).cos().view_as(parameter))


def fixed() -> nn.Sequential:
    network = nn.Sequential(
        FixedConv(2, 4, 3, padding=1), nn.ReLU(), FixedConv(4, 3, 3, padding=1), nn.Flatten(), FixedLinear(108, 5)
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.double().eval()


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_identity_one_module_after_the_other(mode: Any) -> None:
    """By hand and with SciPy; the class stays that of the trained network where the random one prefers another."""
    network, x = fixed(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    classes = network(x).argmax(1)
    found = randomization_check(network, x, layers="1", method="linear", mode=mode)
    assert found.mode == mode
    assert found.modules == ("4", "2", "0")
    assert found.targets is not None
    assert torch.equal(found.targets, classes)
    trained, other = saliency(network, x, classes, layers="1", method="linear"), 0
    now = copy.deepcopy(network)
    for row, name in enumerate(found.modules):
        now = copy.deepcopy(network) if mode == "independent" else now
        module: Any = now.get_submodule(name)
        module.reset_parameters()
        other += int((now(x).argmax(1) != classes).sum())
        maps = saliency(now, x, classes, layers="1", method="linear")
        for image in range(4):
            pair = trained[image].flatten(), maps[image].flatten()
            assert found.rho[row, image].item() == pytest.approx(spearmanr(*pair).statistic, abs=1e-9)
            absolute = spearmanr(*(one.abs() for one in pair)).statistic
            assert found.rho_absolute[row, image].item() == pytest.approx(absolute, abs=1e-9)
    assert other > 0
    torch.testing.assert_close(found.mean, found.rho.mean(1))
    torch.testing.assert_close(found.std_absolute, found.rho_absolute.std(1, correction=0))


def test_identity_of_the_modes() -> None:
    """A module gets the same weights in both modes and for every order; the seed alone decides."""
    network, x = counted(), torch.randn(3, 3, 8, 8)
    calls = {
        mode: randomization_check(network, x, 1, layers="bn", method="linear", mode=mode)  # type: ignore[arg-type]
        for mode in ("cascading", "independent")
    }
    assert calls["cascading"].modules == ("fc", "conv2", "bn", "conv1")
    assert torch.equal(calls["cascading"].rho[0], calls["independent"].rho[0])
    assert not torch.equal(calls["cascading"].rho[1], calls["independent"].rho[1])
    alone = randomization_check(network, x, 1, layers="bn", method="linear", order=["conv2"])
    assert torch.equal(alone.rho[0], calls["independent"].rho[1])
    pair = randomization_check(network, x, 1, layers="bn", method="linear", order=["conv2", "fc"])
    assert torch.equal(pair.rho[1], calls["cascading"].rho[1])
    again = randomization_check(network, x, torch.tensor([1, 1, 1]), layers="bn", method="linear", seed=0)
    assert torch.equal(again.rho, calls["cascading"].rho)
    assert again.targets is not None
    assert calls["cascading"].targets is not None
    assert torch.equal(again.targets, calls["cascading"].targets)
    other = randomization_check(network, x, 1, layers="bn", method="linear", seed=1)
    assert not torch.equal(other.rho, again.rho)


@pytest.mark.parametrize(("inference", "mode"), [(False, "cascading"), (True, "independent")])
def test_nothing_is_touched(inference: bool, mode: Any) -> None:
    network, x = counted(), torch.randn(2, 3, 8, 8)
    network(x).sum().backward()
    parameters = {name: (p, p.detach().clone(), p.grad) for name, p in network.named_parameters()}
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    modes, random = [module.training for module in network.modules()], torch.random.get_rng_state()
    calls = network.calls
    with torch.inference_mode(inference):
        found = randomization_check(network, x.clone(), layers=["conv1", "conv2"], meta_lr=0.1, mode=mode)
    assert found.rho.shape == (4, 2)
    assert found.rho.isfinite().all()
    with pytest.raises(RuntimeError):
        randomization_check(network, x[:, :2], layers="conv1")
    assert network.calls == calls
    assert hooks(network) == 0
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, parameter in network.named_parameters():
        kept, values, gradient = parameters[name]
        assert parameter is kept
        assert torch.equal(parameter, values)
        assert parameter.grad is gradient
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())
    if inference:
        outside = randomization_check(network, x, layers=["conv1", "conv2"], meta_lr=0.1, mode=mode)
        assert torch.equal(found.rho, outside.rho)


class _Trainer:
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        raise AssertionError("a trainer was copied")


def test_networks_in_other_hands() -> None:
    """Attached to a trainer, compiled, in half precision."""
    network, x = counted().eval(), torch.randn(2, 3, 8, 8)
    plain = randomization_check(network, x, layers="conv2")
    network._trainer = _Trainer()  # type: ignore[assignment]
    assert torch.equal(randomization_check(network, x, layers="conv2").rho, plain.rho)
    wrapped = nn.ModuleDict({"model": network})
    wrapped.forward = network.forward
    found = randomization_check(wrapped, x, layers="conv2", order=["fc", "model.bn"])
    assert found.modules == ("fc", "model.bn")
    compiled = torch.compile(network, backend="eager")
    before = compiled(x)
    assert torch.equal(randomization_check(compiled, x, layers="conv2").rho, plain.rho)
    assert torch.equal(compiled(x), before)
    torch.compiler.reset()
    half = randomization_check(network.bfloat16(), x, layers="conv2")
    assert half.rho.isfinite().all()


def test_normgrad_before_average_pooling_does_not_see_the_classifier() -> None:
    """A property of the method: |x_u| |g| is |x_u| times a number, whatever the weights of the classifier are."""
    network = GoldenNetwork(gap=True)
    with pytest.warns(UserWarning, match="the same map for every class") as caught:
        blind = randomization_check(network, images(), layers="relu2", order=["fc"])
    assert len(caught) == 1  # of the trained network alone
    torch.testing.assert_close(blind.rho, torch.ones(1, 2, dtype=torch.float64))
    selective = randomization_check(network, images(), layers="relu2", method="selective", order=["fc"])
    assert (selective.rho < 0.9).all()


def test_default_order_is_that_of_the_pass() -> None:
    """Registered in another order than called; a module that its parent reads without calling it comes with the parent."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.norm = nn.BatchNorm1d(4, affine=False)
            self.embed = nn.Conv2d(2, 4, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).mT
            tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
            tokens = self.norm(tokens.mT).mT
            tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
            logits: Tensor = self.head(tokens[:, 0])
            return logits

    network, x = Tokens(), torch.randn(2, 2, 4, 4)
    found = randomization_check(network, x, layers="embed", method="selective")
    assert found.modules == ("head", "attention.out_proj", "attention", "norm", "embed", "")
    assert found.rho.shape == (6, 2)


# -- what randomising means ------------------------------------------------------------------------------------------


def changed(module: nn.Module, seed: int = 0) -> dict[str, bool]:
    before = copy.deepcopy(module.state_dict())
    randomize(module, seed=seed)
    return {name: not torch.equal(value, before[name]) for name, value in module.state_dict().items()}


def test_randomize_normalisations() -> None:
    """Statistics are learnt as well: a batch norm that keeps them is not random."""
    for make in (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d, lambda n: nn.BatchNorm2d(n, affine=False)):
        module: Any = make(3)
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                nn.init.uniform_(value, 2, 3)
        assert all(new for name, new in changed(module).items() if name != "num_batches_tracked")
        assert module.running_mean.tolist() == [0, 0, 0]
        assert module.running_var.tolist() == [1, 1, 1]
        if module.weight is not None:
            assert module.weight.tolist() == [1, 1, 1]


def test_randomize_other_parameters_keep_their_scale() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 100, 200) * 5 + 2)
            self.scale = nn.Parameter(torch.tensor(4.6))
            self.gamma = nn.Parameter(torch.full((8,), 1e-5))
            self.inner = nn.Linear(3, 3)

        def reset_parameters(self) -> None:
            raise AssertionError("it would reset what is inside as well")

    module = Scales()
    assert [name for name, new in changed(module).items() if new] == ["token"]
    assert module.token.mean().item() == pytest.approx(2, abs=0.2)
    assert module.token.std().item() == pytest.approx(5, abs=0.2)
    before = module.token.detach().clone()
    assert changed(module, seed=1)["token"]
    assert torch.corrcoef(torch.stack([before.flatten(), module.token.detach().flatten()]))[0, 1].abs() < 0.05


def test_randomize_does_not_rely_on_reset_parameters_behind_a_parametrization() -> None:
    """It would write into a product, and the parameters of which it is made would stay."""
    network = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(16, 3)))
    maps = nn.Sequential(nn.Conv2d(1, 1, 1), network)
    found = randomization_check(maps, torch.randn(3, 1, 4, 4), layers="0", method="linear")
    assert "1.1.parametrizations.weight" in found.modules
    assert (found.rho[0] < 0.95).all()
    weights: Any = network[1]
    assert any(changed(weights.parametrizations.weight).values())


def test_modules_of_one_kind_get_different_weights() -> None:
    drawn = []

    class Kept(nn.Linear):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            drawn.append(self.weight.detach().clone())

    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), Kept(4, 4), Kept(4, 4))
    drawn.clear()
    randomization_check(network, torch.randn(1, 1, 2, 2), layers="0", method="linear", order=["2", "3"])
    assert len(drawn) == 2
    assert not torch.allclose(*drawn)


def test_randomize_leaves_the_random_numbers_of_the_caller() -> None:
    random = torch.random.get_rng_state()
    first, second = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    random = torch.random.get_rng_state()
    randomize(first, seed=5)
    randomize(second, seed=5)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(first.weight, second.weight)


# -- the result ------------------------------------------------------------------------------------------------------


def test_constant_maps_are_left_out(tmp_path: Path) -> None:
    """With weights that are all the same the gradient is the same everywhere, and so is its map."""

    class Same(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), Same(32, 3))
    nn.init.normal_(network[2].weight)
    found = randomization_check(network, torch.randn(2, 1, 4, 4), 0, layers="0", method="gradient")
    assert found.rho.isnan().tolist() == [[True, True], [True, True]]
    assert found.table().splitlines()[2] == "| `2` | nan ± nan | nan ± nan | 0 of 2 |"
    found.draw(tmp_path / "nothing.png")


def test_draw(tmp_path: Path) -> None:
    rho = torch.tensor([[0.9, 0.7], [0.1, -0.2], [torch.nan, 0.0]], dtype=torch.float64)
    found = RandomizationCheck("independent", ("fc", "layer4.$x$", "conv1"), rho, rho.abs(), None)
    for name in ("a.png", "folder/b.png"):
        found.draw(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "folder" / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert found.mean.tolist() == pytest.approx([0.8, -0.05, 0.0])
    assert found.std.tolist() == pytest.approx([0.1, 0.15, 0.0])
    assert found.mean_absolute.tolist() == pytest.approx([0.8, 0.15, 0.0])
    assert found.table().splitlines()[4] == "| `conv1` | 0.000 ± 0.000 | 0.000 ± 0.000 | 1 of 2 |"
    with pytest.raises(InputError, match=r"path must end in .png, got .*c.pdf"):
        found.draw(tmp_path / "c.pdf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode must be one of"),
        ({"order": ["fcc"]}, "has no layer 'fcc'. Did you mean fc"),
        ({"order": []}, r"order must name modules, at least one and each once, got \[\]"),
        ({"order": ["fc", "bn", "fc"]}, "order must name modules, at least one and each once"),
        ({"order": ["fc", "conv2:input"]}, "order must name modules, got 'conv2:input'"),
        ({"order": ["fc", "relu"]}, "'relu' in order has no parameters: there is nothing to randomise"),
        ({"layers": "conv3"}, "has no layer 'conv3'"),
        ({"targets": [0, 1, 2]}, "targets must be one for all images or one each, 2, got 3"),
        ({"method": "normgrad", "extract": "bias"}, "method stands for extract and aggregate"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"layers": "conv2"} | options
    with pytest.raises(InputError, match=message):
        randomization_check(counted(), torch.randn(2, 3, 8, 8), **given)


def test_bad_network() -> None:
    with pytest.raises(InputError, match="Sequential has no parameters: there is nothing to randomise"):
        randomization_check(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 1, 2, 2), layers="0")


def test_a_score_of_ones_own() -> None:
    network, x = counted(), torch.randn(2, 3, 8, 8)
    score: Callable[[Any, Any], Tensor] = lambda output, _: output[:, 2]  # noqa: E731
    found = randomization_check(network, x, layers="conv2", score=score)
    assert found.targets is None
    assert torch.equal(found.rho, randomization_check(network, x, 2, layers="conv2").rho)
    assert quiet(network, x, layers="conv2", score=score).shape == (2, 1, 8, 8)
