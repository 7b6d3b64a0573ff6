"""A training job's driver on a Ray that is not this test process's: `python -m tests.training.driver_process FILE`.

The file is JSON: `cluster` (`LocalCluster`), `settings` (`JobSettings`), `spec` (the path of one) and `job_id`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cli.local_cluster import LocalCluster
from training.job_settings import JobSettings
from training.ray_train import run_training
from training.spec_file import read_spec


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    cluster = LocalCluster(**told["cluster"])
    cluster.connect()
    try:
        result = run_training(
            read_spec(Path(told["spec"])),
            JobSettings.model_validate(told["settings"]),
            lambda event: None,
            job_id=told["job_id"],
        )
    finally:
        cluster.disconnect()
    sys.exit(None if result.is_success else f"{result.error} {result.failed}")


if __name__ == "__main__":
    main()
