"""Every configuration file, and the paper's hyper-parameters."""

import importlib.util
import itertools
import pathlib
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from bsce_jax.config import default_config, method_module
from bsce_jax.config.hashes import flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.run import phases

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
        config.prior, config.seed = prior, seed
        config = resolve(config)
        assert config.prior == prior and config.seed == seed
        assert config.scenario.steps == (steps if "steps" in known else 5)
        assert prior in config.name
        assert config.phases == ("base", "incremental", "finetune")
        assert config.phase.base.epochs > 0 and config.phase.incremental.epochs > 0
        assert (config.epsilon is None) == (prior != "relaxed")
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
        value = 0.5 if default is None else default
        value += "x" if isinstance(default, str) else 1
        value = "meta" if argument == "prior" else value
        prior = {"alpha": "prior=weighted", "epsilon": "prior=relaxed"}.get(argument)
        given = ",".join(filter(None, [prior, f"{argument}={value}"]))
        before, after = flatten(get(module, prior or "")), flatten(get(module, given))
        differing = {k for k in before if before[k] != after[k]}
        assert len(differing) == 1 and after[differing.pop()] == value, argument


def test_without_memory():
    module = load("cifar100")
    config = resolve(get(module, "memory=0,prior=relaxed"))
    assert config.memory.kind == "none" and config.memory.per_class == 0
    assert (config.epsilon, config.epsilon_unit) == (0.2, "percent")
    config = resolve(get(module, "memory=0,prior=relaxed,epsilon=1"))
    assert (config.epsilon, config.epsilon_unit) == (1.0, "count")
    config = resolve(get(module, "memory=0,prior=relaxed,epsilon=0"))
    assert (config.epsilon, config.epsilon_unit) == (0.0, "count")
    with pytest.raises(UserError, match="config.prior='meta'.*memory.kind"):
        resolve(get(module, "memory=0,prior=meta"))


def trained(
    epochs: int,
    milestones: list[int] | None = None,
    learning_rate: float = 0.1,
    schedule: str = "step",
) -> dict[str, object]:
    """The fields of a training that is the same in the base step and in the others."""
    fields = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "milestones": milestones or [],
        "decay": 0.1,
        "by_step": "constant",
        "images": "training",
        "batch_norm": "train",
        "augment": True,
        "optimizer": "new",
        "forward": "",
    }
    names = ("base", "incremental")
    return {f"phase.{p}.{n}": value for p in names for n, value in fields.items()}


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
        "optim.batch_size": 128,
        "optim.momentum": 0.9,
        "optim.weight_decay": 2e-4,
        "optim.clip": 0.0,
        **trained(epochs=250, milestones=[100, 150, 200]),
        "phase.incremental.rows": "seen",
        "phase.incremental.sampling": "uniform",
        "phase.finetune.epochs": 0,
        "terms.kd.weight": "rho",
        "terms.kd.temperature": 2.0,
        "terms.softmax_ce.weight": "1-rho",
        "terms.softmax_ce.rescale": False,
        "meta.every": 10,
        "meta.fraction": 0.1,
        "meta.inner_learning_rate": 1.0,  # a choice: Algorithm 1 gives none
        "meta.optimizer": "sgd",
        "meta.learning_rate": 1.0,
        "prior": prior,
        "alpha": 0.25 if prior == "weighted" else 1.0,
        "epsilon": 1.0 if prior == "relaxed" else None,
        "epsilon_unit": "count",
    }
    assert {name: found[name] for name in expected} == expected
    assert {n for n in found if n.startswith("terms.")} <= expected.keys()


