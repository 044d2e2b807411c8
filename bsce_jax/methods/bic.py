"""BiC (Wu et al. 2019): a scale and a shift of the newest classes' logits.

They are learned last, on held-out images, by a phase of their own. The teacher's
logits are corrected by the teacher's own scale and shift, which its network brings
along; those of earlier steps are absorbed by distillation.
"""

import jax.numpy as jnp
import numpy as np

from bsce_jax.compute.state import OWN, Apply, Batch, Network, Outputs, StepContext
from bsce_jax.methods import About, Own, Sizes, Step

ABOUT = About(
    title="BiC",
    head="linear",
    losses="cross-entropy, distillation",
    besides="a phase that learns a scale and a shift of the new logits",
    source="Wu et al. 2019",
)


NEEDS_MEMORY = True


_START = {"scale": np.float32(1), "shift": np.float32(0)}


def initial(sizes: Sizes) -> Own:
    """Scale 1 and shift 0, and no class that they act on (bool [C])."""
    return Own(dict(_START), {"corrected": np.zeros(sizes.classes, bool)})


def begin(step: Step) -> Network:
    """Starts anew, on the classes of this step."""
    positions = np.arange(len(step.network.extra["corrected"]))
    new = (positions >= step.num_old) & (positions < step.num_seen)
    params = {**step.network.params, OWN: dict(_START)}
    return step.network.replace(params=params, extra={"corrected": new})


def forward(
    apply: Apply, network: Network, batch: Batch, context: StepContext
) -> tuple[Outputs, Network]:
    """The newest classes' logits become scale * logit + shift."""
    out, network = apply(network, batch.images, batch.valid)
    own, new = network.params[OWN], network.extra["corrected"][None, :]
    corrected = own["scale"] * out["logits"] + own["shift"]
    logits = jnp.where(new, corrected, out["logits"])
    return out | {"logits": logits, "shift": own["shift"]}, network
