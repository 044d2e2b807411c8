"""Table 4 of Jodelet et al.: IL-Baseline on CIFAR-100, 5 steps, by exemplars a class.

Average incremental accuracy. The arguments are explained in table1.py. Meta with one
exemplar a class is no run, here (a configuration error) as in the paper: it holds out
one exemplar of each class.
"""

COLUMNS = {
    "memory-1": ("cifar100", {"steps": 5, "memory": 1}),
    "memory-5": ("cifar100", {"steps": 5, "memory": 5}),
    "memory-10": ("cifar100", {"steps": 5, "memory": 10}),
    "memory-20": ("cifar100", {"steps": 5, "memory": 20}),
    "memory-50": ("cifar100", {"steps": 5, "memory": 50}),
}
ROWS = {
    "il_baseline": {"method": "il_baseline", "prior": "none"},
    "il_baseline_balanced": {"method": "il_baseline", "prior": "balanced"},
    "il_baseline_meta": {"method": "il_baseline", "prior": "meta"},
}
