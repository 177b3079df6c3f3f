"""SoftREPA: what the modes of the pair engine keep and take, soft tokens at inference, and the latent cache on disk.

    python benchmarks/softrepa.py [--device cuda] [--threads 1] [--rounds 3] [--parts modes inference cache]

Two networks with random weights: our tiny MM-DiT on 28 x 28 pixels, and an SD3Transformer2DModel of diffusers of middle
size. Saved activations are the bytes that autograd keeps at most at a time, each memory once and without the frozen
weights. Times are taken in turn in one process; on a CPU they are seconds of the processor, which other processes disturb
less than those of the clock. The official cache is written from its description in the project's notes on arXiv
2503.08250: a file an image, by `torch.save` of slices of a batch of 16, which writes what the whole batch holds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from saliency import table_of, verdict
from structure import seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.architectures.tiny_mmdit import TinyMMDiT
from zoo.denoisers import Flow, denoising_errors
from zoo.error_matrix import contrast
from zoo.latent_cache import cache_latents
from zoo.soft_tokens import SoftTokens, attach, token_places, token_width

SIZES = (4, 8, 16)
MODES: dict[str, dict[str, Any]] = {
    "full": {"pairs": "full"},
    "rows": {"pairs": "rows"},
    "two_pass, 4 pairs": {"pairs": "two_pass", "micro_batch": 4},
}
MEMORY_TARGET, TIME_TARGET, INFERENCE_TARGET = 0.4, 1.1, 1.02
SD3_SIDE, SD3_TEXT = 128, 333  # latents of 1024 pixels; 77 tokens of CLIP and 256 of T5
OFFICIAL_BATCH, OFFICIAL_TEXT = 16, 589  # 77 of CLIP and 512 of T5
IMAGES, CAPTIONS = 8, 5
PARTS = ("modes", "inference", "cache")
MIB = 2**20


class Case(NamedTuple):
    """A frozen network with the inputs of a batch."""

    network: nn.Module
    blocks: list[int] | None
    clean: Tensor
    condition: dict[str, Tensor]


def tiny_case(size: int, device: str) -> Case:
    network = TinyMMDiT(in_channels=1, patch_size=4)
    return prepared(network, [0, 1], (size, 1, 28, 28), (16, 64, 64), device)


def middle_case(size: int, device: str, *, layers: int = 6, side: int = 16, text: int = 16) -> Case:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=side, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=256, pooled_projection_dim=64,
        pos_embed_max_size=max(side // 2, 16),
    )  # fmt: skip
    return prepared(network, None, (size, 16, side, side), (text, 128, 64), device)


def prepared(
    network: nn.Module, blocks: list[int] | None, image: tuple[int, ...], text: tuple[int, int, int], device: str
) -> Case:
    """Inputs at random; and weights that begin at zero too, without which no token would matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.requires_grad_(requires_grad=False).parameters():
        if not parameter.any():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    tokens, width, pooled = text
    condition = {
        "encoder_hidden_states": torch.randn(image[0], tokens, width, generator=generator).to(device),
        "pooled_projections": torch.randn(image[0], pooled, generator=generator).to(device),
    }
    return Case(network.eval().to(device), blocks, torch.randn(image, generator=generator).to(device), condition)


def bank_of(case: Case) -> SoftTokens:
    torch.manual_seed(0)
    layers = len(token_places(case.network, case.blocks))
    return SoftTokens(layers, 4, token_width(case.network)).to(case.clean.device)


