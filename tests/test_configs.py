"""Every configuration file, and the paper's hyper-parameters."""

import functools
import importlib.util
import itertools
import operator
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bsce_jax import log_prior, losses, methods, models
from bsce_jax.compute import parallel
from bsce_jax.config.fields import default_config
from bsce_jax.config.files import method_module
from bsce_jax.config.hashes import flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.run import dataset as dataset_module
from bsce_jax.run import feed, loop, programs
from bsce_jax.run.phases import StepData
from tests.test_training import CLASSES, example, plan
from tests.tiny import TinyNet

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(path.stem for path in CONFIGS.glob("*.py"))
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.py"))
PRIORS = {
    "none": "",
    "balanced": "",
    "weighted": "alpha=0.25",
    "meta": "",
    "relaxed": "epsilon=1",
}


def load(name: str | pathlib.Path) -> types.ModuleType:
    file = CONFIGS / f"{name}.py"  # a whole path stands for itself
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(module: types.ModuleType, **given: object) -> str | None:
    """Those of the given arguments that the file takes, as on the command line."""
    known = getattr(module, "ARGUMENTS", {})
    parts = [f"{name}={value}" for name, value in given.items() if name in known]
    return ",".join(parts)


def get(module: types.ModuleType, argument: str) -> ConfigDict:
    """The configuration, with or without a string argument."""
    return module.get_config(argument) if argument else module.get_config()


def test_the_files_are_those_documented():
    assert {"base", "cifar100", "cifar100_cpu", "digits"} <= set(FILES)
    assert {"il_baseline", "lucir", "podnet"} <= set(METHODS)


@pytest.mark.parametrize("name", FILES)
def test_every_file_resolves_for_every_prior_and_number_of_steps(name):
    module = load(name)
    assert f"configs/{name}.py" in module.__doc__
    base = resolve(get(module, ""))
    assert base.prior == getattr(module, "ARGUMENTS", {"prior": "none"})["prior"]
    known = getattr(module, "ARGUMENTS", {})
    for prior, steps, seed in itertools.product(PRIORS, (5, 10, 25), (0, 7)):
        config = get(module, arguments(module, prior=prior, steps=steps, seed=seed))
        config.prior, config.seed, config.epsilon = prior, seed, 1.0
        config = resolve(config)
        assert config.prior == prior and config.seed == seed
        assert config.scenario.steps == (steps if "steps" in known else 5)
        assert prior in config.name
        assert config.optim.base_epochs > 0
        assert config.method in METHODS


@pytest.mark.parametrize("name", FILES)
def test_every_argument_of_a_file_is_a_field(name):
    """Nothing that is given is lost: the configuration changes with each argument."""
    module = load(name)
    for argument, default in getattr(module, "ARGUMENTS", {}).items():
        if argument == "method":
            for method in METHODS:
                assert get(module, f"method={method}").method == method
            with pytest.raises(UserError, match="expected one of .*il_baseline"):
                get(module, "method=other")
            continue
        value = default + ("x" if isinstance(default, str) else 1)
        value = "meta" if argument == "prior" else value
        before, after = (
            flatten(get(module, "")),
            flatten(get(module, f"{argument}={value}")),
        )
        differing = {k for k in before if before[k] != after[k]}
        assert len(differing) == 1 and after[differing.pop()] == value, argument


def test_without_memory():
    module = load("cifar100")
    config = resolve(get(module, "memory=0,prior=relaxed,epsilon=1"))
    assert config.memory.kind == "none" and config.memory.per_class == 0
    with pytest.raises(UserError, match="config.prior='meta'.*memory.kind"):
        resolve(get(module, "memory=0,prior=meta"))


