"""SPB-I (Wu et al. 2021): SPB that also learns to tell the rotations of an image.

An auxiliary branch of the network (`model.auxiliary`) sees the last feature map.
Classes are learned on the images as they are, features are kept in all rotations.
"""

from bsce_jax.compute.state import Apply, Batch, Network, Outputs, StepContext
from bsce_jax.methods import About, imprinted
from bsce_jax.models import rotations

ABOUT = About(
    title="SPB-I",
    head="cosine",
    losses="as SPB, and the rotation of an image",
    besides="without memory",
    source="Wu et al. 2021",
)


HEADS = ("cosine",)

begin = imprinted


def rotated(
    apply: Apply, network: Network, batch: Batch, context: StepContext
) -> tuple[Outputs, Network]:
    """One pass over four rotations of every image, of training phases only.

    "views" [B, 4, D] are the features and "rotations" [B, 4, 4] the logits of the
    rotation; all else is that of the images as they are.
    """
    out, network = apply(network, *rotations.stacked(batch.images, batch.valid))
    views = rotations.by_image(out["features"])
    kept = {name: out[name][: len(batch.labels)] for name in ("logits", "similarities")}
    found = {
        "features": views[:, 0],
        "views": views,
        "rotations": rotations.by_image(out["rotations"]),
        "scale": out["scale"],
    }
    return kept | found, network
