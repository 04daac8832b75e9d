"""Descriptions as MLflow's page shows them: the result first, numbers as in the table of `evaluate`."""

from trainer.registry import descriptions


def row(label, metric, mean, *, is_model=True, gain=None, p_value=None, protocol="full"):
    given = None if gain is None else {"gain": gain[0], "relative_gain": gain[1]}
    return {
        "label": label,
        "protocol": protocol,
        "metric": metric,
        "mean": mean,
        "is_model": is_model,
        "gain": given,
        "p_value": p_value,
    }


ROWS = [
    row("none", "NDCG@10", 0.2),
    row("popularity", "NDCG@10", 0.21, is_model=False, gain=(0.01, 0.05)),
    row("deep", "NDCG@10", 0.25, gain=(0.05, 0.25), p_value=0.0004),
    row("none", "MRR", 0.3),
    row("popularity", "MRR", 0.1, is_model=False, gain=(-0.2, -2 / 3)),
    row("deep", "MRR", 0.4, gain=(0.1, 1 / 3), p_value=0.02),
    row("deep", "NDCG@10", 0.5, protocol="uniform-100"),
]


def test_results_begin_with_the_best_and_set_models_before_baselines():
    lines = descriptions.results(ROWS, notes="Gate: passed.", picture="small-gains.png").splitlines()
    assert lines[0] == (
        "Best model: deep, NDCG@10 0.2500, +25.0 % over from scratch; best simple baseline: popularity, 0.2100."
    )
    cells = [[cell.strip().removeprefix("&ensp;") for cell in line.split("|")[1:-1]] for line in lines[2:7]]
    assert cells == [
        ["model", "NDCG@10", "gain", "p", "MRR"],
        [":--", "--:", "--:", "--:", "--:"],
        ["none (from scratch)", "0.2000", "", "", "0.3000"],
        ["deep", "0.2500", "+25.0 %", "<0.001", "0.4000"],
        ["*popularity*", "0.2100", "+5.0 %", "", "0.1000"],
    ]
    assert lines[-3:] == ["Gate: passed.", "", "![gains over from-scratch](artifact:small-gains.png)"]


def test_metrics_of_results_are_named_by_protocol_metric_and_label():
    found = descriptions.result_metrics(ROWS, "test")
    assert found == {
        "test/full/NDCG@10/none": 0.2,
        "test/full/NDCG@10/popularity": 0.21,
        "test/full/NDCG@10/deep": 0.25,
        "test/full/NDCG@10/gain/deep": 0.05,
        "test/full/NDCG@10/p/deep": 0.0004,
        "test/full/MRR/none": 0.3,
        "test/full/MRR/popularity": 0.1,
        "test/full/MRR/deep": 0.4,
        "test/uniform-100/NDCG@10/deep": 0.5,
    }


def test_an_outcome_is_one_line():
    metrics = {"validation/NDCG@10": 0.12345, "best_epoch": 3, "epochs": 5, "seconds": 61.4}
    assert descriptions.outcome(metrics, "NDCG@10") == "Validation NDCG@10 0.1235 in epoch 3 of 5, 61 s."
