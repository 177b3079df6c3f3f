"""Every loss under torch.compile with its default backend: value and gradient, which a compiler may get wrong in silence."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_interaction_graph import graph
from zoo import losses
from zoo.interaction_graph import propagate_interactions

ROWS, WIDTH = 11, 8
G = torch.Generator().manual_seed(0)
OTHER = torch.randn(ROWS, WIDTH, generator=G, dtype=torch.float64)
CENTRES = torch.randn(5, WIDTH, generator=G, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1, 0, 4, 4, 0, 1, 3, 3])
MAPS = torch.randn(ROWS, 2, 4, 4, generator=G, dtype=torch.float64)
SCALED: dict[str, Any] = {"scale": 10.0, "chunk_size": 4}

# What has no gradient of its own.
CONSTANT = {"calibration_statistics", "cwcl_statistics", "equal_captions", "nd_statistics", "softrepa_gradient"}
CONSTANT |= {"structure_statistics"}
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "alignment_loss": lambda x: losses.alignment_loss(x, OTHER),
    "calibrated_uniformity_loss": lambda x: losses.calibrated_uniformity_loss(x, OTHER, chunk_size=4),
    "calibration_consistency": lambda x: losses.calibration_consistency(x, OTHER, CENTRES, scale=5.0),
    "centre_cross_entropy": lambda x: losses.centre_cross_entropy(x, CENTRES, LABELS, scale=5.0),
    "centre_divergence": lambda x: losses.centre_divergence(x, OTHER, CENTRES, scale=5.0),
    "clean_adversarial_info_nce": lambda x: losses.clean_adversarial_info_nce(x, OTHER, symmetric=True, chunk_size=4),
    "clean_adversarial_l2": lambda x: losses.clean_adversarial_l2(x, OTHER),
    "clip_loss": lambda x: losses.clip_loss(x, OTHER, **SCALED),
    "cwcl_loss": lambda x: losses.cwcl_loss(x, OTHER, kernel="exp", **SCALED),
    "dist_loss": lambda x: losses.dist_loss(x, OTHER),
    "dkd_loss": lambda x: losses.dkd_loss(x, OTHER, LABELS),
    "info_nce": lambda x: losses.info_nce(x, OTHER, **SCALED),
    "kd_loss": lambda x: losses.kd_loss(x, OTHER),
    "nd_loss": lambda x: losses.nd_loss(x, OTHER, CENTRES, LABELS),
    "pooled_similarities": lambda x: losses.pooled_similarities(x, CENTRES).square().sum(),
    "review_kd_loss": lambda x: losses.review_kd_loss([x.view(ROWS, 2, 2, 2)], [MAPS[..., :2, :2]], pool_sizes=(1,)),
    "siglip_loss": lambda x: losses.siglip_loss(x, OTHER, bias=-3.0, **SCALED),
    "slerp": lambda x: (losses.slerp(x, OTHER, 0.3) * MAPS.view(-1)[: x.numel()].view_as(x)).sum(),
    "softrepa_loss": lambda x: losses.softrepa_loss(x.square() @ OTHER.square().t(), diagonal_weight=0.1),
    "spherical_bezier": lambda x: (losses.spherical_bezier([x, OTHER, OTHER.flip(0)], 0.3) * OTHER.flip(1)).sum(),
    "structure_loss": lambda x: losses.structure_loss(OTHER, x, levels=2, chunk_size=4),
    "uniformity_loss": lambda x: losses.uniformity_loss(x, chunk_size=4),
}
KERNELS = {f"cwcl_loss {kernel}": kernel for kernel in ("affine", "power", "topk")}
CASES |= {
    name: lambda x, kernel=kernel: losses.cwcl_loss(x, OTHER, kernel=kernel, weighted_direction="both", **SCALED)  # type: ignore[misc]
    for name, kernel in KERNELS.items()
}
CASES["propagate_interactions"] = lambda x: (propagate_interactions(graph(), x, hops=2) * OTHER.flip(0)).sum()


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch, about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler of C++")
@pytest.mark.parametrize("name", CASES)
def test_compiled_value_and_gradient(name: str) -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    torch.compiler.reset()
    found, expected = (function(x) for function in (torch.compile(CASES[name]), CASES[name]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(value, x)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert gradients[1].abs().max() > 1e-3


def test_the_affine_kernel_needs_no_tiles_when_compiled() -> None:
    graphs: list[str] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(str(module.graph))
        return module

    for kernel in ("affine", "exp"):
        torch.compiler.reset()
        torch.compile(losses.cwcl_loss, backend=look)(OTHER, OTHER, kernel=kernel, **SCALED)
    assert ["kernel_means" in one for one in graphs] == [False, True]


def test_every_loss_is_there() -> None:
    assert {name.partition(" ")[0] for name in CASES} - {"propagate_interactions"} == set(losses.__all__) - CONSTANT


def test_arguments_of_our_operators_do_not_collide_with_inductor() -> None:
    """Up to torch 2.11 Inductor passes an operator's keywords on beside arguments of its own."""
    from torch._inductor.ir import FallbackKernel

    own = inspect.signature(FallbackKernel.create).parameters
    taken = {name for name, one in own.items() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD} | {"kernel"}
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("zoo::")]
    assert schemas
    for schema in schemas:
        assert not taken & {argument.name for argument in schema.arguments}, schema
