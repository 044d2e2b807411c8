"""Table 5 of Jodelet et al.: IL-Baseline with a fixed alpha (Eq. 5) and with Meta.

CIFAR-100, 5 and 10 steps, 20 exemplars a class: accuracy on the base classes and on all
classes after the last step, and average incremental accuracy, all of one run. The
arguments are explained in table1.py. alpha = 1 is BalancedS-CE, the run of Table 1.
"""

_STEPS_5 = ("cifar100", {"steps": 5, "memory": 20})
_STEPS_10 = ("cifar100", {"steps": 10, "memory": 20})
COLUMNS = {
    "5-final_base": _STEPS_5,
    "5-final": _STEPS_5,
    "5-average": _STEPS_5,
    "10-final_base": _STEPS_10,
    "10-final": _STEPS_10,
    "10-average": _STEPS_10,
}
ROWS = {
    "alpha-0.1": {"method": "il_baseline", "prior": "weighted", "alpha": 0.1},
    "alpha-0.25": {"method": "il_baseline", "prior": "weighted", "alpha": 0.25},
    "alpha-0.5": {"method": "il_baseline", "prior": "weighted", "alpha": 0.5},
    "alpha-1.0": {"method": "il_baseline", "prior": "balanced"},
    "meta": {"method": "il_baseline", "prior": "meta"},
}
