"""The examples of docs/adding.md, as they stand there."""

import functools
import importlib.util
import operator
import pathlib
import re
import sys
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bsce_jax import losses, methods, models
from bsce_jax.compute import parallel
from bsce_jax.compute.state import OWN, Network, TrainState
from bsce_jax.config import default_config
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.run import context, dataset, feed, loop, phases, programs
from tests.tiny import TinyNet

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRIORS = ("none", "balanced", "weighted", "meta", "relaxed")
CLASSES, PER_CLASS = 6, 8


def examples(section: str) -> list[str]:
    """The Python code blocks of a section, in order."""
    text = (ROOT / "docs" / "adding.md").read_text()
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", body, re.M | re.S)


def run_code(code: str, name: str = "example") -> dict:
    namespace = {"__name__": name}
    exec(compile(code, f"docs/adding.md ({name})", "exec"), namespace)
    return namespace


@pytest.fixture
def feature_distance(tmp_path, monkeypatch) -> Iterator[str]:
    """Puts the example of a loss term into the package, and gives its test."""
    term, test = examples("A loss term")
    (tmp_path / "feature_distance.py").write_text(term)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    yield test
    sys.modules.pop("bsce_jax.losses.feature_distance", None)
    if hasattr(losses, "feature_distance"):
        del losses.feature_distance


@pytest.fixture
def documented(tmp_path, monkeypatch, feature_distance) -> Iterator[dict]:
    """The methods of the page: their procedures are put into the package.

    Gives the configuration of each for small images.
    """
    folder = tmp_path / "procedures"
    folder.mkdir()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    found = {}
    code = examples("A method")
    names = ("feature_baseline", "shifted")
    for name, configuration, procedure in zip(
        names, code[::2], code[1::2], strict=True
    ):
        (folder / f"{name}.py").write_text(procedure)
        config = found[name] = default_config()
        run_code(configuration)["configure"](config, "digits")
        config.data.padding, config.data.flip = 0, False
        config.data.mean = config.data.std = (0.5,)
        config.scenario.base_classes, config.scenario.steps = 2, 2
        config.memory.per_class, config.optim.batch_size = 4, 9
    yield found
    for name in names:
        sys.modules.pop(f"bsce_jax.methods.{name}", None)
        if hasattr(methods, name):
            delattr(methods, name)


