"""Meta Balanced Softmax: learning alpha through one step of training.

Alpha weights the old classes in the training loss (Jodelet et al., Eq. 5). It is
trained so that the model after one plain gradient step on that loss does well on a
balanced held-out set (Algorithm 1).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from bsce_jax.errors import UserError


def gradient(
    train_loss: Callable[[Any, jax.Array], jax.Array],
    validation_loss: Callable[[Any], jax.Array],
    params: Any,
    alpha: ArrayLike,
    learning_rate: ArrayLike,
    mode: str = "forward",
    axis_name: str | None = None,
    scale: Any = None,
) -> jax.Array:
    """Derivative by alpha of the validation loss after one step of gradient descent.

    d/d alpha of ``validation_loss(params - learning_rate * d/d params train_loss(
    params, alpha))``, exactly: through batch statistics and every term of the losses.

    With `axis_name` both losses are this device's share of a sum over all devices:
    under pmap psum transposes to psum, so the psum of the devices' gradients is the
    gradient of that sum.

    Args:
      train_loss: ``(params, alpha) -> scalar``; alpha enters by
        `bsce_jax.log_prior.with_alpha`.
      validation_loss: ``params -> scalar``.
      params: pytree of float arrays, at which the step starts.
      alpha: scalar.
      learning_rate: scalar, of the inner step.
      mode: "forward" differentiates the step in the one direction alpha (jvp over
        grad: about the memory of a plain training step); "reverse" is the literal
        nested gradient, which stores both passes. They agree to rounding.
      axis_name: the mapped axis, in pmap.
      scale: factor of the inner step, like params, leaves broadcastable (0 for frozen
        parameters); None is 1.

    Returns:
      Scalar of alpha's dtype, the same on every device.

    Raises:
      UserError: unknown mode.
    """

    def loss_after_step(alpha: jax.Array) -> jax.Array:
        inner = _sum_over_devices(jax.grad(train_loss)(params, alpha), axis_name)
        if scale is not None:
            inner = jax.tree.map(lambda g, s: g * s.astype(g.dtype), inner, scale)
        stepped = jax.tree.map(lambda p, g: p - learning_rate * g, params, inner)
        return validation_loss(stepped)

    alpha = jnp.asarray(alpha, jnp.result_type(alpha, float))
    if mode == "forward":
        _, result = jax.jvp(loss_after_step, (alpha,), (jnp.ones_like(alpha),))
    elif mode == "reverse":
        result = jax.grad(loss_after_step)(alpha)
    else:
        raise UserError(f"mode={mode!r}: must be 'forward' or 'reverse'")
    return _sum_over_devices(result, axis_name).astype(alpha.dtype)


def update(
    alpha: jax.Array,
    gradient: jax.Array,
    optimizer_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    minimum: float,
    maximum: float,
    logarithmic: bool = False,
) -> tuple[jax.Array, optax.OptState]:
    """One step of alpha, kept within bounds.

    Args:
      alpha: scalar.
      gradient: scalar, from `gradient`.
      optimizer_state: ``optimizer.init(alpha)`` at first.
      optimizer: any optax optimiser.
      minimum: lower bound, above 0, where the derivative of log alpha has its pole.
      maximum: upper bound.
      logarithmic: the optimiser moves log alpha, whose gradient is alpha times that of
        alpha: alpha is multiplied where it would be added to.

    Returns:
      The new alpha and the new state of the optimiser.
    """
    if logarithmic:
        gradient = alpha * gradient
    variable = jnp.log(alpha) if logarithmic else alpha
    change, optimizer_state = optimizer.update(gradient, optimizer_state, variable)
    moved = jnp.asarray(optax.apply_updates(variable, change))
    moved = jnp.exp(moved) if logarithmic else moved
    return jnp.clip(moved, minimum, maximum), optimizer_state


def _sum_over_devices(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