@pytest.mark.parametrize(("prior", "more"), PRIORS.items())
@pytest.mark.parametrize("steps", [5, 10, 25])
def test_the_hyper_parameters_of_the_paper_on_cifar100(prior, more, steps):
    """Jodelet et al., section 4.1; where it is silent the published code of BiC and
    LUCIR, from whom it takes them."""
    argument = f"prior={prior},steps={steps}" + (f",{more}" if more else "")
    config = resolve(get(load("cifar100"), argument))
    found = flatten(config)
    expected = {
        "method": "il_baseline",
        "data.name": "cifar100",
        "data.train_split": "train",
        "data.test_split": "test",
        "data.image_size": 0,
        "data.max_per_class": 0,
        "data.nominal_per_class": 500,
        "data.validation_fraction": 0.0,
        "data.padding": 4,
        "data.flip": True,
        "data.brightness": 0.0,
        "data.mean": [0.5071, 0.4866, 0.4409],
        "data.std": [0.2009, 0.1984, 0.2023],
        "scenario.subset": "all",
        "scenario.class_order": "seed1993",
        "scenario.base_classes": 50,
        "scenario.steps": steps,
        "memory.kind": "growing",
        "memory.per_class": 20,
        "memory.selection": "herding",
        "model.name": "resnet32",
        "model.width": 0,
        "model.head": "linear",
        "model.dtype": "float32",
        "optim.epochs": 250,
        "optim.base_epochs": 250,
        "optim.batch_size": 128,
        "optim.learning_rate": 0.1,
        "optim.base_learning_rate": 0.1,
        "optim.momentum": 0.9,
        "optim.weight_decay": 2e-4,
        "optim.milestones": [100, 150, 200],
        "optim.base_milestones": [100, 150, 200],
        "optim.decay": 0.1,
        "terms.kd.weight": "rho",
        "terms.kd.temperature": 2.0,
        "terms.softmax_ce.weight": "1-rho",
        "terms.softmax_ce.rescale": False,
        "meta.every": 10,
        "meta.fraction": 0.1,
        "meta.inner_learning_rate": 1.0,  # Algorithm 1 as printed
        "meta.optimizer": "sgd",
        "meta.learning_rate": 1.0,
        "prior": prior,
        "alpha": 0.25 if prior == "weighted" else 1.0,
        "epsilon": 1.0 if prior == "relaxed" else 0.0,
        "epsilon_unit": "count",
    }
    assert {name: found[name] for name in expected} == expected
    assert {n for n in found if n.startswith("terms.")} <= expected.keys()


def test_the_hyper_parameters_of_the_paper_on_imagenet():
    found = flatten(imagenet())
    expected = {
        "model.name": "resnet18",
        "optim.epochs": 100,
        "optim.batch_size": 256,
        "optim.learning_rate": 0.1,
        "optim.momentum": 0.9,
        "optim.weight_decay": 1e-4,
        "optim.milestones": [30, 60, 80, 90],
        "optim.decay": 0.1,
        "terms.kd.weight": "rho",
        "terms.kd.temperature": 2.0,
        "terms.softmax_ce.weight": "1-rho",
        "terms.softmax_ce.rescale": False,
    }
    assert {name: found[name] for name in expected} == expected


def imagenet() -> ConfigDict:
    config = default_config()
    file = str(CONFIGS / "x.py")
    method_module(file, "il_baseline").configure(config, "imagenet")
    return resolve(config)


def configured(method: str, dataset: str, prior: str = "none") -> ConfigDict:
    config = default_config()
    config.prior, config.epsilon = prior, 1.0
    method_module(str(CONFIGS / "x.py"), method).configure(config, dataset)
    return resolve(config)


# As the authors' code runs them, but for the augmentation.
AUTHORS = {
    ("lucir", "cifar100"): {
        "model.name": "resnet32",
        "model.head": "cosine",
        "model.final_relu": False,
        "optim.epochs": 160,
        "optim.batch_size": 128,
        "optim.learning_rate": 0.1,
        "optim.milestones": [80, 120],
        "optim.weight_decay": 5e-4,
        "terms.less_forget.factor": 5.0,
        "terms.less_forget.weight": "sqrt(old/new)",
        "terms.margin_ranking.k": 2,
        "terms.margin_ranking.margin": 0.5,
        "finetune.epochs": 0,
    },
    ("lucir", "imagenet_subset"): {
        "model.name": "resnet18",
        "optim.epochs": 90,
        "optim.milestones": [30, 60],
        "optim.weight_decay": 1e-4,
        "terms.less_forget.factor": 10.0,
        "finetune.epochs": 0,
    },
    ("lucir", "imagenet"): {
        "optim.epochs": 90,
        "finetune.epochs": 20,
        "finetune.learning_rate": 0.01,
        "finetune.milestones": [10],
        "finetune.trainable": "head",
        "finetune.batch_norm": "eval",
    },
    ("podnet", "cifar100"): {
        "model.name": "podnet32",
        "model.head": "local_similarity",
        "model.proxies": 10,
        "optim.epochs": 160,
        "optim.batch_size": 128,
        "optim.learning_rate": 0.1,
        "optim.schedule": "cosine",
        "optim.weight_decay": 5e-4,
        "optim.clip": 5.0,
        "terms.nca.exact": False,
        "terms.pod_spatial.factor": 3.0,
        "terms.pod_flat.factor": 1.0,
        "terms.pod_flat.weight": "sqrt(seen/new)",
        "finetune.epochs": 20,
        "finetune.learning_rate": 0.05,
        "finetune.batch_norm": "train",
    },
    ("podnet", "imagenet_subset"): {
        "model.name": "podnet18",
        "optim.epochs": 90,
        "optim.batch_size": 64,
        "optim.learning_rate": 0.05,
        "optim.weight_decay": 5e-4,
        "terms.pod_spatial.factor": 8.0,
        "terms.pod_flat.factor": 10.0,
        "finetune.learning_rate": 0.01,
    },
    ("podnet", "imagenet"): {"optim.weight_decay": 1e-4, "finetune.epochs": 20},
}