@functools.cache
def images() -> dataset.Dataset:
    """Noise in three steps of two classes, class by class."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), PER_CLASS)
    pixels = rng.integers(0, 256, (len(labels), 6, 6, 1)).astype(np.uint8)
    split = dataset.Split("train", np.arange(len(labels)), labels, pixels)
    return dataset.Dataset(
        train=split,
        test=split,
        image_shape=(6, 6, 1),
        class_names=tuple("abcdef"),
        class_order=np.arange(CLASSES),
        groups=(range(2), range(2, 4), range(4, 6)),
    )


APPLY = jax.jit(TinyNet(CLASSES).apply, static_argnames=("train", "mutable"))


@functools.cache
def variables(seed: int) -> dict:
    """Of the smallest network, on the host."""
    init = jax.jit(functools.partial(TinyNet(CLASSES).init, train=False))
    return jax.device_get(init(jax.random.key(seed), jnp.zeros((1, 6, 6, 1))))


def network(config: ConfigDict, seed: int) -> Network:
    own = methods.initial(config, methods.Sizes(CLASSES, 4, (6, 6, 1), 2, 3))
    params = variables(seed)["params"] | ({OWN: own.params} if own.params else {})
    return Network(params, variables(seed)["batch_stats"], own.extra)


def first_update(config: ConfigDict, monkeypatch, step: int, name: str) -> tuple:
    """One update by the real programs, of a phase: (state, metrics, training)."""
    devices = parallel.create("jit", jax.devices()[:1])
    monkeypatch.setattr(programs, "build_model", lambda *_: TinyNet(CLASSES))
    built = programs.build(config, devices, CLASSES)
    ranking = np.full((CLASSES, 4), -1, np.int32)
    ranking[:4] = PER_CLASS * np.arange(4)[:, None] + np.arange(4)
    (phase,) = (p for p in phases.configured(config) if p.name == name)
    data = phases.step_data(config, images(), ranking, step, phase)
    student = network(config, 0)
    one = np.float32(1)
    state = TrainState(
        student,
        built.optimizer.init(student.params),
        one,
        built.alpha_optimizer.init(one),
    )
    constants = context.phase_context(config, images(), data, student)
    if context.has_teacher(data):
        constants = constants.replace(teacher=network(config, 1))
    training = loop.make_training(config, data)
    running = loop.Loop(
        built, feed.create(config, devices, images().train, (6, 6, 1)), training
    )
    placed = parallel.replicate(devices, (state, constants))
    after, metrics = loop.call(running, *placed, 0, 1)
    return jax.device_get(after), float(metrics["loss"][0]), training


def outputs(network: Network, rows: np.ndarray, train: bool) -> tuple:
    """Logits and features of images, without the programs."""
    pixels = (images().train.images[rows].astype(np.float32) / 255 - 0.5) / 0.5
    given = {"params": network.params, "batch_stats": network.batch_stats}
    (logits, out), _ = APPLY(given, pixels, train=train, mutable="batch_stats")
    return np.asarray(logits, float), np.asarray(out["features"], float)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    rows = np.arange(len(labels))
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels])


def test_the_documented_loss_term_passes_its_documented_test(feature_distance):
    tests = run_code(feature_distance)
    tests["test_feature_distance_equals_the_formula"]()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", ["feature_baseline", "shifted"])
def test_a_documented_method_resolves_for_every_prior(documented, name, prior):
    config = documented[name]
    config.prior = prior
    found = resolve(config)
    assert found.name.split("-")[1] == name and resolve(found) == found


def test_a_mistake_in_the_documented_term_is_named(documented):
    config = documented["feature_baseline"]
    config.terms.feature_distance.scal = 1.0
    message = "feature_distance.scal is unknown; known: weight, factor, scale"
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_the_documented_procedure_sets_the_new_rows(documented):
    head = {"kernel": np.ones((3, 5), np.float32), "bias": np.ones(5, np.float32)}
    step = methods.Step(
        number=1,
        num_old=2,
        num_seen=4,
        network=Network({"head": head}, {}, {}),
        new=[],
        exemplars=[],
        features=lambda groups, view="plain": [],
        options={},
        rng=np.random.default_rng(0),
        mirrored=False,
        images=None,
        normalization=((0.5,), (0.5,)),
    )
    found = methods.module("feature_baseline").begin(step).params["head"]
    np.testing.assert_array_equal(found["bias"], [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(found["kernel"], np.tile([1, 1, 0, 0, 1], (3, 1)))
    np.testing.assert_array_equal(head["kernel"], 1)
    config = documented["feature_baseline"]
    config.model.head = "cosine"
    with pytest.raises(UserError, match="model.head='cosine': expected linear for"):
        resolve(config)


@pytest.mark.parametrize(("step", "name"), [(0, "base"), (2, "incremental")])
def test_the_documented_loss_term_enters_the_loss_after_the_base_step(
    documented, monkeypatch, step, name
):
    """One update by the real programs: L = CE + rho 0.1 |f - f_teacher|^2."""
    config = resolve(documented["feature_baseline"])
    _, loss, training = first_update(config, monkeypatch, step, name)
    rows, valid = training.training_batches[0]
    assert valid.all() and len(rows) == 9
    seen = training.data.num_seen
    logits, features = outputs(network(config, 0), rows, train=True)
    ce = cross_entropy(logits[:, :seen], images().train.labels[rows])
    _, theirs = outputs(network(config, 1), rows, train=False)
    distance = ((features - theirs) ** 2).sum(axis=1).mean()
    rho = training.data.num_old / seen
    np.testing.assert_allclose(loss, ce + rho * 0.1 * distance, rtol=1e-5)
    assert 0.1 * distance > 1e-4 and (rho > 0) == (step > 0)


def test_the_documented_rule_predicts_by_direction(documented):
    forward = methods.module("feature_baseline").forward
    kernel = np.array([[3.0, 0.0], [0.0, 0.5]], np.float32)
    net = Network({"head": {"kernel": kernel}}, {}, {})
    logits = np.array([[1.0, 0.4]], np.float32)
    batch = types.SimpleNamespace(images=None, valid=None)
    out, same = forward(
        lambda network, *_: ({"logits": logits}, network), net, batch, None
    )
    np.testing.assert_allclose(out["scores"], [[1 / 3, 0.8]], rtol=1e-4)
    assert out["logits"] is logits and same is net


def test_the_documented_phase_learns_one_number_on_held_out_images(
    documented, monkeypatch
):
    """d CE / d shift by hand, and nothing else moves."""
    config = resolve(documented["shifted"])
    assert config.phases == ("base", "incremental", "shift")
    after, loss, training = first_update(config, monkeypatch, 2, "shift")
    held_out = training.data.train
    labels = images().train.labels
    assert len(held_out) == 6 and set(labels[held_out]) == set(range(6))
    before = network(config, 0)
    logits, _ = outputs(before, held_out, train=False)
    np.testing.assert_allclose(loss, cross_entropy(logits, labels[held_out]), rtol=1e-5)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = np.mean(chances[:, :4].sum(axis=1) - (labels[held_out] < 4))
    own = after.network.params.pop(OWN)
    rate = config.phase.shift.learning_rate
    np.testing.assert_allclose(own["shift"], -rate * gradient, rtol=1e-4)
    before.params.pop(OWN)
    same = jax.tree.map(np.array_equal, after.network.params, before.params)
    assert all(jax.tree.leaves(same)) and abs(gradient) > 1e-3


def load(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documented_data_set_is_prepared_and_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    builder, config = examples("A data set")
    pixels, labels = run_code(builder, "__main__")["load"]("train")
    assert capsys.readouterr().out.strip().endswith("stripes/1.0.0")
    (tmp_path / "stripes.py").write_text(config)
    (tmp_path / "methods").symlink_to(ROOT / "configs" / "methods")
    module = load(tmp_path / "stripes.py")
    found = dataset.load(resolve(module.get_config("prior=meta,seed=3")))
    assert found.class_names == ("1 pixel", "2 pixels", "3 pixels", "4 pixels")
    assert found.groups == (range(2), range(2, 3), range(3, 4))
    np.testing.assert_array_equal(found.images_per_class, [20] * 4)
    key = operator.methodcaller("tobytes")
    pairs = {(key(i), int(n)) for i, n in zip(pixels, labels, strict=True)}
    read = zip(found.train.images, found.train_labels, strict=True)
    assert {(key(i), int(n)) for i, n in read} == pairs


def test_the_documented_network_keeps_the_contract():
    code, branch, known = examples("A network")
    create = "def create(name, num_classes, width, head, dtype, conv_chunks, "
    create += "proxies=10, auxiliary=0, kernel_scales=False):\n"
    module = types.SimpleNamespace(**run_code(code))
    scope = {"convnet": module, "_dtype": models._dtype, "UserError": UserError}
    exec(create + branch, scope)
    exec("def check_name(name):\n" + known, scope)
    assert scope["check_name"]("convnet") == ("convnet", 0)
    with pytest.raises(UserError):
        models.check_name("convnet")  # a name has to be known there too
    network = scope["create"]("convnet", 7, 4, "linear", "float32", 2)
    assert network == module.ConvNet(7, 4, dtype=jnp.dtype("float32"), conv_chunks=2)
    proxied = scope["create"]("convnet", 7, 4, "x", "float32", 2, proxies=3)
    assert proxied.proxies == 3
    with pytest.raises(UserError, match="neither auxiliary nor kernel_scales"):
        scope["create"]("convnet", 7, 4, "linear", "float32", 2, auxiliary=4)
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(functools.partial(network.init, train=False))(
        jax.random.key(0), images
    )
    assert set(variables) == {"params", "batch_stats"}
    head = variables["params"]["head"]
    assert {name: leaf.shape[-1] for name, leaf in head.items()} == {
        "kernel": 7,
        "bias": 7,
    }
    valid = np.array([1, 1, 1, 0, 0], np.float32)

    @jax.jit
    def apply(images, valid):
        return network.apply(
            variables, images, train=True, valid=valid, mutable=["batch_stats"]
        )

    (logits, out), changed = apply(images, valid)
    assert logits.shape == (5, 7) and out["features"].shape == (5, 8)
    other = np.where(valid[:, None, None, None] == 1, images, 100)
    (again, _), same = apply(other, valid)
    np.testing.assert_array_equal(logits[:3], again[:3])
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