@contextmanager
def kept_bytes(network: nn.Module) -> Iterator[Counter[str]]:
    """Bytes that autograd keeps, at most at a time: each storage once, without those of the network's parameters."""
    count: Counter[str] = Counter()
    holders: Counter[int] = Counter()
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def forget(place: int, size: int) -> None:
        holders[place] -= 1
        if not holders[place]:
            count["now"] -= size

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if place not in weights:
            holders[place] += 1
            count["now"] += size if holders[place] == 1 else 0
            count["most"] = max(count["most"], count["now"])
            weakref.finalize(kept, forget, place, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield count


def step(case: Case, bank: SoftTokens, options: dict[str, Any]) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradient, and how many pairs went through the network."""
    noise = torch.randn(case.clean[:1].shape, generator=torch.Generator().manual_seed(1)).to(case.clean.device)
    passed = []

    def errors_of(image: Tensor, text: Tensor) -> Tensor:
        passed.append(len(image))
        condition = {name: value[text] for name, value in case.condition.items()}
        return denoising_errors(Flow(), case.network, case.clean[image], noise, 500.0, condition)

    size, parameters = len(case.clean), list(bank.parameters())
    # Weights at random err by about 2: at the paper's temperature nothing would be left to compare.
    loss = contrast(errors_of, rows=size, columns=size, parameters=parameters, temperature=2.0, **options).loss
    return loss.detach(), list(torch.autograd.grad(loss, parameters)), sum(passed)


def in_turn(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each in every round, forwards and backwards by turns."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in track(range(rounds), description="rounds", transient=True):
        order = list(functions)
        for name in order[:: 1 if number % 2 else -1]:
            taken[name].append(seconds(functions[name], device))
    return taken


def ratio(taken: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(one / other for one, other in zip(taken[name], taken[base], strict=True))


def compare_modes(options: argparse.Namespace) -> Iterator[Table]:
    for label, make in {"TinyMMDiT, 49 + 16 tokens": tiny_case, "SD3, 6 x 256, 64 + 16 tokens": middle_case}.items():
        table = table_of(
            f"{label}: forward and backward of N x N pairs",
            ("N, mode", "pairs passed", "saved MiB", "of full", f"target {MEMORY_TARGET}", "ms", "of full",
             f"target {TIME_TARGET}"),
        )  # fmt: skip
        for size in options.sizes:
            case = make(size, options.device)
            bank = bank_of(case)
            with attach(case.network, bank, case.blocks):
                add_modes(table, case, bank, options)
        yield table


def add_modes(table: Table, case: Case, bank: SoftTokens, options: argparse.Namespace) -> None:
    kept, passed, first = {}, {}, None
    for name, mode in MODES.items():
        with kept_bytes(case.network) as count:
            loss, gradient, passed[name] = step(case, bank, mode)
        kept[name] = count["most"]
        first = first or (loss, gradient)
        torch.testing.assert_close(loss, first[0], rtol=1e-4, atol=0)
        for one, wanted in zip(gradient, first[1], strict=True):
            assert wanted.norm() > 0
            assert (one - wanted).norm() < 1e-3 * wanted.norm()
    functions = {name: partial(step, case, bank, mode) for name, mode in MODES.items()}
    taken = in_turn(functions, options.rounds, options.device)
    for name in MODES:
        memory, time = kept[name] / kept["full"], ratio(taken, name, "full")
        judged = name == "rows"
        table.add_row(
            f"{len(case.clean)}, {name}", str(passed[name]), f"{kept[name] / MIB:.1f}", f"{memory:.3f}",
            verdict(met=memory <= MEMORY_TARGET) if judged else "", f"{1e3 * statistics.median(taken[name]):.0f}",
            f"{time:.2f}", verdict(met=time <= TIME_TARGET) if judged else "",
        )  # fmt: skip


@torch.no_grad()
@cache
def sd3_flops() -> dict[str, int]:
    """Multiplications and additions of a pass of Stable Diffusion 3 medium itself, counted without computing them."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=SD3_SIDE, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )  # fmt: skip
        bank = SoftTokens(5, 4, token_width(network))
        inputs = torch.empty(1, 16, SD3_SIDE, SD3_SIDE), torch.empty(1)
        condition = {
            "encoder_hidden_states": torch.empty(1, SD3_TEXT, 4096),
            "pooled_projections": torch.empty(1, 2048),
        }
    counts = {}
    for name in ("plain", "with tokens"):
        with attach(network, bank) if name != "plain" else nullcontext():
            with FlopCounterMode(display=False) as counter:
                Flow().predict(network, *inputs, condition)
            counts[name] = counter.get_total_flops()
    return counts


@torch.no_grad()
def compare_inference(options: argparse.Namespace) -> list[Table]:
    """One pass of a network with tokens in its first 5 blocks, against itself without them."""
    case = middle_case(1, options.device, layers=options.layers, side=SD3_SIDE, text=SD3_TEXT)
    bank = bank_of(case)
    time = torch.tensor(500.0, device=options.device)

    def plain() -> Tensor:
        return Flow().predict(case.network, case.clean, time, case.condition)

    def with_tokens() -> Tensor:
        with attach(case.network, bank):
            return Flow().predict(case.network, case.clean, time, case.condition)

    flops, functions = {}, {"plain": plain, "with tokens": with_tokens}
    for name, function in functions.items():
        with FlopCounterMode(display=False) as counter:
            function()
        flops[name] = counter.get_total_flops()
    taken = in_turn(functions, max(options.rounds, 5), options.device)
    table = table_of(
        f"inference, {SD3_SIDE**2 // 4} + {SD3_TEXT} tokens, {options.layers} blocks of width 256, 4 tokens in the first 5",
        ("", "GFLOP", "of plain", "ms", "of plain", "range", f"target {INFERENCE_TARGET}"),
    )
    for name, count in sd3_flops().items():
        table.add_row(
            f"SD3-medium, {name} (counted)", f"{count / 1e9:.1f}", f"{count / sd3_flops()['plain']:.4f}", "", "", "", ""
        )
    for name in functions:
        found = ratio(taken, name, "plain")
        each = [one / other for one, other in zip(taken[name], taken["plain"], strict=True)]
        table.add_row(
            name, f"{flops[name] / 1e9:.1f}", f"{flops[name] / flops['plain']:.4f}",
            f"{1e3 * statistics.median(taken[name]):.0f}", f"{found:.3f}", f"{min(each):.3f} … {max(each):.3f}",
            verdict(met=found <= INFERENCE_TARGET) if name != "plain" else "",
        )  # fmt: skip
    return [table]


class SD3Encoders(nn.Module):
    """Numbers of the shapes that Stable Diffusion 3 has for an image of 512 pixels and its captions."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.text_blocks = {"encoder_hidden_states": ((77, 2048), (tokens - 77, 4096))}

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(images), 16, 64, 64)
        return torch.randn(shape), torch.rand(shape)

    def condition(self, text: list[str]) -> dict[str, Tensor]:
        embedded = torch.randn(len(text), self.tokens, 4096)
        embedded[:, :77, 2048:] = 0  # CLIP's two encoders, 768 and 1280 wide, filled up to T5's width
        return {"encoder_hidden_states": embedded, "pooled_projections": torch.randn(len(text), 2048)}


def official_bytes(folder: Path) -> float:
    """Bytes of an image's files: slices of a batch in half precision, with one caption and one sample of the latents."""
    encoders = SD3Encoders(OFFICIAL_TEXT)
    texts = encoders.condition(["a caption"] * OFFICIAL_BATCH)
    batch = {name: value.half() for name, value in texts.items()}
    batch["latents"] = encoders.posterior(torch.zeros(OFFICIAL_BATCH, 3, 8, 8))[0].half()
    for name, value in batch.items():
        torch.save(value[0], folder / f"{name}.pt")
    return float(folder_bytes(folder))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def our_bytes(folder: Path, *, tokens: int, captions: int) -> float:
    pairs = [(torch.zeros(3, 8, 8), [f"caption {i} {j}" for j in range(captions)]) for i in range(IMAGES)]
    cache_latents(SD3Encoders(tokens), pairs, folder, progress=False)  # type: ignore[arg-type]
    return folder_bytes(folder) / IMAGES


def compare_cache(_options: argparse.Namespace) -> list[Table]:
    table = table_of("SD3, bytes on disk an image of 512 pixels", ("", "MB", "of official", "COCO train, TB"))
    layouts: dict[str, Callable[[Path], float]] = {
        f"official: 1 caption of {OFFICIAL_TEXT} tokens, slices of {OFFICIAL_BATCH}": official_bytes,
        "ours: 1 caption of 589": partial(our_bytes, tokens=589, captions=1),
        f"ours: {CAPTIONS} captions of 589": partial(our_bytes, tokens=589, captions=CAPTIONS),
        f"ours: {CAPTIONS} captions of {SD3_TEXT} (default)": partial(our_bytes, tokens=SD3_TEXT, captions=CAPTIONS),
        f"ours: {CAPTIONS} captions of 154": partial(our_bytes, tokens=154, captions=CAPTIONS),
    }
    found = {}
    for name, measure in layouts.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(Path(folder))
    for name, size in found.items():
        share = size / next(iter(found.values()))
        table.add_row(name, f"{size / 1e6:.2f}", f"{share:.3f}", f"{118_287 * size / 1e12:.2f}")
    return [table]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="the pair engine of SoftREPA, soft tokens at inference, the latent cache"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the medians are taken")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="images of a batch")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the network at inference")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    console.print(f"PyTorch {torch.__version__}, {name}, medians of {options.rounds} rounds, float32")
    parts = {"modes": compare_modes, "inference": compare_inference, "cache": compare_cache}
    for part in options.parts:
        for table in parts[part](options):
            console.print(table)


if __name__ == "__main__":
    main()