@pytest.mark.parametrize(("method", "dataset"), AUTHORS)
def test_the_hyper_parameters_of_the_authors(method, dataset):
    found = flatten(configured(method, dataset))
    expected = AUTHORS[method, dataset]
    assert {name: found[name] for name in expected} == expected
    assert found["optim.freeze_old_rows"] and found["optim.momentum"] == 0.9
    own = {"lucir": "softmax_ce", "podnet": "nca"}[method]
    assert f"terms.{own}.weight" in found
    for prior in ("balanced", "weighted", "relaxed", "meta"):
        changed = flatten(configured(method, dataset, prior))
        assert changed["finetune.epochs"] == 0
        assert "terms.nca.weight" not in changed
        assert changed["terms.softmax_ce.weight"] == 1.0


@pytest.mark.parametrize("step", [0, 1])
def test_the_learning_rate_of_every_epoch(parity, step):
    vectors = parity("orders_and_schedules")
    none = np.zeros(0, np.int32)
    data = StepData("main", step, 0, 50, np.arange(300, dtype=np.int32), none, none, 0)
    for name, config in (
        ("cifar", resolve(get(load("cifar100"), ""))),
        ("imagenet", imagenet()),
    ):
        rates = loop.make_plan(config, data).learning_rates
        np.testing.assert_allclose(rates, vectors[f"lr_paper_{name}"], rtol=1e-12)
    for method, name in (
        ("lucir", "lr_lucir_cifar"),
        ("podnet", "lr_podnet_cifar_lagged"),
    ):
        config = configured(method, "cifar100")
        rates = loop.make_plan(config, data).learning_rates
        np.testing.assert_allclose(rates, vectors[name], rtol=1e-12, atol=1e-16)


def test_the_reduced_runs_differ_from_the_paper_in_size_only():
    paper = flatten(resolve(get(load("cifar100"), "prior=balanced")))
    reduced = flatten(resolve(get(load("cifar100_cpu"), "prior=balanced")))
    differing = {name for name in paper if paper[name] != reduced[name]}
    assert {"data.image_size", "data.max_per_class", "optim.epochs"} <= differing
    assert differing <= {
        "data.image_size",
        "data.padding",
        "data.max_per_class",
        "data.nominal_per_class",
        "memory.per_class",
        "model.name",
        "model.width",
        "optim.epochs",
        "optim.base_epochs",
        "optim.milestones",
        "optim.base_milestones",
    }
    assert reduced["data.nominal_per_class"] == reduced["data.max_per_class"]


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_data_set_of_a_method_is_refused(method):
    module = method_module(str(CONFIGS / "x.py"), method)
    with pytest.raises(ValueError, match="no settings for 'mnist'"):
        module.configure(default_config(), "mnist")


# The examples of docs/adding.md, as they stand there.


def examples(section: str) -> list[str]:
    """The Python code blocks of a section, in order."""
    text = (CONFIGS.parent / "docs" / "adding.md").read_text()
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", body, re.M | re.S)


def run_code(code: str, name: str = "example") -> dict:
    namespace = {"__name__": name}
    exec(compile(code, f"docs/adding.md ({name})", "exec"), namespace)
    return namespace


@pytest.fixture
def feature_distance(tmp_path, monkeypatch):
    """Puts the example of a loss term into the package, and gives its test."""
    term, test = examples("A loss term")
    (tmp_path / "feature_distance.py").write_text(term)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    yield test
    sys.modules.pop("bsce_jax.losses.feature_distance", None)
    if hasattr(losses, "feature_distance"):
        del losses.feature_distance


@pytest.fixture
def feature_baseline(tmp_path, monkeypatch):
    """The example of a method: its procedure put into the package, its configuration
    for the digits."""
    code, procedure = examples("A method")
    folder = tmp_path / "procedures"
    folder.mkdir()
    (folder / "feature_baseline.py").write_text(procedure)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    config = get(load("digits"), "prior=balanced")
    run_code(code)["configure"](config, "digits")
    yield config
    sys.modules.pop("bsce_jax.methods.feature_baseline", None)


def test_the_documented_loss_term_passes_its_documented_test(feature_distance):
    tests = run_code(feature_distance)
    tests["test_feature_distance_equals_the_formula"]()


