"""NormGrad in closed form against the outer products that the released scripts make, on ResNet-50.

    python benchmarks/saliency.py [--device cuda] [--threads 1] [--batch 8] [--rounds 3]

Images of 224 x 224 pixels, layers ``layer1`` … ``layer4``, random weights. The baseline is written from the description of
the released scripts (arXiv 2004.02866): one image at a time, forward and backward of the whole network with trainable
weights, and for each layer the outer product of gradient and activation at every place, of which the norm is taken. Its
times are those of an image; ours are those of a batch, divided by its size. Against one training step, both take the same
batch. Captum and pytorch-grad-cam are compared where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from nd import peak_bytes, seconds
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.combined_maps import combine_maps, normalize_map
from zoo.contributions import contribution_map
from zoo.layer_taps import LayerTaps, find_layers
from zoo.saliency import saliency
from zoo.score_passes import ScorePasses

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
SIDE = 224
MAPS_TARGET, END_TO_END_TARGET, MEMORY_TARGET, STEP_TARGET = 500, 10, 100, 1.0


def outer_product_map(activation: Tensor, gradient: Tensor) -> Tensor:
    """Norm of all K x K products at each place of one image: (1, 1, H, W)."""
    contributions = gradient.flatten(1).unsqueeze(1) * activation.flatten(1).unsqueeze(0)  # (K, K, H W)
    # Four times as fast as torch.linalg.vector_norm over these dimensions, on a CPU.
    return contributions.square_().sum((0, 1)).sqrt().view(1, 1, *activation.shape[1:])


def one_image(network: nn.Module, image: Tensor, target: int) -> Tensor:
    kept: dict[str, Tensor] = {}
    handles = []
    for name in LAYERS:

        def keep(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            kept[name] = output

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    network(image.unsqueeze(0))[0, target].backward()
    for handle in handles:
        handle.remove()
    network.zero_grad()
    combined = torch.ones((), device=image.device)
    for output in kept.values():
        assert output.grad is not None
        one = outer_product_map(output.detach()[0], output.grad[0])
        one = F.interpolate(one, (SIDE, SIDE), mode="bilinear")
        combined = combined * (one - one.min()) / (one.max() - one.min())
    return combined


def medians(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, timed in turn after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in track(range(rounds), description="rounds", transient=True):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def table_of(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def verdict(*, met: bool) -> str:
    return "met" if met else "missed"


def compare_outer_products(network: nn.Module, images: Tensor, targets: Tensor, rounds: int, device: str) -> Table:
    passed = ScorePasses(LayerTaps(network, find_layers(network, LAYERS))).run(images, targets)
    captures = passed.captures

    def our_maps() -> list[Tensor]:
        return [contribution_map(*captures[name]) for name in LAYERS]

    def our_first() -> list[Tensor]:
        return [contribution_map(*(part[:1] for part in captures[name])) for name in LAYERS]

    def their_maps() -> list[Tensor]:
        return [outer_product_map(*(part[0] for part in captures[name])) for name in LAYERS]

    def ours() -> Tensor:
        return saliency(network, images, targets, layers=LAYERS, combine="product")

    def theirs() -> Tensor:
        return one_image(network, images[0], int(targets[0]))

    for mine, other in zip(our_first(), their_maps(), strict=True):
        # The baseline adds up to 4 million squares a place, in float32.
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=0)
    torch.testing.assert_close(ours()[:1], theirs(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        ours(), combine_maps(our_maps(), mode="product", size=(SIDE, SIDE)), rtol=1e-2, atol=1e-3
    )
    names = {"our maps": our_maps, "their maps": their_maps, "ours": ours, "theirs": theirs}
    found = medians(names, rounds, device)
    table = table_of(
        "the maps of four layers, an image",
        ("", "outer products ms", "ours ms", "ratio", "target", "", "MiB", "ours MiB"),
    )
    rows = (
        ("maps alone", "their maps", "our maps", MAPS_TARGET, their_maps, our_first),
        ("with the passes of the network", "theirs", "ours", END_TO_END_TARGET, None, None),
    )
    for label, slow, fast, target, large, small in rows:
        their_time, our_time = found[slow], found[fast] / len(images)
        peaks = ["", ""] if large is None or small is None else [peak_bytes(f, device) / 2**20 for f in (large, small)]
        shown = [f"{peak:.1f}" if isinstance(peak, float) else "" for peak in peaks]
        ratio = their_time / our_time
        table.add_row(
            label, f"{1e3 * their_time:.0f}", f"{1e3 * our_time:.2f}", f"{ratio:.0f}x", f"{target}x",
            verdict(met=ratio >= target), *shown,
        )  # fmt: skip
        if isinstance(peaks[0], float) and isinstance(peaks[1], float):
            less = peaks[0] / peaks[1]
            met = verdict(met=less >= MEMORY_TARGET)
            table.add_row("memory of the maps alone", "", "", f"1/{less:.0f}", f"1/{MEMORY_TARGET}", met, "", "")
    return table


def compare_training_step(network: nn.Module, images: Tensor, targets: Tensor, rounds: int, device: str) -> Table:
    def step() -> None:
        network.train()
        F.cross_entropy(network(images), targets).backward()
        network.zero_grad()
        network.eval()

    def ours() -> Tensor:
        return saliency(network, images, targets, layers=LAYERS)

    found = medians({"step": step, "ours": ours}, rounds, device)
    ratio = found["ours"] / found["step"]
    table = table_of(f"four layers, a batch of {len(images)}", ("", "ms", "ratio", "target", ""))
    table.add_row("forward and backward in training", f"{1e3 * found['step']:.0f}", "1", "", "")
    met = verdict(met=ratio <= STEP_TARGET)
    table.add_row("saliency", f"{1e3 * found['ours']:.0f}", f"{ratio:.2f}", f"{STEP_TARGET}", met)
    return table


def others(network: Any, images: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    """Grad-CAM of other libraries, resized to the images as ours is."""
    found: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("captum"):
        from captum.attr import LayerGradCam

        cam = LayerGradCam(network, network.layer4)

        def captum() -> Tensor:
            one = cam.attribute(images, target=targets, relu_attributions=True)
            return F.interpolate(one, (SIDE, SIDE), mode="bilinear")

        found["captum"] = captum
    if importlib.util.find_spec("pytorch_grad_cam"):
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        grad_cam = GradCAM(network, [network.layer4])
        outputs = [ClassifierOutputTarget(int(target)) for target in targets]
        found["pytorch-grad-cam"] = lambda: grad_cam(images, outputs)
    return found


def require_agreement(functions: dict[str, Callable[[], object]]) -> None:
    """Refuse to time functions that do not give the same maps."""
    ours = normalize_map(torch.as_tensor(functions["ours"]()))
    for function in functions.values():
        theirs = torch.as_tensor(function(), device=ours.device).detach().view_as(ours)
        # One library resizes by OpenCV, after stretching; at rounding's distance from zero a map may be anything.
        torch.testing.assert_close(normalize_map(theirs), ours, rtol=0, atol=0.05)


def compare_libraries(network: nn.Module, images: Tensor, targets: Tensor, rounds: int, device: str) -> Table:
    table = table_of(f"Grad-CAM of layer4, a batch of {len(images)}", ("", "ms", "ours takes", "target", ""))
    functions = others(network, images, targets)
    functions["ours"] = lambda: saliency(network, images, targets, layers="layer4", method="gradcam")
    require_agreement(functions)
    found = medians(functions, rounds, device)
    for name, time in found.items():
        if name == "ours":
            table.add_row(name, f"{1e3 * time:.0f}", "1", "", "")
        else:
            ratio = found["ours"] / time
            table.add_row(name, f"{1e3 * time:.0f}", f"{ratio:.2f} of it", "1", verdict(met=ratio <= 1))
    for name in {"captum", "pytorch-grad-cam"} - found.keys():
        table.add_row(name, "not installed", "", "", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="saliency against outer products, a training step and other libraries")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--batch", type=int, default=8, help="images at a time, for us")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the medians are taken")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*the same map for every class")  # layer4 is in front of the pooling
    network = torchvision.models.resnet50().eval().to(options.device)
    images = torch.randn(options.batch, 3, SIDE, SIDE, device=options.device)
    targets = torch.randint(1000, (options.batch,), device=options.device)
    console = Console(width=140)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(f"PyTorch {torch.__version__}, {name}, medians of {options.rounds} rounds")
    for compare in (compare_outer_products, compare_training_step, compare_libraries):
        console.print(compare(network, images, targets, options.rounds, options.device))


if __name__ == "__main__":
    main()
