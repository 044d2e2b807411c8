"""Every field of a run's configuration, declared once.

A configuration file starts from `default_config()` and changes fields; the command
line changes them again (`--config.optim.batch_size=64`). What is checked, what is
hashed, `--help` and docs/configuration.md all follow from FIELDS and PHASE.
`config.resolve` resolves and validates the outcome.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from bsce_jax.config import sections
from bsce_jax.config.declare import Field, refusal
from bsce_jax.errors import UserError

RUN = {
    "name": Field(
        "", "Label in reports; '' = data set, method, prior and steps.", hashed=False
    ),
    "seed": Field(
        0,
        "Initialisation, data order, augmentation and random selections.",
        least=0,
        most=2**31 - 1,
        base=True,
    ),
    "method": Field(
        "il_baseline", "Its procedure in bsce_jax/methods; its losses are in `terms`."
    ),
    "options": Field({}, "Settings of the method: OPTIONS of its module, by name."),
    "prior": Field(
        "none",
        "Log-prior added to the logits in training (Jodelet et al., Eq. 3, 5 and 6): "
        "none (softmax), balanced, weighted (fixed alpha), meta, relaxed.",
        choices={
            "none": "softmax cross-entropy",
            "balanced": "BalancedS-CE, Eq. 3",
            "weighted": "alpha-weighted, Eq. 5",
            "meta": "Meta, Algorithm 1: alpha learned",
            "relaxed": "Relaxed, Eq. 6",
        },
    ),
    "alpha": Field(
        1.0,
        "weighted: factor of the old classes' counts (Eq. 5).",
        least=1e-12,
        most=1e12,
    ),
    "epsilon": Field(
        None,
        "relaxed: weight of every old class (Eq. 6); where none is given, the "
        "paper's, 0.2 percent. 0 without a memory only.",
        least=0,
        most=1e12,
    ),
    "epsilon_unit": Field(
        "count",
        "Unit of epsilon: images, or percent of data.nominal_per_class.",
        choices=("count", "percent"),
    ),
    "classification": Field(
        "auto",
        "auto: the method's own classification loss, whose place softmax_ce takes "
        "where there is a prior; or softmax_ce, or (without a prior) "
        "separated_softmax_ce.",
        choices=("auto", "softmax_ce", "separated_softmax_ce"),
    ),
    "short": Field(
        1,
        "Divides the epochs and milestones of every phase, rounded down but not below "
        "1: the same protocol in less time; 1 = whole.",
        least=1,
        most=100_000,
        base=True,
    ),
    "init_from": Field(
        "",
        "Workdir of another run whose base step is taken over.",
        hashed=False,
        longest=4000,
    ),
    "parallel": Field(
        "jit", "jit (over a mesh of all devices) or pmap.", choices=("jit", "pmap")
    ),
    # Hashed: XLA:CPU has another convolution for loops, so that one update a call and
    # several round differently.
    "updates_per_call": Field(
        0,
        "Updates in one compiled call; 0 = 1 on CPU and with streamed images, else 50.",
        least=0,
        most=10_000,
    ),
    "matmul_precision": Field(
        "default",
        "Of products on accelerators; highest is float32, default TF32 on a GPU.",
        choices=("default", "high", "highest"),
        base=True,
    ),
    "deterministic": Field(False, "GPU: only reproducible kernels (slower)."),
    "gpu_graphs": Field(
        "auto",
        "GPU: what of a call XLA launches as one CUDA graph. default: what XLA does; "
        "convolutions: these too; whole: all of it; concurrent: all of it, kernels "
        "side by side; auto: the fastest, timed for up to a minute at the first call.",
        choices=("auto", "default", "convolutions", "whole", "concurrent"),
        hashed=False,
    ),
    "print_plan": Field(
        False, "Print what would run, per step, and stop.", hashed=False
    ),
    "log_seconds": Field(
        60.0,
        "Interval of log lines where there is no terminal.",
        least=0,
        most=1e6,
        hashed=False,
    ),
    "compile_cache": Field(
        True,
        "Keep compiled programs in JAX_COMPILATION_CACHE_DIR or, those of a run of one "
        "process, in ~/.cache/bsce_jax.",
        hashed=False,
    ),
}

LOSSES = {
    "terms": Field(
        {},
        "Loss terms: name of a module in bsce_jax/losses -> weight, factor and "
        "options. A weight is a number or one of terms.WEIGHTS (rho = old classes / "
        "seen classes); factor (1 where it is not given) multiplies it.",
    ),
    "phases": Field(
        ("base", "incremental"),
        "Names of the sections of `phase`, in the order in which they run.",
    ),
}

# The fields of each section phase.<name>.
PHASE = {
    "steps": Field(
        "later",
        "base: the phase is part of the base step; later: of every incremental step.",
        choices=("base", "later"),
    ),
    "images": Field(
        "training",
        "What it learns from. training: the step's training set; held_out: the "
        "balanced held-out split (Meta's), which is then taken out of training; "
        "exemplars: those of all classes seen, chosen before the phase begins. "
        "Without a memory a phase on the last two does not run.",
        choices=("training", "held_out", "exemplars"),
    ),
    "when_prior": Field(
        "any",
        "none: the phase does not exist where there is a prior, whose balanced loss "
        "takes its place.",
        choices=("any", "none"),
    ),
    "epochs": Field(
        0, "Passes over its images; 0: the phase does not exist.", least=0, most=100_000
    ),
    "batch_size": Field(
        0, "Images of a batch; 0 = optim.batch_size.", least=0, most=2**17
    ),
    "learning_rate": Field(0.1, "In the first epoch.", least=0, most=1e4),
    "schedule": Field(
        "step",
        "step (milestones), or cosine (to 0, one epoch behind, as PODNet's authors "
        "run it).",
        choices=("step", "cosine"),
    ),
    "milestones": Field((), "step: epochs at which the rate is multiplied by decay."),
    "decay": Field(0.1, "See milestones.", least=0, most=1),
    "by_step": Field(
        "constant",
        "1/step: the rate is divided by the number of the step, counted from 1.",
        choices=("constant", "1/step"),
    ),
    "sampling": Field(
        "uniform",
        "Images of an incremental step with exemplars. uniform: each once an epoch; "
        "memory: as many old as new ones, drawn with replacement; class: as many of "
        "every class. Log-priors count the training set whatever is drawn from it.",
        choices=("uniform", "memory", "class"),
    ),
    "replay": Field(
        0,
        "SS-IL: exemplars in each batch of an incremental step, beside batch_size new "
        "images; an epoch is then a pass over the new images. 0: exemplars are images "
        "like the others.",
        least=0,
        most=2**17,
    ),
    "beside": Field(
        "",
        "A second stream of images. memory: exemplars of the old classes, in batches "
        "of beside_size; companions: with each image of a batch beside_size others of "
        "the epoch, which the method chooses and only the student sees (DDE).",
        choices=("", "memory", "companions"),
    ),
    "beside_size": Field(
        0,
        "See beside: images a batch, or with each image; 0 = none.",
        least=0,
        most=2**17,
    ),
    "terms": Field(
        {},
        "Nothing: all of `terms`; else name -> weight, a number or a named one: only "
        "those terms, with that weight. Their factor and options stay as they are in "
        "`terms`.",
    ),
    "rate.convolutions": Field(
        1.0,
        "Factor of the learning rate of the network's other parameters; 0 = frozen, "
        "here and below.",
        least=0,
        most=1e6,
    ),
    "rate.kernel_scales": Field(
        1.0, "Likewise, the kernels' factors (model.kernel_scales).", least=0, most=1e6
    ),
    "rate.batch_norms": Field(
        1.0, "Likewise, BatchNorm's parameters.", least=0, most=1e6
    ),
    "rate.head": Field(1.0, "Likewise, the head's rows.", least=0, most=1e6),
    "rate.scale": Field(1.0, "Likewise, the head's learned scale.", least=0, most=1e6),
    "rate.auxiliary": Field(1.0, "Likewise, the auxiliary branch.", least=0, most=1e6),
    "rate.own": Field(
        1.0, "Likewise, what a method trains besides the network.", least=0, most=1e6
    ),
    "rows": Field(
        "seen",
        "Rows of the head that move; new: those of the old classes stay.",
        choices=("seen", "new"),
    ),
    "batch_norm": Field(
        "train",
        "train: statistics of the batch, running ones go on; eval: running ones.",
        choices=("train", "eval"),
    ),
    "augment": Field(True, "Images are augmented; else they are as in evaluation."),
    "teacher": Field(
        "before",
        "before: the network before the step; now: a copy taken as the phase begins.",
        choices=("before", "now", "none"),
    ),
    "forward": Field(
        "", "Function of the method's module that makes outputs; '' = the network's."
    ),
    "begin": Field(
        "",
        "Function of the method's module that changes the network as the phase "
        "begins, when the exemplars of the new classes are chosen; '' = none.",
    ),
    "optimizer": Field(
        "new",
        "new: momentum starts anew; kept: it goes on from the phase before.",
        choices=("new", "kept"),
    ),
}


def _of_section(name: str, fields: Mapping[str, Field]) -> dict[str, Field]:
    return {f"{name}.{field}": declared for field, declared in fields.items()}


# By dotted name; those of the phases are in PHASE.
FIELDS: dict[str, Field] = {
    **RUN,
    **_of_section("data", sections.DATA),
    **_of_section("scenario", sections.SCENARIO),
    **_of_section("memory", sections.MEMORY),
    **_of_section("model", sections.MODEL),
    **LOSSES,
    **_of_section("optim", sections.OPTIM),
    **_of_section("meta", sections.META),
    **_of_section("evaluation", sections.EVALUATION),
    **_of_section("checkpoint", sections.CHECKPOINT),
}


def find(name: str) -> Field | None:
    """The field of a dotted name, also of a phase; None where there is none.

    A name inside a section of free names, such as terms.kd.weight, belongs to it.
    """
    if name in FIELDS:
        return FIELDS[name]
    section, _, rest = name.partition(".")
    if section in FIELDS and isinstance(FIELDS[section].default, dict):
        return FIELDS[section]
    _, _, of_phase = rest.partition(".")
    if section != "phase":
        return None
    return PHASE.get(of_phase) or PHASE.get(of_phase.partition(".")[0])


def default_config() -> ConfigDict:
    """Returns every field at its default: CIFAR-100, IL-Baseline, softmax (CE)."""
    config = _build(FIELDS)
    long = {"epochs": 250, "milestones": (100, 150, 200)}
    config.phase = ConfigDict()
    config.phase.base = phase(steps="base", teacher="none", **long)
    config.phase.incremental = phase(**long)
    return config


def phase(**changes: Any) -> ConfigDict:
    """A section of `config.phase`: every field of a phase at its default, but these.

    Args:
      **changes: fields of PHASE; `rate` is a dict or ConfigDict of some groups, or see
        `only`, and `terms` one of weights.

    Raises:
      UserError: an unknown name, or a value of a wrong type.
    """
    section = _build(PHASE)
    for name, value in changes.items():
        if isinstance(value, ConfigDict):
            value = value.to_dict()
        if name == "rate" and isinstance(value, Mapping):
            for group, factor in value.items():
                _set(section.rate, group, factor, "rate.")
        elif name == "terms" and isinstance(value, Mapping):
            section.terms = ConfigDict(value)
        else:
            _set(section, name, value, "")
    return section


def only(**rates: float) -> dict[str, float]:
    """Factors of the learning rate for `phase(rate=...)`: all others are frozen."""
    groups = [name.partition(".")[2] for name in PHASE if name.startswith("rate.")]
    return {**dict.fromkeys(groups, 0.0), **rates}


def _set(section: ConfigDict, name: str, value: Any, prefix: str) -> None:
    """Sets a field of a phase."""
    if name not in section or isinstance(section[name], ConfigDict):
        if prefix + name in {field.partition(".")[0] for field in PHASE}:
            raise UserError(f"phase({prefix}{name}={value!r}): expected a dict")
        names = ", ".join(section)
        raise UserError(f"phase({prefix}{name}=...) is unknown; known: {names}")
    want = PHASE[prefix + name].default
    if wrong := refusal(value, want):
        raise UserError(f"phase({prefix}{name}={value!r}): expected {wrong}")
    section[name] = value


def _build(fields: Mapping[str, Field]) -> ConfigDict:
    """A configuration of defaults."""
    config = ConfigDict()
    for name, field in fields.items():
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            if parent not in section:
                section[parent] = ConfigDict()
            section = section[parent]
        if field.default is None:
            section[last] = config_dict.placeholder(float)
        elif isinstance(field.default, dict):
            section[last] = ConfigDict()
        else:
            section[last] = field.default
    return config
