"""Classification loss of PODNet on class similarities (Douillard et al. 2020)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bsce_jax.log_prior import EXCLUDED
from bsce_jax.losses.softmax_ce import label_mask, rescaled
from bsce_jax.norms import widened

NEEDS_SIMILARITIES = True
"""The term reads what a cosine or local similarity head gives besides its logits."""
CLASSIFICATION = True
"""Another classification loss may take its place: see `config.terms.with_prior`."""

LIMITS = {"margin": (0, 100)}


def nca(
    similarities: jax.Array,
    labels: jax.Array,
    scale: ArrayLike,
    margin: float = 0.6,
    exact: bool = False,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Neighbourhood component analysis over classes, as coded or as printed.

    With s the similarities, y the label and eta the scale:

    * as coded by the authors (default): ``log(sum_{j != y} e^(eta s_j) + e^(eta s_m)) -
      eta s_y``, m being the most similar class. `margin` is without effect: their code
      subtracts it from every similarity, where it cancels (inclearn, issue 59), and it
      has no hinge. Where m = y this is the softmax cross-entropy.
    * `exact`, as printed (Douillard et al. 2020, the NCA loss with margin and hinge):
      ``max(0, -log(e^(eta (s_y - margin)) / sum_{j != y} e^(eta s_j)))``.

    Args:
      similarities: ``[batch, classes]``, without the scale, any floating dtype.
      labels: ``[batch]`` int, positions in the class order.
      scale: scalar eta, learned; of any sign.
      margin: by which the true class should lead, if `exact`.
      exact: the printed loss, not the coded one.
      seen: ``[classes]`` bool, the only classes that take part; all where None.

    Returns:
      ``[batch]``, computed in float32 (float64 where an input is). A label outside
      ``[0, classes)`` has value and gradient 0.
    """
    scores = scale * widened(similarities)
    if seen is not None:
        # After the scaling: a negative scale would turn an exclusion around.
        scores = jnp.where(seen[None, :], scores, EXCLUDED)
    is_label = label_mask(labels, scores.shape[1])
    # The gradient flows through the maximum, as in the authors' code.
    instead = EXCLUDED if exact else jnp.max(scores, axis=1, keepdims=True)
    denominator = jax.nn.logsumexp(
        jnp.where(is_label, instead, scores), axis=1, keepdims=True
    )
    if not exact:
        return jnp.sum(denominator - scores, axis=1, where=is_label)
    lead = scores - scale * margin
    return jnp.maximum(jnp.sum(denominator - lead, axis=1, where=is_label), 0)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
    *,
    margin: float = 0.6,
    exact: bool = False,
    rescale: bool = False,
    normalised: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The classification loss of PODNet as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"similarities"`` [batch,
        classes] without their scale, and ``"scale"`` [].
      teacher: not used.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``seen`` [classes] bool, and ``counts`` [classes].
      margin: see `nca`; without effect unless `exact`.
      exact: the printed loss, not the one the authors coded.
      rescale, normalised: loss rescaling, see `bsce_jax.losses.softmax_ce.term`.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    values = nca(
        student["similarities"],
        batch.labels,
        student["scale"],
        margin,
        exact,
        context.seen,
    )
    return rescaled(values, batch, context, rescale, normalised)
