"""Rival input pipelines, each served in a process of its own for input_pipeline.py.

Both are written as their projects' ImageNet examples write them: tf.data with
decode_and_crop_jpeg and a bilinear resize (Flax, TensorFlow; it is not antialiased,
`antialias` asks for that), PyTorch's DataLoader over files with Pillow and
torchvision's transforms. No flip, no normalisation: the result is uint8, as ours is.
"""

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

DISCARDED = 8  # batches before a round, which may have been ready since the last one
Spec = dict[str, Any]
Batches = Iterator[Any]  # of uint8 arrays [batch, size, size, 3]


def tf_data(spec: Spec) -> tuple[Batches, str]:
    """TFRecords of tf.Examples, decoded in a pool of one thread a core."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    threads = len(spec["cores"])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    size, resize = spec["size"], spec["resize"]
    feature = {"image": tf.io.FixedLenFeature([], tf.string)}

    def window(shape: Any) -> Any:
        if spec["crop"] == "train":
            begin, extent, _ = tf.image.sample_distorted_bounding_box(
                shape,
                bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
                min_object_covered=0.1,
                aspect_ratio_range=(3 / 4, 4 / 3),
                area_range=(0.08, 1.0),
                max_attempts=10,
                use_image_if_no_bounding_boxes=True,
            )
            return tf.concat([begin[:2], extent[:2]], 0)
        shorter = tf.cast(tf.minimum(shape[0], shape[1]), tf.float32)
        side = tf.cast(size / resize * shorter, tf.int32)
        top, left = (shape[0] - side + 1) // 2, (shape[1] - side + 1) // 2
        return tf.stack([top, left, side, side])

    def decode(record: Any) -> Any:
        encoded = tf.io.parse_single_example(record, feature)["image"]
        box = window(tf.io.extract_jpeg_shape(encoded))
        image = tf.io.decode_and_crop_jpeg(encoded, box, channels=3)
        image = tf.image.resize(
            image, (size, size), "bilinear", antialias=spec["antialias"]
        )
        return tf.cast(image, tf.uint8)

    path = os.path.join(spec["folder"], "tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for file in spec["files"]:
            with open(file, "rb") as opened:
                content = tf.train.BytesList(value=[opened.read()])
            features = tf.train.Features(
                feature={"image": tf.train.Feature(bytes_list=content)}
            )
            writer.write(tf.train.Example(features=features).SerializeToString())
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.TFRecordDataset(path).repeat()
    data = data.map(decode, num_parallel_calls=threads).batch(spec["batch"])
    return data.with_options(
        options
    ).as_numpy_iterator(), f"tensorflow {tf.__version__}"


def data_loader(spec: Spec) -> tuple[Batches, str]:
    """Files and torchvision's crops with Pillow, in `workers` processes (0: none)."""
    import numpy as np
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    size, resize, files = spec["size"], spec["resize"], spec["files"]
    bilinear = Image.Resampling.BILINEAR

    def train(image: Any) -> Any:
        return image.resize((size, size), bilinear, box=resized_crop(*image.size))

    def test(image: Any) -> Any:
        width, height = image.size
        shorter = min(width, height)
        shape = int(resize * width / shorter), int(resize * height / shorter)
        left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
        image = image.resize(shape, bilinear)
        return image.crop((left, top, left + size, top + size))

    crop = train if spec["crop"] == "train" else test

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, row: int) -> Any:
            with open(files[row % len(files)], "rb") as file:
                image = Image.open(file).convert("RGB")
            return torch.from_numpy(np.array(crop(image)))

    loader = torch.utils.data.DataLoader(
        Files(), batch_size=spec["batch"], num_workers=spec["workers"]
    )
    return iter(loader), f"torch {torch.__version__}"


def resized_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def serve(builders: dict[str, Callable[[Spec], tuple[Batches, str]]]) -> None:
    """Runs rounds for the process that writes to standard input.

    The first line is the specification of a pipeline, each other one the seconds of
    a round. Answers are lines of JSON.
    """
    spec = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, spec["cores"])
    try:
        batches, version = builders[spec["builder"]](spec)
        next(batches)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run_round(batches, float(line))), flush=True)


def run_round(batches: Batches, seconds: float) -> dict[str, float]:
    """Counts the images of a round, its seconds and its processes' CPU seconds."""
    for _ in range(DISCARDED):
        next(batches)
    images, cpu, start = 0, cpu_seconds(), time.perf_counter()
    while (wall := time.perf_counter() - start) < seconds:
        images += len(next(batches))
    return {"images": images, "wall": wall, "cpu": cpu_seconds() - cpu}


def cpu_seconds() -> float:
    """CPU time of this process and of its children that are alive (Linux)."""
    total, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                children = file.read().split()
        except FileNotFoundError:  # the thread has just ended
            continue
        for child in children:
            with open(f"/proc/{child}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


if __name__ == "__main__":
    serve({"tf.data": tf_data, "DataLoader": data_loader})
