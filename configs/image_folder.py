"""Your own images: a folder of class folders, prepared once, learned class by class.

    python -m bsce_jax.data.prepare image_folder --name birds --train FOLDER
    python -m bsce_jax.main --config configs/image_folder.py:data=birds,prior=balanced

Arguments: data (name of the prepared data set), base_classes (of the base step; 0 = all
steps alike), steps (incremental ones; or all, where base_classes is 0), method
(a file of configs/methods/), prior, memory (exemplars a class; 0 = none), seed, alpha,
epsilon. The classes that are not in the base step must divide evenly among the steps.

Images are decoded as they are needed and cropped to 224x224; network and
hyper-parameters are those of ImageNet-Subset (configs/methods/), for some hundred
images a class. Fields to look at for other images, all in docs/configuration.md:

    --config.data.image_size=64 --config.data.resize=72    small images
    --config.data.flip=False                               mirror images differ
    --config.data.corrupt=skip                             damaged images
    --config.data.nominal_per_class=300                    for epsilon_unit=percent
    --config.data.validation_fraction=0.1                  tuning, without test images
    --config.phase.base.epochs=30 "--config.phase.base.milestones=(15, 25)"
    --config.phase.incremental.epochs=30 "--config.phase.incremental.milestones=(15,)"
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

ARGUMENTS = COMMON_ARGUMENTS | {"data": "my_images", "base_classes": 0}


def get_config(argument: str | None = None) -> ConfigDict:
    """ImageNet-Subset's settings for a data set of any number of classes."""
    config = default_config()
    large_images(config, NORMALIZATION["imagenet"])
    apply_arguments(config, argument, ARGUMENTS)
    method_module(__file__, config.method).configure(config, "imagenet_subset")
    return config
