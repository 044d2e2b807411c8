"""ImageNet, B500: a base step of 500 classes, then 5 or 10 incremental steps.

    python -m bsce_jax.main --config configs/imagenet.py:prior=balanced,steps=5

Arguments: method (a file of configs/methods/), prior, steps (5, 10), memory (exemplars
a class; 0 = none), base_classes, seed, and for prior=weighted alpha, for prior=relaxed
epsilon (images; else the paper's 0.2 %, 2.6). Hyper-parameters are those of the
methods' authors (configs/methods/). Images are decoded as they are needed, by all cores
of the host. Expected average incremental accuracy (Jodelet et al., Tables 1 and 3):

    method        steps  none   balanced  meta    memory=0: none  balanced  relaxed
    il_baseline   5      43.23  66.45     66.15
                  10     36.70  62.14     61.59
    lucir         5      66.69  67.81             51.19           63.29     67.07
                  10     64.06  66.47             39.72           62.90     65.07
    podnet        5      65.20  69.67             47.65           55.00     68.50
                  10     62.87  68.65             37.22           54.62     67.38

base_classes=0,steps=10 is Table 2: 10 groups of 100 classes and a fixed memory of
20,000 exemplars in all, whatever `memory` is above 0. Expected average top-1 / top-5:

    il_baseline   none 46.65 / 68.74   balanced 64.15 / 85.65   meta 63.57 / 85.43
    lucir         none 60.40 / 82.31   balanced 60.75 / 84.31
    podnet        none 62.58 / 83.50   balanced 64.08 / 85.71

The data set is prepared once from the folders train and val of ILSVRC 2012 with one
folder a class in each, named by its WordNet id:

    python -m bsce_jax.data.prepare image_folder --name imagenet2012 \\
        --train ILSVRC/train --test ILSVRC/val

One that tfds has prepared as array_record serves as well, with an index of its labels:

    python -m bsce_jax.data.prepare index imagenet2012
"""

from ml_collections import ConfigDict

from bsce_jax.config import (
    COMMON_ARGUMENTS,
    apply_arguments,
    default_config,
    large_images,
    method_module,
)
from bsce_jax.data.augment import NORMALIZATION

ARGUMENTS = COMMON_ARGUMENTS | {"base_classes": 500}


def get_config(argument: str | None = None) -> ConfigDict:
    """The paper's ImageNet settings."""
    config = default_config()
    large_images(config, NORMALIZATION["imagenet"])
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.nominal_per_class = 1300
    apply_arguments(config, argument, ARGUMENTS)
    if config.scenario.base_classes == 0 and config.memory.kind != "none":
        config.memory.kind, config.memory.budget = "fixed", 20_000
    method_module(__file__, config.method).configure(config, "imagenet")
    return config
