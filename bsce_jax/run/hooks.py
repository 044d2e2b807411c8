"""What a method does on the host, once a step: it is shown the step, and changes it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from bsce_jax import memory, methods
from bsce_jax.compute.state import OWN, Network
from bsce_jax.errors import UserError
from bsce_jax.run import evaluate
from bsce_jax.run.feed import create
from bsce_jax.run.phases import new_images, training_set
from bsce_jax.run.progress import Progress
from bsce_jax.run.quotas import exemplars_per_class
from bsce_jax.run.setup import Run

# Streams of random numbers of a step, apart from one another and from that of the
# held-out images; epochs of these numbers order their images by the same.
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

    Raises:
      UserError: it is none that can go on.
    """
    hook = _hook(run, "begin")
    if hook is None:
        return progress.state.network
    train = training_set(run.config, run.dataset, progress.ranking, step).train
    labels = run.dataset.train_labels[train]
    new = [train[labels == position] for position in run.dataset.groups[step]]
    return _called(run, "begin", hook, _shown(run, progress, step, new, _NEW_ROWS))


def enter(run: Run, progress: Progress, name: str) -> Network:
    """The network with which a phase begins whose `begin` is the function `name`.

    Raises:
      UserError: it is none that can go on.
    """
    step = progress.step
    function = getattr(methods.module(run.config.method), name)
    new = new_images(run.config, run.dataset, step)
    return _called(run, name, function, _shown(run, progress, step, new, _ENTER))


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
    """The network with which the current step ends, on the host or on the devices.

    Raises:
      UserError: it is none that can go on, or another model after the base step, which
        runs of other methods take over.
    """
    hook = _hook(run, "finish")
    if hook is None:
        return progress.state.network
    step = progress.step
    new = new_images(run.config, run.dataset, step)
    shown = _shown(run, progress, step, new, _FINISH)
    found = _called(run, "finish", hook, shown)
    if step == 0 and not _same_model(shown.network, found):
        raise UserError(
            f"finish of the method {run.config.method} changes the model after the "
            "base step, which other methods share: expected changes of what it has of "
            "its own alone"
        )
    return found


def _called(run: Run, name: str, hook: Callable, shown: methods.Step) -> Network:
    """What the hook of a name makes of the network, in the same shapes and types.

    Raises:
      UserError: it is no such network, or not finite; names the hook and the array.
    """
    where = f"{name} of the method {run.config.method}"
    found = hook(shown)
    if not isinstance(found, Network):
        kind = type(found).__name__
        raise UserError(f"{where} gives {kind}: expected the Network")
    was, now = _arrays(shown.network), _arrays(found)
    if was.keys() != now.keys():
        names = ", ".join(sorted(was.keys() ^ now.keys()))
        raise UserError(f"{where} gives a network of other arrays: {names}")
    for name, array in now.items():
        if array.shape != was[name].shape:
            raise UserError(
                f"{where} gives {name} of shape {array.shape}: expected "
                f"{was[name].shape}"
            )
        if not np.can_cast(array.dtype, was[name].dtype, "same_kind"):
            raise UserError(
                f"{where} gives {name} of {array.dtype}: expected {was[name].dtype}"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{where} gives {name} that is not finite")
    return jax.tree.map(
        lambda array, like: np.asarray(array, like.dtype), found, shown.network
    )


def _arrays(network: Network) -> dict[str, np.ndarray]:
    """The arrays of a network by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(network)
    }


def _same_model(one: Network, other: Network) -> bool:
    """Whether two networks differ in no more than what is a method's own."""
    models = (
        ({k: v for k, v in n.params.items() if k != OWN}, n.batch_stats)
        for n in (one, other)
    )
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, *models)))


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
