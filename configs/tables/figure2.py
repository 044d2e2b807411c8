"""Figure 2 of Jodelet et al.: confusion matrices after the last step.

IL-Baseline with the softmax; with BalancedS-CE it is in Figure 5. The arguments are
explained in table1.py. The setting is taken to be that of Table 5: CIFAR-100, 5 steps,
20 exemplars a class.
"""

COLUMNS = {"final": ("cifar100", {"steps": 5, "memory": 20})}
ROWS = {
    "il_baseline": {"method": "il_baseline", "prior": "none"},
}
