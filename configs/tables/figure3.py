"""Figure 3 of Jodelet et al.: LUCIR without memory, ImageNet-Subset, 5 steps.

Accuracy on the base classes after the base step, and after the last step on all, on
the base and on the later classes, with the softmax, with BalancedS-CE and with the
Relaxed one: three runs of Table 3. The arguments are explained in table1.py.
"""

_SUBSET = ("imagenet_subset", {"steps": 5, "memory": 0})
COLUMNS = dict.fromkeys(("base_step", "final", "final_base", "final_later"), _SUBSET)
ROWS = {
    "lucir": {"method": "lucir", "prior": "none"},
    "lucir_balanced": {"method": "lucir", "prior": "balanced"},
    "lucir_relaxed": {
        "method": "lucir",
        "prior": "relaxed",
        "epsilon": 0.2,
        "config.epsilon_unit": "percent",
    },
}
