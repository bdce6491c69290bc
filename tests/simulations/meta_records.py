"""Records of made-up runs that measured few-shot curves and sequences of tasks."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulations.continual_metrics import References, continual_metrics
from tests.simulations.records import made_up_record

# method, shots: accuracy after so many steps
CURVES = {
    ("melpa", 5): {0: 0.3, 1: 0.5, 5: 0.62},
    ("shared_tuned", 5): {0: 0.2, 1: 0.25, 5: 0.45},
    ("dense_lora", 5): {0: 0.1, 5: 0.4},
    ("melpa", 20): {0: 0.35, 1: 0.6, 5: 0.7},
    ("shared_tuned", 20): {0: 0.2, 1: 0.4, 5: 0.71},
}
R = {
    "none": [[0.9, 0.2, 0.1], [0.5, 0.8, 0.2], [0.3, 0.4, 0.9]],
    "ewc:10": [[0.9, 0.2, 0.1], [0.8, 0.7, 0.2], [0.7, 0.6, 0.8]],
}


def with_curves(quality: str = "accuracy") -> dict[str, Any]:
    """The made-up record with these points, backwards, as methods of a run whose rows are `base` and `dsa_t2`."""
    record = made_up_record()
    usual = record["methods"]["dsa_t2"]
    rows = ["base", "dsa_t2"]
    record["config"]["evaluate"] = {"methods": rows}
    record["config"]["gate"]["reward"] = {"quality": {"name": quality}}
    record["methods"] = {name: record["methods"][name] | {"quality": 0.25} for name in rows}
    for (method, shots), points in CURVES.items():
        for steps, value in reversed(points.items()):
            name = f"{method}[shots={shots},steps={steps}]"
            record["methods"][name] = usual | {"mean": value + 1, "se": 0.01, "quality": value}
            record["comparisons"].append(record["comparisons"][0] | {"a": "base", "b": name})
    return record


def made_up_continual(quality: str = "accuracy") -> dict[str, Any]:
    """`continual` of a record: one user's matrices above, their figures by `continual_metrics`."""
    before, alone, joint = (np.full((1, 3), value) for value in (0.1, 0.95, 0.9))
    rules = {}
    for name, r in R.items():
        metrics = continual_metrics(np.array([r]), References(before, alone, joint))
        means = {figure: {"mean": float(value_u[0]), "se": 0.01} for figure, value_u in metrics.items()}
        means["steps_to_target"] = {"mean": 7.25, "se": float("nan")}
        kept = 0.0 if name == "none" else 4096.0
        rules[name] = {
            "r": [list(row) for row in r],
            "before": [0.1] * 3,
            "metrics": means,
            "bytes_per_user": kept,
            "diverged": 1,
        }
    joint_entry = {"quality": [0.9] * 3, "metrics": {"acc": {"mean": 0.9, "se": 0.02}}, "diverged": 0}
    sizes = {"tasks": 3, "steps": 10, "users": 12, "groups": 4}
    return {"quality": quality, **sizes, "rules": rules, "references": {"joint": joint_entry}}
