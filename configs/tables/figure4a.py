"""Figure 4 of Jodelet et al., panel a: LUCIR w/ Relaxed BalancedS-CE by epsilon.

Without memory, CIFAR-100 and ImageNet-Subset, 5 and 10 steps: average incremental
accuracy, and accuracy on the base and on the latest classes after the last step, all of
one run. epsilon is in percent of the images of a class, from 0 (BalancedS-CE) to 100
(nearly the softmax); 0.2 is the run of Table 3. The arguments are explained in
table1.py. The values are ours, chosen for the figure's axis, which is linear up to 0.1
and logarithmic above.
"""

_EPSILONS = (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
COLUMNS = {
    f"{dataset}-{steps}-{shown}": (dataset, {"steps": steps, "memory": 0})
    for dataset in ("cifar100", "imagenet_subset")
    for steps in (5, 10)
    for shown in ("average", "base", "latest")
}
ROWS = {
    f"epsilon-{epsilon}": {
        "method": "lucir",
        "prior": "relaxed",
        "epsilon": epsilon,
        "config.epsilon_unit": "percent",
    }
    for epsilon in _EPSILONS
}
