"""LightningDataModules, all with fixed splits and an order that depends on (seed, epoch) alone."""

from zoo.data.digits import DigitsDataModule
from zoo.data.digits_captions import DigitsCaptionsDataModule
from zoo.data.feature_pairs import FeaturePairsDataModule
from zoo.data.image_folder import ImageFolderDataModule
from zoo.data.image_text import ImageTextDataModule
from zoo.data.indexed import IndexedDataset
from zoo.data.parquet_images import ParquetImagesDataModule

__all__ = [
    "DigitsCaptionsDataModule",
    "DigitsDataModule",
    "FeaturePairsDataModule",
    "ImageFolderDataModule",
    "ImageTextDataModule",
    "IndexedDataset",
    "ParquetImagesDataModule",
]
