"""Made-up results of a run, with no training."""

from typing import Any

import numpy as np

from bsce_jax.report import results


def make_results(
    name: str = "digits il_baseline balanced",
    seed: int = 0,
    base: int = 4,
    increment: int = 2,
    steps: int = 2,
    learned_alpha: bool = False,
    learned_own: bool = False,
    memory: bool = True,
    finished: int | None = None,
) -> dict[str, Any]:
    """A valid results file of `steps` incremental steps, `finished` of them done."""
    rng = np.random.default_rng(seed)
    total = base + increment * steps
    done = steps if finished is None else finished
    records = []
    for step in range(done + 1):
        old = 0 if step == 0 else base + increment * (step - 1)
        seen = base + increment * step
        confusion = rng.integers(0, 6, (seen, seen)) + 20 * np.eye(seen, dtype=int)
        confusion[0, 1:] = 0  # zeros are left out of the triples
        accuracy = 100.0 * np.diag(confusion) / confusion.sum(axis=1)
        starts = [0, *range(base, seen, increment), seen]
        records.append(
            {
                "step": step,
                "result": {
                    "num_old": old,
                    "num_seen": seen,
                    "train_images": 10 * (seen - old) + 3 * old,
                    "memory_images": 3 * old,
                    "counts": [3] * old + [10] * (seen - old),
                    "top1": float(accuracy.mean()),
                    "top5": None if seen < 6 else float(accuracy.mean() / 2 + 50),
                    "top1_base": float(accuracy[:base].mean()),
                    "top1_old": float(accuracy[:old].mean()) if step else None,
                    "top1_new": float(accuracy[old:].mean()),
                    "top1_by_task": [
                        float(accuracy[a:b].mean())
                        for a, b in zip(starts, starts[1:], strict=False)
                    ],
                    "top1_nearest_mean": 70.0 + step if memory else None,
                    "phases": {
                        "incremental" if step else "base": {
                            "loss": [1.5, 0.1 + rng.random()],
                            "accuracy": [50.0, 90.0],
                        }
                    },
                    "alpha": [[10, 0.9], [20, rng.random()]]
                    if learned_alpha and step
                    else [],
                    "own": {"scale": 0.5 * step, "shift": -0.25}
                    if learned_own and step
                    else {},
                    "parameters_sha256": f"{step:064x}",
                },
                "telemetry": {"seconds": 1.5 * step, "compiles": {"base_update": 1}},
            }
        )
    records[-1]["result"]["confusion"] = [
        [int(i), int(j), int(confusion[i, j])] for i, j in np.argwhere(confusion)
    ]
    return {
        "schema": results.SCHEMA,
        "name": name,
        "status": "done" if done == steps else "running",
        "config": {"seed": seed, "phase.base.epochs": 2, "method": name},
        "config_hash": f"hash{seed}",
        "base_hash": "base",
        "class_names": [f"class {i}" for i in range(total)],
        "class_order": [int(i) for i in rng.permutation(total)],
        "image_shape": [8, 8, 1],
        "data": {},
        "steps": records,
        "summary": results.summary(records),
    }
