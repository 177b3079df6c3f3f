"""LightningDataModules, all with fixed splits and an order that depends on (seed, epoch) alone."""

from zoo.data.digits import DigitsDataModule
from zoo.data.digits_captions import DigitsCaptionsDataModule
from zoo.data.digits_modalities import DigitsModalitiesDataModule
from zoo.data.feature_pairs import FeaturePairsDataModule
from zoo.data.image_folder import ImageFolderDataModule
from zoo.data.image_text import ImageTextDataModule
from zoo.data.indexed import IndexedDataset
from zoo.data.interactions import MultimodalInteractionsDataModule
from zoo.data.latent_captions import LatentCaptionsDataModule
from zoo.data.parquet_images import ParquetImagesDataModule
from zoo.data.synthetic_interactions import synthetic_interactions
from zoo.data.synthetic_interactions_module import SyntheticInteractionsDataModule

__all__ = [
    "DigitsCaptionsDataModule",
    "DigitsDataModule",
    "DigitsModalitiesDataModule",
    "FeaturePairsDataModule",
    "ImageFolderDataModule",
    "ImageTextDataModule",
    "IndexedDataset",
    "LatentCaptionsDataModule",
    "MultimodalInteractionsDataModule",
    "ParquetImagesDataModule",
    "SyntheticInteractionsDataModule",
    "synthetic_interactions",
]
