"""Names of metrics, as settings have them: checked before anything is read."""

import difflib

_RANKING = tuple(f"{name}@{k}" for name in ("NDCG", "Recall", "F1", "HR") for k in (1, 5, 10))
METRICS = (*_RANKING, "MRR", "accuracy", "macro-F1", "AUC", "user AUC", "log loss", "calibration error")


def known_metric(name: str) -> str:
    """The name; what stands before a slash says what the metric is of. Raises ValueError for one that no task has."""
    before, slash, metric = name.rpartition("/")
    if metric in METRICS:
        return name
    near = difflib.get_close_matches(metric, METRICS, 1)
    mend = f"did you mean {before}{slash}{near[0]}?" if near else "mend the name"
    raise ValueError(f"expected a metric ({', '.join(METRICS)}), found {name!r}; {mend}")
