from __future__ import annotations

import os
import subprocess
import sys

from workers.large_pages import kept_memory, with_large_pages


def test_large_pages_are_asked_for_unless_the_user_has_tunables_of_their_own() -> None:
    assert with_large_pages({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert with_large_pages({"GLIBC_TUNABLES": "mine"}) == {"GLIBC_TUNABLES": "mine"}


_FAULTS = """
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(32 << 20)
before = faults()
for _ in range(20):
    bytearray(32 << 20)
print(faults() - before)
"""


def test_a_training_process_takes_freed_memory_again() -> None:
    """32 MiB made and freed again and again: the system gives its pages once."""

    def counted(environment: dict[str, str]) -> int:
        told = subprocess.run(
            [sys.executable, "-c", _FAULTS],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(told.stdout)

    assert counted(kept_memory()) < 200 < counted({"GLIBC_TUNABLES": ""})
