"""ImageNet-Subset, B50: the first 100 classes of ImageNet, 50 in the base step.

    python -m bsce_jax.main --config configs/imagenet_subset.py:prior=balanced,steps=5

Arguments: method (a file of configs/methods/), prior, steps (5, 10, 25), memory
(exemplars a class; 0 = none), seed, and for prior=weighted alpha, for prior=relaxed
epsilon (images; else the paper's 0.2 %, 2.6). Hyper-parameters are those of the
methods' authors (configs/methods/). Images are decoded as they are needed, by all cores
of the host. Expected average incremental accuracy (Jodelet et al., Tables 1 and 3):

    method        steps  none   balanced  meta    memory=0: none  balanced  relaxed
    il_baseline   5      51.52  72.57     72.88
                  10     42.22  68.25     69.26
                  25     30.96  61.49     60.70
    lucir         5      70.25  71.18             60.70           58.63     66.27
                  10     67.84  70.66             47.97           57.71     65.12
                  25     63.23  65.10
    podnet        5      74.97  76.08             66.61           63.94     72.56
                  10     71.57  74.93             55.14           61.98     70.99
                  25     62.67  69.46

The data set is all of ImageNet, as for configs/imagenet.py, prepared once from the
folders train and val of ILSVRC 2012 with one folder a class in each:

    python -m bsce_jax.data.prepare image_folder --name imagenet2012 \\
        --train ILSVRC/train --test ILSVRC/val
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

ARGUMENTS = COMMON_ARGUMENTS


def get_config(argument: str | None = None) -> ConfigDict:
    """The paper's ImageNet-Subset setting."""
    config = default_config()
    large_images(config, NORMALIZATION["imagenet"])
    config.data.name, config.data.test_split = "imagenet2012", "validation"
    config.data.nominal_per_class = 1300
    config.scenario.subset = "first100"
    config.scenario.base_classes = 50
    apply_arguments(config, argument, ARGUMENTS)
    method_module(__file__, config.method).configure(config, "imagenet_subset")
    return config
