"""Small data sets on disk, for tests."""

import io
import pathlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bsce_jax.data.builders import arrays

Split = tuple[Sequence[np.ndarray | bytes], Sequence[int]]


def write(
    data_dir: str | pathlib.Path,
    name: str,
    splits: Mapping[str, Split],
    *,
    names: Sequence[str] | None = None,
    version: str = "1.0.0",
) -> pathlib.Path:
    """Writes images with labels as a tfds data set (array_record).

    Args:
      data_dir: becomes a tfds data directory.
      name: of the data set, in snake case.
      splits: split -> (images, labels); images are uint8 [H, W, Ch] and may differ in
        size, or bytes, written as they are.
      names: of the classes; by default the number of classes is the largest label + 1.
      version: of the data set.

    Returns:
      the folder of the data set's version.
    """
    largest = max(max(labels) for _, labels in splits.values())
    first = next(iter(splits.values()))[0][0]
    channels = 3 if isinstance(first, bytes) else first.shape[-1]
    classes: dict[str, Any] = (
        {"names": list(names)} if names else {"num_classes": largest + 1}
    )
    folder, number = name, tfds.core.Version(version)

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = folder
        VERSION = number

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, channels)),
                "label": tfds.features.ClassLabel(**classes),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[Any]:
            images, labels = splits[split]
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                encoded = isinstance(image, bytes)
                file = io.BytesIO(image) if encoded else arrays.png(image)
                example = {"id": f"{split}_{i:05d}", "image": file, "label": int(label)}
                yield i, example

    return arrays.prepare(name, version, pathlib.Path(data_dir), Small)


def cifar100_names() -> tuple[list[str], list[str]]:
    """Stand-ins for the 20 coarse and 100 fine class names."""
    return [f"coarse_{i}" for i in range(20)], [f"fine_{i}" for i in range(100)]


def cifar100_files(count: int, seed: int = 0) -> dict[str, bytes]:
    """Contents of an archive in CIFAR-100's binary layout, `count` images a split."""
    rng = np.random.default_rng(seed)
    files = {}
    for split in ("train", "test"):
        records = rng.integers(0, 256, (count, 2 + 3 * 32 * 32), np.uint8)
        records[:, 0], records[:, 1] = rng.permutation(count) % 20, np.arange(count)
        files[f"{split}.bin"] = records.tobytes()
    coarse, fine = cifar100_names()
    files["coarse_label_names.txt"] = ("\n".join(coarse) + "\n").encode()
    files["fine_label_names.txt"] = ("\n".join(fine) + "\n\n").encode()
    return files


def write_archive(
    path: pathlib.Path, files: Mapping[str, bytes], folder: str = "cifar-100-binary/"
) -> pathlib.Path:
    """Packs files as a .tar.gz."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
