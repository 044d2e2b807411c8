"""Whatever is put into a field, an option of a term or of a method.

It is refused in one line that names it, or it is a configuration that can be planned.
"""

import inspect
import math
import pathlib
import pkgutil
import time

import pytest
from ml_collections import ConfigDict

from bsce_jax import losses, methods
from bsce_jax.config import terms
from bsce_jax.config.fields import FIELDS, PHASE, default_config
from bsce_jax.config.files import method_module
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.run.base_hash import base_hash
from bsce_jax.run.phases import configured
from tests.phase_example import dataset

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
DATA = dataset([8] * 6, base=2, steps=2)
HOSTILE = [
    *(None, True, False, 0, -1, 1, 10**30, 10**400, 0.5, -0.0, 1e-50, 1e30, 1e300),
    *(math.nan, math.inf, -math.inf),
    *("", "x", "../x", "/etc/passwd", "a\nb", "\0", "é", "名", "1e400", "nan", "0"),
    *("y" * 10**5, b"x", [], [1], {}, {"a": 1}),
    *((), (1,), (0,), (-1,), (math.nan, 1.0), (10**400,), ("x",), (1.0,) * 10**4),
    *((True,), (None,), ((1,),), (0.0, 0.0, 0.0), (1e30, 1.0, 1.0)),
]
NAMES = [
    *(name for name, field in FIELDS.items() if name != "phase"),
    *(f"phase.{phase}.{name}" for phase in ("base", "incremental") for name in PHASE),
]


def options() -> list[tuple[str, str]]:
    """(term, option) of every loss that is a term, weight and factor included."""
    found = []
    for module in pkgutil.iter_modules(losses.__path__):
        term = getattr(terms.module(module.name), "term", None)
        if term is not None:
            own = [
                p.name
                for p in inspect.signature(term).parameters.values()
                if p.kind is inspect.Parameter.KEYWORD_ONLY
            ]
            found += [(module.name, name) for name in ("weight", "factor", *own)]
    return found


def settings() -> list[tuple[str, str]]:
    known = [found.name for found in pkgutil.iter_modules(methods.__path__)]
    return [(name, option) for name in known for option in methods.options(name)]


def example(method: str = "il_baseline") -> ConfigDict:
    config = default_config()
    config.scenario.base_classes, config.scenario.steps = 2, 2
    config.memory.per_class = 4
    config.options = ConfigDict(methods.options(method))
    method_module(str(CONFIGS / "x.py"), method).configure(config, "digits")
    return config


def put(config: ConfigDict, name: str, value: object) -> ConfigDict:
    """The configuration with one value, past ConfigDict's own checks."""
    values = config.to_dict()
    *sections, last = name.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[last] = value
    return ConfigDict(values)


def check(name: str, value: object, method: str = "il_baseline") -> bool:
    """Whether it was refused; either way at once, and never with a traceback."""
    started = time.monotonic()
    try:
        config = resolve(put(example(method), name, value))
        phases = configured(config)
        assert phases and base_hash(config, DATA)
        refused = False
    except UserError as error:
        (message,) = error.args
        assert message.startswith("config.") and "\n" not in message, message
        assert len(message) < 2000
        assert name in message or name.rpartition(".")[0] in message, message
        refused = True
    assert time.monotonic() - started < 2, value
    return refused


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fields(name):
    """Each refuses something, and what it lets pass can be planned."""
    refused = [check(name, value) for value in HOSTILE]
    assert sum(refused) > len(HOSTILE) / 4


@pytest.mark.slow
@pytest.mark.parametrize(("term", "option"), options())
def test_options_of_terms(term, option):
    def given(value):
        config = example("lucir" if term in ("nca", "margin_ranking") else "geodl")
        config.terms[term] = ConfigDict({"weight": 1.0})
        config.model.auxiliary = 4 if term == "rotation_ce" else 0
        name = f"terms.{term}.{option}"
        try:
            resolve(put(config, name, value))
        except UserError as error:
            (message,) = error.args
            assert f"config.terms.{term}." in message, message
            assert "\n" not in message
            return True
        return False

    assert sum(map(given, HOSTILE)) > len(HOSTILE) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("method", "option"), settings())
def test_settings_of_methods(method, option):
    name = f"options.{option}"
    refused = [check(name, value, method) for value in HOSTILE]
    assert sum(refused) > len(HOSTILE) / 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("terms.kd.temperature", 0.0),
        ("terms.kd.temperature", -1.0),
        ("terms.kd.weight", -0.5),
        ("optim.clip", 1e-46),
        ("alpha", 1e39),
        ("epsilon", 1e39),
        ("data.std", (0.2, 0.0, 0.2)),
        ("data.std", (1e30, 1.0, 1.0)),
        ("data.mean", (0.5, 0.5)),
        ("phase.base.epochs", 10**30),
        ("optim.batch_size", 10**7),
        ("model.width", 10**9),
        ("data.padding", 10**9),
        ("model.conv_chunks", 10**9),
        ("data.resize", 10**7),
    ],
)
def test_values_that_make_a_run_meaningless(name, value):
    with pytest.raises(UserError, match=f"^config.{name}="):
        resolve(put(example(), name, value))


def test_a_phase_whose_weights_are_all_zero_is_refused():
    config = example()
    config.terms = ConfigDict({name: {"weight": 0.0} for name in config.terms})
    with pytest.raises(UserError, match="config.phase.base: all weights of its terms"):
        resolve(config)
