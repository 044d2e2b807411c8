"""What a method does on the host, once a step: it is shown the step, and changes it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from bsce_jax import memory, methods
from bsce_jax.compute.state import Network
from bsce_jax.run import evaluate
from bsce_jax.run.feed import create
from bsce_jax.run.phases import new_images, training_set
from bsce_jax.run.progress import Progress
from bsce_jax.run.quotas import exemplars_per_class
from bsce_jax.run.setup import Run

# Keep these streams of random numbers apart from the others.
_EXEMPLARS, _NEW_ROWS, _FINISH, _ENTER = 2, 3, 4, 5


def _hook(run: Run, name: str) -> Callable | None:
    return getattr(methods.module(run.config.method), name, None)


def _shown(
    run: Run, progress: Progress, step: int, new: Sequence[np.ndarray], stream: int
) -> methods.Step:
    """A step as its method sees it, with the network that `progress` has."""
    config, group = run.config, run.dataset.groups[step]
    network = progress.state.network
    inference = run.inference(run.train, network, progress.step)

    def features(
        groups: Sequence[np.ndarray], view: str = "plain"
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        return evaluate.features_by_group(inference, groups, view)

    size = exemplars_per_class(config, run.dataset.groups[progress.step].stop)
    stored = progress.ranking[: group.stop, :size]
    whole = run.dataset.train.images
    return methods.Step(
        number=step,
        num_old=group.start,
        num_seen=group.stop,
        network=jax.device_get(network),
        new=new,
        exemplars=[row[row >= 0] for row in stored],
        features=features,
        options=config.options,
        rng=np.random.default_rng([config.seed, step, stream]),
        mirrored=config.data.flip,
        images=None if whole is None else lambda indices: whole[indices],
        normalization=(config.data.mean, config.data.std),
    )


def begin(run: Run, progress: Progress, step: int) -> Network:
    """The network with which a step begins, which the method may change.

    `progress` is where the step before has ended.
    """
    hook = _hook(run, "begin")
    if hook is None:
        return progress.state.network
    train = training_set(run.config, run.dataset, progress.ranking, step).train
    labels = run.dataset.train_labels[train]
    new = [train[labels == position] for position in run.dataset.groups[step]]
    return hook(_shown(run, progress, step, new, _NEW_ROWS))


def enter(run: Run, progress: Progress, name: str) -> Network:
    """The network with which a phase begins whose `begin` is the function `name`."""
    step = progress.step
    function = getattr(methods.module(run.config.method), name)
    new = new_images(run.config, run.dataset, step)
    return function(_shown(run, progress, step, new, _ENTER))


def replace_images(run: Run, progress: Progress) -> None:
    """Puts a method's own images in the place of training images, if it has any.

    They are settled by the network, so that a run that goes on has them too.
    """
    hook = _hook(run, "replaced")
    if hook is None:
        return
    indices, images = hook(jax.device_get(progress.state.network))
    if not len(indices):
        return
    train = run.dataset.train
    assert train.images is not None
    changed = train.images.copy()
    changed[indices] = images
    run.dataset = dataclasses.replace(
        run.dataset, train=dataclasses.replace(train, images=changed)
    )
    shape = run.dataset.image_shape
    run.train = create(run.config, run.devices, run.dataset.train, shape)


def finish(run: Run, progress: Progress) -> Network:
    """The network with which the current step ends, on the host or on the devices."""
    hook = _hook(run, "finish")
    if hook is None:
        return progress.state.network
    step = progress.step
    new = new_images(run.config, run.dataset, step)
    return hook(_shown(run, progress, step, new, _FINISH))


def select_exemplars(run: Run, progress: Progress) -> None:
    """Ranks exemplars of the step's new classes; old rankings are never touched."""
    group = run.dataset.groups[progress.step]
    new = new_images(run.config, run.dataset, progress.step)
    count = exemplars_per_class(run.config, group.stop)
    if count == 0:
        chosen = [indices[:0] for indices in new]
    elif hook := _hook(run, "exemplars"):
        shown = _shown(run, progress, progress.step, new, _EXEMPLARS)
        chosen = hook(shown, count)
    else:
        chosen = _choose(run, progress, new, count)
    for position, indices in zip(group, chosen, strict=True):
        progress.ranking = memory.store(progress.ranking, position, indices)


def _choose(
    run: Run, progress: Progress, new: Sequence[np.ndarray], count: int
) -> list[np.ndarray]:
    """`count` images of each new class by config.memory.selection, in order of choice.

    Fewer where images are skipped and too few are left.
    """
    config, step = run.config, progress.step
    if config.memory.selection == "first":
        return [indices[:count] for indices in new]
    if config.memory.selection == "random":
        rng = np.random.default_rng([config.seed, step, _EXEMPLARS])
        return [i[memory.random_ranking(len(i), count, rng)] for i in new]
    # One compiled size: the largest class, and the most exemplars of the experiment.
    longest = int(run.dataset.images_per_class.max())
    most = progress.ranking.shape[1]
    normalise = config.memory.selection == "herding"
    inference = run.inference(run.train, progress.state.network, step)
    chosen = []
    for indices, found in evaluate.features_by_group(inference, new):
        padded = np.zeros((longest, found.shape[1]), np.float32)
        padded[: len(found)] = found
        valid = np.arange(longest) < len(found)
        order = memory.herd_padded(padded, valid, most, normalise)
        ranked = np.asarray(order)[:count]
        chosen.append(indices[ranked[ranked >= 0]])
    return chosen
