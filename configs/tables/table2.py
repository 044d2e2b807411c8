"""Table 2 of Jodelet et al.: ImageNet in 10 groups of 100 classes, no larger base step.

A fixed budget of 20 000 exemplars. One run gives all columns: top-1 and top-5 as
averages over the groups, and top-1 after the last group. The arguments are explained
in table1.py. LUCIR on ImageNet has balanced fine-tuning unless it is switched off.
"""

_SCENARIO = {
    "steps": 10,
    "config.scenario.base_classes": 0,
    "config.memory.kind": "fixed",
    "config.memory.budget": 20000,
}
COLUMNS = {
    "top1": ("imagenet", _SCENARIO),
    "top5": ("imagenet", _SCENARIO),
    "final": ("imagenet", _SCENARIO),
}
ROWS = {
    "icarl": {"method": "icarl", "prior": "none"},
    "eeil": {"method": "eeil", "prior": "none"},
    "bic": {"method": "bic", "prior": "none"},
    "ssil": {"method": "ss_il", "prior": "none"},
    "il_baseline": {"method": "il_baseline", "prior": "none"},
    "il_baseline_balanced": {"method": "il_baseline", "prior": "balanced"},
    "il_baseline_meta": {"method": "il_baseline", "prior": "meta"},
    "lucir": {"method": "lucir", "prior": "none"},
    "lucir_without_finetuning": {
        "method": "lucir",
        "prior": "none",
        "config.phase.finetune.epochs": 0,
    },
    "lucir_balanced": {"method": "lucir", "prior": "balanced"},
    "podnet": {"method": "podnet", "prior": "none"},
    "podnet_balanced": {"method": "podnet", "prior": "balanced"},
}
