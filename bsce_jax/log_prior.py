"""Log-priors: the one vector in which the losses of the paper differ.

Every loss of the family is the softmax cross-entropy of ``logits + log_prior``,
where ``log_prior = log(lambda)`` has one entry a class (Jodelet et al., Eq. 3, 5
and 6). All functions are pure and may be traced. Vectors are ``[classes]`` over all
classes of the experiment, float32 (float64 where the inputs are).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bsce_jax.norms import widened

EXCLUDED = -1e9
"""Log-prior of a class that takes no part: unseen, or of weight zero.

Finite on purpose: its softmax is exactly 0, and so is its gradient, whereas minus
infinity turns one-hot, entropy and divergence terms into NaN.
"""


def uniform(seen: ArrayLike) -> jax.Array:
    """The plain softmax cross-entropy, over the seen classes.

    Args:
      seen: ``[classes]`` bool, classes learned so far, this step's included.

    Returns:
      ``[classes]`` float32: 0 for a seen class, EXCLUDED otherwise.
    """
    return jnp.where(jnp.asarray(seen), jnp.float32(0), jnp.float32(EXCLUDED))


def balanced(counts: ArrayLike) -> jax.Array:
    """Balanced Softmax (Eq. 3): the log of the number of images.

    Args:
      counts: ``[classes]`` images of each class in this step's training set.

    Returns:
      ``[classes]``: log n_i, or EXCLUDED for a class without images.
    """
    return _log(counts)


def weighted(counts: ArrayLike, old: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """Balanced Softmax with the old classes weighted by alpha (Eq. 5).

    Args:
      counts: ``[classes]`` images of each class in this step's training set.
      old: ``[classes]`` bool, classes learned in an earlier step.
      alpha: scalar; 1 is Balanced Softmax, less favours the old classes.

    Returns:
      ``[classes]``: log alpha + log n_i for old classes, log n_i for the others, and
      EXCLUDED where there are no images.
    """
    return jnp.where(
        jnp.asarray(counts) > 0, with_alpha(balanced(counts), old, alpha), EXCLUDED
    )


def relaxed(counts: ArrayLike, old: ArrayLike, epsilon: ArrayLike) -> jax.Array:
    """Relaxed Balanced Softmax for training without memory (Eq. 6).

    Args:
      counts: ``[classes]`` images of each class in this step's training set.
      old: ``[classes]`` bool, classes learned in an earlier step.
      epsilon: scalar, the number of images an old class is given; 0 leaves the new
        classes alone in the softmax.

    Returns:
      ``[classes]``: log epsilon for old classes, log n_i for new ones, EXCLUDED where
      that number is 0 (so for every unseen class).
    """
    counts = _floating(counts)
    return _log(jnp.where(jnp.asarray(old), jnp.asarray(epsilon, counts.dtype), counts))


def with_alpha(log_prior: ArrayLike, old: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """Adds log alpha on the old classes (Eq. 5).

    The only place where alpha enters compiled code, and differentiable in it; alpha
    = 1 changes no bit, so that one program serves every prior.

    Args:
      log_prior: ``[classes]``.
      old: ``[classes]`` bool, classes learned in an earlier step.
      alpha: scalar, at least 0.

    Returns:
      ``[classes]``, ``log_prior + old * log(alpha)``.
    """
    dtype = jnp.result_type(log_prior, alpha, jnp.float32)
    log_alpha = _log(jnp.asarray(alpha, dtype))
    return jnp.asarray(log_prior, dtype) + jnp.where(jnp.asarray(old), log_alpha, 0)


def _log(values: ArrayLike) -> jax.Array:
    """Natural logarithm, EXCLUDED where the value is 0."""
    values = _floating(values)
    # The inner where keeps log(0) out of the gradient, where it would be NaN.
    positive = values > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, values, 1)), EXCLUDED)


def _floating(values: ArrayLike) -> jax.Array:
    values = jnp.asarray(values)
    return widened(values)
