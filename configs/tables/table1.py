"""Table 1 of Jodelet et al.: a base step of half of the classes, 20 exemplars a class.

Average incremental accuracy of every method with and without BalancedS-CE. A column is
a configuration file with arguments, a row more arguments; a key that starts with
"config." is an override of that field. Keys are those of
bsce_jax/report/published.json. TPCIL's row is run by what is known of it, TPCIL-like.
"""

COLUMNS = {
    "cifar100-5": ("cifar100", {"steps": 5, "memory": 20}),
    "cifar100-10": ("cifar100", {"steps": 10, "memory": 20}),
    "cifar100-25": ("cifar100", {"steps": 25, "memory": 20}),
    "imagenet_subset-5": ("imagenet_subset", {"steps": 5, "memory": 20}),
    "imagenet_subset-10": ("imagenet_subset", {"steps": 10, "memory": 20}),
    "imagenet_subset-25": ("imagenet_subset", {"steps": 25, "memory": 20}),
    "imagenet-5": ("imagenet", {"steps": 5, "memory": 20}),
    "imagenet-10": ("imagenet", {"steps": 10, "memory": 20}),
    "imagenet-5-final": ("imagenet", {"steps": 5, "memory": 20}),
}
ROWS = {
    "icarl": {"method": "icarl", "prior": "none"},
    "bic": {"method": "bic", "prior": "none"},
    # Reported and run by the paper's authors: here one and the same run.
    "lucir_reported": {"method": "lucir", "prior": "none"},
    "mnemonics": {"method": "mnemonics", "prior": "none"},
    "lucir_dde": {"method": "lucir_dde", "prior": "none"},
    "podnet_reported": {"method": "podnet", "prior": "none"},
    "podnet_dde": {"method": "podnet_dde", "prior": "none"},
    "tpcil": {"method": "tpcil_like", "prior": "none"},
    "il_baseline": {"method": "il_baseline", "prior": "none"},
    "il_baseline_balanced": {"method": "il_baseline", "prior": "balanced"},
    "il_baseline_meta": {"method": "il_baseline", "prior": "meta"},
    "lucir": {"method": "lucir", "prior": "none"},
    "lucir_balanced": {"method": "lucir", "prior": "balanced"},
    "podnet": {"method": "podnet", "prior": "none"},
    "podnet_balanced": {"method": "podnet", "prior": "balanced"},
}
