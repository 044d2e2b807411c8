"""Figure 5 of Jodelet et al.: BalancedS-CE and Meta BalancedS-CE, one run each.

Accuracy on all classes after the last step. The arguments are explained in table1.py.
The setting is taken to be that of Table 5: IL-Baseline on CIFAR-100, 5 steps, 20
exemplars a class.
"""

COLUMNS = {"final": ("cifar100", {"steps": 5, "memory": 20})}
ROWS = {
    "il_baseline_balanced": {"method": "il_baseline", "prior": "balanced"},
    "il_baseline_meta": {"method": "il_baseline", "prior": "meta"},
}
