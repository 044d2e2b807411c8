"""SPB-M (Wu et al. 2021): four heads, one a rotation, whose predictions add up."""

import jax
import jax.numpy as jnp
import numpy as np

from bsce_jax import log_prior
from bsce_jax.compute.state import Apply, Batch, Network, Outputs, StepContext
from bsce_jax.methods import About, Step
from bsce_jax.models import new_rows, rotations

ABOUT = About(
    title="SPB-M",
    head="four cosine heads",
    losses="as SPB, of four rotations",
    besides="without memory; the heads' predictions add up",
    source="Wu et al. 2021",
)


HEADS = ("perspectives",)


def begin(step: Step) -> Network:
    """Imprints the new classes' rows of each head on the rotation it sees."""
    kernel = np.array(step.head["kernel"])
    for head, view in enumerate(rotations.VIEWS):
        features = [found for _, found in step.features(step.new, view)]
        own = {"kernel": kernel[:, head]}
        kernel[:, head] = new_rows.imprint(own, features, step.num_old)["kernel"]
    return step.with_head({**step.head, "kernel": kernel})


def forward(
    apply: Apply, network: Network, batch: Batch, context: StepContext
) -> tuple[Outputs, Network]:
    """One pass over four rotations of every image; head b answers for rotation b.

    "perspectives" [B, 4, C] are the heads' logits, "views" [B, 4, D] the features, and
    "logits" the log of the mean of the heads' softmax over the seen classes.
    """
    out, network = apply(network, *rotations.stacked(batch.images, batch.valid))
    every = rotations.by_image(out["perspectives"])  # [B, rotation, head, C]
    own = jnp.stack([every[:, b, b] for b in range(len(rotations.VIEWS))], axis=1)
    views = rotations.by_image(out["features"])
    seen = log_prior.uniform(context.seen)[None, None, :]
    each = jax.nn.log_softmax(own + seen, axis=-1)
    logits = jax.nn.logsumexp(each, axis=1) - jnp.log(len(rotations.VIEWS))
    found = {"features": views[:, 0], "views": views, "perspectives": own}
    return found | {"logits": logits}, network
