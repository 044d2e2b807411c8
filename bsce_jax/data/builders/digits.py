"""The 1,797 8x8 images of hand-written digits that scikit-learn ships, for tfds."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bsce_jax.data.builders import arrays

TEST_EVERY = 5  # every fifth image of a class is a test image


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits: 1 channel, classes "0" to "9", splits train and test.

    The source has 17 gray levels, 0 to 16; here level v is stored as
    round(255 v / 16), which loses nothing. Images number 4, 9, 14, ... of each class,
    in scikit-learn's order, are the test split. `id` holds the split and the number
    in it.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(i) for i in range(10)]),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Optical recognition of handwritten digits, test part.",
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation="E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        images, labels = load()
        test = test_rows(labels)
        rows = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
        return {
            split: self._generate_examples(split, images[i], labels[i])
            for split, i in rows.items()
        }

    def _generate_examples(
        self, split: str, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        return arrays.examples(split, images, {"label": labels})


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's images uint8 [1797, 8, 8, 1] and labels int [1797]."""
    from sklearn.datasets import load_digits  # slow to import, needed only here

    bunch = load_digits()
    images = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    return images[..., None], bunch.target


def test_rows(labels: np.ndarray) -> np.ndarray:
    """Marks every fifth image of each class: [N] bool."""
    test = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        test[np.flatnonzero(labels == c)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return test


def prepare(root: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the prepared data set under root; writes it at need."""
    return arrays.prepare("digits", str(Digits.VERSION), root, Digits)
