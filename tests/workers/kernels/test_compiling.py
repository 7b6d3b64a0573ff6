"""The kernels compile for the GPU they are meant for. No GPU is needed for that, and nothing is run on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_BYTES = 227 << 10  # what one program may have on Hopper


def test_kernels_compile_for_an_h200_with_its_matrix_unit_and_without_spilling() -> None:
    root = Path(__file__).resolve().parents[3]
    script = Path(__file__).with_name("compile_for_hopper.py")
    said = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    for name, facts in found.items():
        assert facts["shared_bytes"] <= SHARED_BYTES, name
        # float32, which has no matrix unit, may put some numbers aside: it is there to be exact.
        assert facts["spilled_bytes"] <= (1024 if "float32" in name else 0), name
    for name in ("stacked rows, 128", "weight mode"):
        assert found[name]["warpgroup_instructions"] > 0, name
    for name in ("stacked rows, 16", "stacked rows, 128", "weight mode", "dots, 32"):
        assert found[name]["matrix_instructions"] > 0, name
        assert found[name]["asynchronous_copies"] > 0, f"{name}: loads wait for one another"
