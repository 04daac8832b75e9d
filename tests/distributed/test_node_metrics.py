"""System metrics of all nodes come to the one run, though only its process has a way to the store."""

from mlflow import MlflowClient

from tests.fixtures.ranks import start_ranks

SCRIPT = """
import os, time
from pathlib import Path
from trainer.config import PretrainConfig, RuntimeConfig, TrackingConfig
from trainer.parallel.distributed import join, leave
from trainer.tracking import start_run

world = join(RuntimeConfig(device="cpu"))
if not world.first:
    os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"  # nobody answers there
with start_run(TrackingConfig(system_metrics_seconds=0.2), name="both", resolved=PretrainConfig()) as run:
    logged = set()
    log_metrics = run.log_metrics
    run.log_metrics = lambda values, step=None: (log_metrics(values, step=step), logged.update(values))
    seen = False
    while not seen:
        time.sleep(0.1)
        seen = world.of_first("system/node_1/cpu_utilization_percentage" in logged)
leave()
"""


def test_every_node_is_sampled(tmp_path):
    processes = start_ranks(tmp_path, "-c", SCRIPT, nodes=True)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said == ["", ""]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("graftrec").experiment_id])
    names = {name.split("/")[1] for name in run.data.metrics if name.startswith("system/")}
    assert names == {"node_0", "node_1"}
    history = client.get_metric_history(run.info.run_id, "system/node_1/disk_usage_percentage")
    assert [metric.step for metric in history] == list(range(len(history)))