@pytest.mark.parametrize("prior", PRIORS)
def test_the_documented_method_resolves_for_every_prior(
    feature_distance, feature_baseline, prior
):
    feature_baseline.prior, feature_baseline.epsilon = prior, 1.0
    config = resolve(feature_baseline)
    assert config.name == f"digits-feature_baseline-{config.name.split('-')[2]}-5steps"
    message = "feature_distance.scal is unknown; known: weight, factor, scale"
    with config.unlocked():
        config.terms.feature_distance.scal = 1.0
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_the_documented_procedure_sets_the_new_rows(feature_distance, feature_baseline):
    head = {"kernel": np.ones((3, 5), np.float32), "bias": np.ones(5, np.float32)}
    found = methods.module("feature_baseline").begin(
        head, [np.ones((4, 3)), np.ones((4, 3))], 2, np.random.default_rng(0)
    )
    np.testing.assert_array_equal(found["bias"], [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(found["kernel"], np.tile([1, 1, 0, 0, 1], (3, 1)))
    np.testing.assert_array_equal(head["kernel"], 1)
    feature_baseline.model.head = "cosine"
    with pytest.raises(UserError, match="model.head='cosine': expected linear for"):
        resolve(feature_baseline)


def test_the_documented_loss_term_enters_the_loss_after_the_base_step(
    feature_distance, feature_baseline, monkeypatch
):
    """One update by the real programs: L = CE + rho 0.1 |f - f_teacher|^2."""
    feature_baseline.update_from_flattened_dict({"data.padding": 0, "prior": "none"})
    config = resolve(feature_baseline)
    monkeypatch.setattr(programs, "build_model", lambda *_: TinyNet(CLASSES))
    built = programs.build(config, parallel.create("jit", jax.devices()[:1]), CLASSES)
    state, context, data = example("float32")
    weights = {"softmax_ce": np.float32(1), "feature_distance": np.float32(0.4)}
    prior = np.where(context.seen, 0, log_prior.EXCLUDED).astype(np.float32)
    context = context.replace(weights=weights, log_prior=prior)

    def loss(step, context):
        planned = plan(step=step, train=np.arange(9, dtype=np.int32), batch_size=9)
        placed = parallel.replicate(built.parallel, (state, context, data))
        images = feed.Resident(built.parallel, placed[2])
        _, metrics = loop.call(built, *placed[:2], images, planned, 0, 1)
        return float(metrics["loss"][0])

    images = (data.images[:9].astype(np.float32) / 255 - 0.5) / 0.5
    apply = jax.jit(TinyNet(CLASSES).apply, static_argnames=("train", "mutable"))
    student = {"params": state.params, "batch_stats": state.batch_stats}
    (z, out), _ = apply(student, images, train=True, mutable="batch_stats")
    _, teacher = apply(context.teachers[0], images, train=False)
    z = np.asarray(z, float)[:, : context.seen.sum()]
    ce = np.log(np.exp(z).sum(axis=1)) - z[np.arange(9), data.labels[:9]]
    distance = np.asarray(out["features"] - teacher["features"], float)
    expected = ce.mean() + 0.4 * 0.1 * (distance**2).sum(axis=1).mean()
    np.testing.assert_allclose(loss(1, context), expected, rtol=1e-5)
    assert abs(expected - ce.mean()) > 1e-4
    without = loss(0, context.replace(teachers=()))
    np.testing.assert_allclose(without, ce.mean(), rtol=1e-5)


def test_the_documented_data_set_is_prepared_and_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    builder, config = examples("A data set")
    images, labels = run_code(builder, "__main__")["load"]("train")
    assert capsys.readouterr().out.strip().endswith("stripes/1.0.0")
    (tmp_path / "stripes.py").write_text(config)
    (tmp_path / "methods").symlink_to(CONFIGS / "methods")
    module = load(tmp_path / "stripes")
    found = dataset_module.load(resolve(get(module, "prior=meta,seed=3")))
    assert found.class_names == ("1 pixel", "2 pixels", "3 pixels", "4 pixels")
    assert found.groups == (range(2), range(2, 3), range(3, 4))
    np.testing.assert_array_equal(found.images_per_class, [20] * 4)
    key = operator.methodcaller("tobytes")
    pairs = {(key(i), int(n)) for i, n in zip(images, labels, strict=True)}
    read = zip(found.train.images, found.train_labels, strict=True)
    assert {(key(i), int(n)) for i, n in read} == pairs


def test_the_documented_network_keeps_the_contract():
    code, branch = examples("A network")
    create = "def create(name, num_classes, width, head, dtype, conv_chunks):\n"
    module = types.SimpleNamespace(**run_code(code))
    scope = {"convnet": module, "_dtype": models._dtype}
    exec(create + branch, scope)
    network = scope["create"]("convnet", 7, 4, "linear", "float32", 2)
    assert network == module.ConvNet(7, 4, dtype=jnp.dtype("float32"), conv_chunks=2)
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
