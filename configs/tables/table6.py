"""Table 6 of Jodelet et al.: other ways to mitigate the imbalance, on IL-Baseline.

CIFAR-100, 5 steps, 20 exemplars a class, average incremental accuracy. The arguments
are explained in table1.py. The paper does not give the settings of balanced
fine-tuning; those here are LUCIR's.
"""

COLUMNS = {"average": ("cifar100", {"steps": 5, "memory": 20})}
_SOFTMAX = {"method": "il_baseline", "prior": "none"}
ROWS = {
    "il_baseline": _SOFTMAX,
    "memory_oversampling": {**_SOFTMAX, "config.phase.incremental.sampling": "memory"},
    "class_oversampling": {**_SOFTMAX, "config.phase.incremental.sampling": "class"},
    "loss_rescaling": {**_SOFTMAX, "config.terms.softmax_ce.rescale": True},
    "balanced_finetuning": {
        **_SOFTMAX,
        "config.phase.finetune.epochs": 20,
        "config.phase.finetune.learning_rate": 0.01,
        "config.phase.finetune.milestones": (10,),
    },
    "separated_softmax": {
        **_SOFTMAX,
        "config.classification": "separated_softmax_ce",
        "config.phase.incremental.sampling": "memory",
    },
    "balanced": {"method": "il_baseline", "prior": "balanced"},
    "meta": {"method": "il_baseline", "prior": "meta"},
}
