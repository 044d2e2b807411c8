"""Figure 4 of Jodelet et al.: Relaxed BalancedS-CE by epsilon, without memory.

LUCIR and PODNet on CIFAR-100, 5 steps. epsilon is in percent of the images of a class,
from 0 (BalancedS-CE) to 100 (nearly the softmax); 0.2 is the run of Table 3. The
arguments are explained in table1.py. The values are ours, chosen for the figure's axis,
which is linear up to 0.1 and logarithmic above.
"""

_EPSILONS = (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
COLUMNS = {
    f"epsilon-{epsilon}": ("cifar100", {"steps": 5, "memory": 0, "epsilon": epsilon})
    for epsilon in _EPSILONS
}
_RELAXED = {"prior": "relaxed", "config.epsilon_unit": "percent"}
ROWS = {
    "lucir": {"method": "lucir", **_RELAXED},
    "podnet": {"method": "podnet", **_RELAXED},
}
