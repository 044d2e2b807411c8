"""A network of one convolution, with everything the real ones have, fast to compile."""

import flax.linen as nn
import jax.numpy as jnp

from bsce_jax.models import heads
from bsce_jax.models.batch_norm import BatchNorm
from bsce_jax.models.convolution import Convolution


class TinyNet(nn.Module):
    num_classes: int
    dtype: jnp.dtype = jnp.float32
    head: str = "linear"
    proxies: int = 10
    auxiliary: int = 0
    kernel_scales: bool = False

    @nn.compact
    def __call__(self, images, train, valid=None, axis_name=None):
        if self.kernel_scales:
            x = Convolution(4, dtype=self.dtype, scaled=True)(images)
        else:
            x = nn.Conv(
                4, (3, 3), use_bias=False, dtype=self.dtype, param_dtype=self.dtype
            )(images)
        x = BatchNorm(dtype=self.dtype, name="norm")(x, train, valid, axis_name)
        features = jnp.mean(nn.relu(x) ** 2, axis=(1, 2))
        if self.auxiliary:
            branch = heads.CosineHead(self.auxiliary, name="auxiliary_head")
            beside = {"rotations": branch(features)[0]}
        else:
            beside = {}
        logits, out = heads.create(self.head, self.num_classes, self.proxies)(features)
        return logits, {"features": features, "maps": [x]} | out | beside
