"""The GPU benchmark's own check, interpreted, in a process like the one a user starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a machine that only checks kernels need not have.
WITHOUT = (
    "import sys; sys.modules.update(dict.fromkeys(('pydantic', 'ray', 'boto3', 'transformers')));"
    "sys.argv[1:] = ['--check', '--interpret', '--seeds', '2'];"
    "from benchmarks.gpu import main; main()"
)


def test_the_check_passes_with_torch_and_triton_alone() -> None:
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "2 mixes are as defined" in said.stdout
    assert "weight mode: error" in said.stdout


def test_a_wrong_kernel_fails_the_check() -> None:
    wrong = WITHOUT.replace(
        "from benchmarks.gpu import main;",
        "import os; os.environ['TRITON_INTERPRET'] = '1'; import workers.kernels.product as product;"
        "product.dot_add_rows = lambda dots, *_: dots.zero_();"
        "right = product.stacked_rows; product.stacked_rows = lambda *a: right(*a) * 1.1;"
        "from benchmarks.gpu import main;",
    )
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", wrong],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1, said.stdout + said.stderr
    assert "WRONG" in said.stdout
