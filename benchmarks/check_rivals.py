"""Whether the rivals in PyTorch compute what the package does."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import problem
import torch_rivals

from bsce_jax.compute import steps
from bsce_jax.compute.state import Batch
from bsce_jax.run import programs

TOLERANCE = 1e-4  # relative


def check(methods: Sequence[str], priors: Sequence[str], sizes: problem.Sizes) -> bool:
    """Compares losses with PyTorch's, before and after an update; prints a table."""
    jax.config.update("jax_default_matmul_precision", "highest")
    right = True
    print("method | prior | update | ours | PyTorch | difference, relative")
    for method in methods:
        for prior in priors or ("none", "balanced"):
            ours, theirs = both_losses(method, prior, sizes)
            for update, pair in enumerate(zip(ours, theirs, strict=True)):
                difference = abs(pair[0] - pair[1]) / abs(pair[0])
                # The first update amplifies rounding errors.
                right &= difference <= (TOLERANCE, 10 * TOLERANCE)[update]
                cells = f"{pair[0]:.6f} | {pair[1]:.6f} | {difference:.1e}"
                print(f"{method} | {prior} | {update} | {cells}")
    return right


def both_losses(
    method: str, prior: str, sizes: problem.Sizes
) -> tuple[list[float], list[float]]:
    """Losses of two updates on a batch, by the package and by PyTorch."""
    p = problem.make(method, prior, "float32", sizes)
    config, rng = p.run.config, np.random.default_rng(1)

    def moved(x: np.ndarray) -> np.ndarray:
        # No scale stays at 0 or 1 and no running mean at 0; variances are positive.
        noise = 0.1 * rng.normal(size=x.shape)
        return np.asarray(np.abs(x + noise) if x.ndim < 2 else x, np.float32)

    student, teacher = (
        jax.tree.map(moved, jax.device_get(network))
        for network in (p.progress.state.network, p.progress.teacher)
    )
    size, pixels = config.optim.batch_size, p.run.dataset.train.images.shape[1]
    images = rng.normal(size=(size, pixels, pixels, 3)).astype("f")
    labels = rng.integers(0, p.data.num_seen, size).astype(np.int32)
    program = programs.phase_program(config, p.programs.model, p.data.phase.name)
    fast = {"xla_backend_optimization_level": 0}  # to compile: it runs twice
    step = jax.jit(
        functools.partial(steps.train_step, program),
        compiler_options=fast if jax.default_backend() == "cpu" else None,
    )
    state, ours = p.progress.state.replace(network=student), []
    for _ in range(2):
        state, metrics = step(
            state,
            p.context.replace(teacher=teacher),
            Batch(images, labels, np.ones(size, "f")),
            np.float32(0.1),
        )
        ours.append(float(metrics["loss"]))
    spec = {**problem.rival_spec(p, 2), "rate": 0.1}
    theirs = torch_rivals.losses(spec, vars(student), vars(teacher), images, labels, 2)
    return ours, theirs
