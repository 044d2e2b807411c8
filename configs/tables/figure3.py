"""Figure 3 of Jodelet et al.: LUCIR without memory, ImageNet-Subset, 5 steps.

Accuracy on all classes and on the base classes after the last step, with the softmax
and with BalancedS-CE: two runs of Table 3. The arguments are explained in table1.py.
"""

_SUBSET = ("imagenet_subset", {"steps": 5, "memory": 0})
COLUMNS = {"final": _SUBSET, "final_base": _SUBSET}
ROWS = {
    "lucir": {"method": "lucir", "prior": "none"},
    "lucir_balanced": {"method": "lucir", "prior": "balanced"},
}