def test_the_hyper_parameters_of_the_paper_on_imagenet():
    found = flatten(imagenet())
    expected = {
        "model.name": "resnet18",
        "optim.batch_size": 256,
        "optim.momentum": 0.9,
        "optim.weight_decay": 1e-4,
        **trained(epochs=100, milestones=[30, 60, 80, 90]),
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
    config.prior = prior
    method_module(str(CONFIGS / "x.py"), method).configure(config, dataset)
    return resolve(config)


# What fine-tuning trains: the head's rows on the exemplars, without a prior.
FINETUNE = {
    "phase.finetune.steps": "later",
    "phase.finetune.images": "exemplars",
    "phase.finetune.when_prior": "none",
    "phase.finetune.schedule": "step",
    "phase.finetune.decay": 0.1,
    "phase.finetune.teacher": "before",
    "phase.finetune.rows": "seen",
    "phase.finetune.rate.head": 1.0,
    "phase.finetune.rate.convolutions": 0.0,
    "phase.finetune.rate.batch_norms": 0.0,
    "phase.finetune.rate.scale": 0.0,
    "phase.finetune.rate.own": 0.0,
}
# As the authors' code runs them, but for the augmentation.
AUTHORS = {
    ("lucir", "cifar100"): {
        "model.name": "resnet32",
        "model.head": "cosine",
        "model.final_relu": False,
        "optim.batch_size": 128,
        "optim.weight_decay": 5e-4,
        "optim.clip": 0.0,
        "terms.less_forget.factor": 5.0,
        "terms.less_forget.weight": "sqrt(old/new)",
        "terms.margin_ranking.k": 2,
        "terms.margin_ranking.margin": 0.5,
        **trained(epochs=160, milestones=[80, 120]),
        "phase.finetune.epochs": 0,
    },
    ("lucir", "imagenet_subset"): {
        "model.name": "resnet18",
        "optim.weight_decay": 1e-4,
        "terms.less_forget.factor": 10.0,
        **trained(epochs=90, milestones=[30, 60]),
        "phase.finetune.epochs": 0,
    },
    ("lucir", "imagenet"): {
        **trained(epochs=90, milestones=[30, 60]),
        "phase.finetune.epochs": 20,
        "phase.finetune.learning_rate": 0.01,
        "phase.finetune.milestones": [10],
        "phase.finetune.batch_norm": "eval",
    },
    ("podnet", "cifar100"): {
        "model.name": "podnet32",
        "model.head": "local_similarity",
        "model.proxies": 10,
        "optim.batch_size": 128,
        "optim.weight_decay": 5e-4,
        "optim.clip": 5.0,
        "terms.nca.exact": False,
        "terms.pod_spatial.factor": 3.0,
        "terms.pod_flat.factor": 1.0,
        "terms.pod_flat.weight": "sqrt(seen/new)",
        **trained(epochs=160, schedule="cosine"),
        "phase.finetune.epochs": 20,
        "phase.finetune.learning_rate": 0.05,
        "phase.finetune.milestones": [],
        "phase.finetune.batch_norm": "train",
    },
    ("podnet", "imagenet_subset"): {
        "model.name": "podnet18",
        "optim.batch_size": 64,
        "optim.weight_decay": 5e-4,
        "terms.pod_spatial.factor": 8.0,
        "terms.pod_flat.factor": 10.0,
        **trained(epochs=90, schedule="cosine", learning_rate=0.05),
        "phase.finetune.learning_rate": 0.01,
    },
    ("podnet", "imagenet"): {
        "optim.weight_decay": 1e-4,
        "phase.finetune.epochs": 20,
    },
}


@pytest.mark.parametrize(("method", "dataset"), AUTHORS)
def test_the_hyper_parameters_of_the_authors(method, dataset):
    found = flatten(configured(method, dataset))
    expected = AUTHORS[method, dataset] | FINETUNE
    assert {name: found[name] for name in expected} == expected
    rows = [found[f"phase.{name}.rows"] for name in ("base", "incremental")]
    assert rows == ["seen", "new"] and found["optim.momentum"] == 0.9
    own = {"lucir": "softmax_ce", "podnet": "nca"}[method]
    assert f"terms.{own}.weight" in found
    for prior in ("balanced", "weighted", "relaxed", "meta"):
        changed = flatten(configured(method, dataset, prior))
        assert changed["phase.finetune.epochs"] == 0
        assert "terms.nca.weight" not in changed
        assert changed["terms.softmax_ce.weight"] == 1.0


def test_the_fine_tuning_of_il_baseline_is_lucir_s_but_switched_off():
    for dataset in ("cifar100", "imagenet", "digits"):
        ours = configured("il_baseline", dataset).phase.finetune.to_dict()
        assert ours.pop("epochs") == 0
        theirs = configured("lucir", dataset).phase.finetune.to_dict()
        assert ours == {k: v for k, v in theirs.items() if k != "epochs"}


@pytest.mark.parametrize("step", [0, 1])
def test_the_learning_rate_of_every_epoch(parity, step):
    vectors = parity("orders_and_schedules")
    for name, config in (
        ("lr_paper_cifar", resolve(get(load("cifar100"), ""))),
        ("lr_paper_imagenet", imagenet()),
        ("lr_lucir_cifar", configured("lucir", "cifar100")),
        ("lr_podnet_cifar_lagged", configured("podnet", "cifar100")),
    ):
        (phase,) = phases.of_step(phases.configured(config), step, exemplars=0)
        rates = phase.learning_rates(step)
        np.testing.assert_allclose(rates, vectors[name], rtol=1e-12, atol=1e-16)


def test_the_reduced_runs_differ_from_the_paper_in_size_only():
    paper = flatten(resolve(get(load("cifar100"), "prior=balanced")))
    reduced = flatten(resolve(get(load("cifar100_cpu"), "prior=balanced")))
    differing = {name for name in paper if paper[name] != reduced[name]}
    lengths = {
        f"phase.{phase}.{name}"
        for phase in ("base", "incremental")
        for name in ("epochs", "milestones")
    }
    assert {"data.image_size", "data.max_per_class", *lengths} <= differing
    assert differing <= {
        "data.image_size",
        "data.padding",
        "data.max_per_class",
        "data.nominal_per_class",
        "memory.per_class",
        "model.name",
        "model.width",
        "optim.noise_epochs",  # read where there is noise
        *lengths,
    }
    assert reduced["data.nominal_per_class"] == reduced["data.max_per_class"]


def test_the_reduced_runs_shorten_what_is_longer_and_nothing_else():
    reduced = load("cifar100_cpu")
    found = {}
    for method in METHODS:
        config = resolve(get(reduced, f"method={method},prior=none"))
        for name, phase in config.phase.items():
            found[method, name] = phase.epochs, phase.milestones
    assert found["eeil", "base"] == (40, (20, 30))
    assert found["eeil", "incremental"] == (20, (10, 15))
    assert found["eeil", "balanced"] == (20, (7, 14))
    assert found["bic", "bias"] == (40, (20, 30))
    # One pass over the images teaches Mnemonics' exemplars, as at full size.
    assert found["mnemonics", "exemplars"] == (1, ())
    assert found["mnemonics", "base_exemplars"] == (1, ())


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_data_set_of_a_method_is_refused(method):
    module = method_module(str(CONFIGS / "x.py"), method)
    with pytest.raises(ValueError, match="no settings for 'mnist'"):
        module.configure(default_config(), "mnist")
