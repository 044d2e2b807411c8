"""Table 3 of Jodelet et al.: no memory, a base step of half of the classes.

Average incremental accuracy. The arguments are explained in table1.py. The paper's
epsilon is 0.2 % of the images of a class: 1 on CIFAR-100, 2.6 on ImageNet and its
subset.
"""

COLUMNS = {
    "cifar100-5": ("cifar100", {"steps": 5, "memory": 0}),
    "cifar100-10": ("cifar100", {"steps": 10, "memory": 0}),
    "imagenet_subset-5": ("imagenet_subset", {"steps": 5, "memory": 0}),
    "imagenet_subset-10": ("imagenet_subset", {"steps": 10, "memory": 0}),
    "imagenet-5": ("imagenet", {"steps": 5, "memory": 0}),
    "imagenet-10": ("imagenet", {"steps": 10, "memory": 0}),
}
_RELAXED = {"prior": "relaxed", "epsilon": 0.2, "config.epsilon_unit": "percent"}
ROWS = {
    "spb": {"method": "spb", "prior": "none"},
    "spb_i": {"method": "spb_i", "prior": "none"},
    "spb_m": {"method": "spb_m", "prior": "none"},
    "dde": {"method": "lucir_dde", "prior": "none"},
    "ncm": {"method": "ncm", "prior": "none"},
    "slda": {"method": "slda", "prior": "none"},
    "lucir": {"method": "lucir", "prior": "none"},
    "lucir_balanced": {"method": "lucir", "prior": "balanced"},
    "lucir_relaxed": {"method": "lucir", **_RELAXED},
    "podnet": {"method": "podnet", "prior": "none"},
    "podnet_balanced": {"method": "podnet", "prior": "balanced"},
    "podnet_relaxed": {"method": "podnet", **_RELAXED},
}
