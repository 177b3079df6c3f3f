"""The zoo: papers as PyTorch Lightning components with Hugging Face Hub integration.

``import zoo`` imports neither torch nor lightning: each public name is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Adding a paper adds its line here and edits no other shared file.
_LAZY = {
    "AdversarialCalibration": "zoo.lightning_modules.advcal",
    "AuxiliaryLoss": "zoo.callbacks.auxiliary_loss",
    "CLIP": "zoo.lightning_modules.clip",
    "CM3": "zoo.lightning_modules.cm3",
    "CWCL": "zoo.lightning_modules.cwcl",
    "Classifier": "zoo.lightning_modules.classifier",
    "DigitsCaptionsDataModule": "zoo.data.digits_captions",
    "DigitsDataModule": "zoo.data.digits",
    "DigitsModalitiesDataModule": "zoo.data.digits_modalities",
    "FeaturePairsDataModule": "zoo.data.feature_pairs",
    "FlowMatching": "zoo.lightning_modules.flow_matching",
    "ImageFolderDataModule": "zoo.data.image_folder",
    "ImageTextDataModule": "zoo.data.image_text",
    "InputError": "zoo.errors",
    "LatentCaptionsDataModule": "zoo.data.latent_captions",
    "MultimodalInteractionsDataModule": "zoo.data.interactions",
    "NDDistillation": "zoo.lightning_modules.nd",
    "NDRegularizer": "zoo.callbacks.nd_regularizer",
    "ParquetImagesDataModule": "zoo.data.parquet_images",
    "NormGradSaliency": "zoo.callbacks.normgrad_saliency",
    "PushToHub": "zoo.callbacks.push_to_hub",
    "RecommenderBaseline": "zoo.lightning_modules.cm3_baselines",
    "RobustnessEvaluation": "zoo.callbacks.robustness_evaluation",
    "SoftREPA": "zoo.lightning_modules.softrepa",
    "StructureAlignment": "zoo.lightning_modules.structure",
    "StructureRegularizer": "zoo.callbacks.structure_regularizer",
    "SyntheticInteractionsDataModule": "zoo.data.synthetic_interactions_module",
    "TeacherCache": "zoo.teacher_cache",
    "ZooModule": "zoo.module",
    "from_pretrained": "zoo.hub",
    "load_weights": "zoo.hub",
    "register": "zoo.registry",
}
# Public bases of components, which are none themselves.
_BASES = frozenset({"AuxiliaryLoss"})
_SUBMODULES = (
    "architectures",
    "callbacks",
    "data",
    "hub",
    "lightning_modules",
    "losses",
    "metrics",
    "registry",
    "saliency",
    "towers",
)

__all__ = [  # noqa: PLE0604 - computed: the lazy table is the one list of public names
    "__version__",
    *sorted(_LAZY),
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"zoo.{name}")
    else:
        from zoo.errors import nearest

        raise AttributeError(f"module 'zoo' has no attribute {name!r}.{nearest(name, [*_LAZY, *_SUBMODULES])}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})


def _names_in(package: str) -> dict[str, str]:
    """Return the part of the lazy table whose modules lie in ``package``."""
    return {name: module for name, module in _LAZY.items() if module.startswith(f"{package}.")}
