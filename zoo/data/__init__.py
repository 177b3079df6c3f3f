"""LightningDataModules, all with fixed stratified splits and an order that depends on (seed, epoch) alone."""

from zoo.data.digits import DigitsDataModule
from zoo.data.image_folder import ImageFolderDataModule
from zoo.data.indexed import IndexedDataset
from zoo.data.parquet_images import ParquetImagesDataModule

__all__ = ["DigitsDataModule", "ImageFolderDataModule", "IndexedDataset", "ParquetImagesDataModule"]
