"""python -m bsce_jax.main with a network of one convolution, which compiles at once."""

import runpy

from bsce_jax.run import programs
from tests.tiny import TinyNet


def build_model(config, devices, num_classes):
    """In the place of programs.build_model; PODNet's head has two proxies a class."""
    model = config.model
    return TinyNet(
        num_classes,
        head=model.head,
        proxies=2,
        auxiliary=model.auxiliary,
        kernel_scales=model.kernel_scales,
    )


if __name__ == "__main__":
    programs.build_model = build_model
    runpy.run_module("bsce_jax.main", run_name="__main__", alter_sys=True)
