"""vLLM's CPU build as a process that answers JSON lines: what `benchmarks.engine` compares our engine with.

Run by the interpreter of vLLM's own environment, so it imports nothing of ours. Orders come on stdin, one answer each
goes to stdout; vLLM's own words go to stderr.

    {"op": "load", "base": DIR, "adapters": {NAME: PEFT DIR}}   → {"threads", "cpus", "versions"}
    {"op": "run", "requests": [[PROMPT TOKENS, NAME or null]], "answer_tokens": N}
                                                                → {"seconds", "answers": [[TOKENS]]}

Without adapters vLLM compiles its model; with adapters it does not, so a load without them is its fastest base model.
Everything that is not a size is vLLM's default.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

MAX_SEQUENCES = 32
MAX_SEQUENCE_TOKENS = 256


class Peer:
    """One vLLM engine, loaded once."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._adapters: dict[str, Any] = {}

    def load(self, base: str, adapters: dict[str, str], max_rank: int) -> dict[str, Any]:
        """Start vLLM; says how many threads its worker computes with, on which CPUs."""
        import torch
        import transformers
        import vllm
        from vllm.lora.request import LoRARequest

        lora = {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_cpu_loras": len(adapters),
            "max_lora_rank": max_rank,
        }
        self._engine = vllm.LLM(
            base,
            dtype="bfloat16",
            max_num_seqs=MAX_SEQUENCES,
            max_model_len=MAX_SEQUENCE_TOKENS,
            **(lora if adapters else {}),
        )
        self._adapters = {
            name: LoRARequest(name, number, path)
            for number, (name, path) in enumerate(adapters.items(), start=1)
        }
        [(threads, cpus)] = self._engine.collective_rpc(_threads_and_cpus)
        versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        return {"threads": threads, "cpus": cpus, "versions": versions}

    def run(self, requests: list[tuple[list[int], str | None]], answer_tokens: int) -> Any:
        """Answer all requests as one batch, greedily, each with exactly `answer_tokens` tokens."""
        import vllm

        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        adapters = [None if name is None else self._adapters[name] for _, name in requests]
        began = time.perf_counter()
        outputs = self._engine.generate(
            prompts,
            sampling,
            lora_request=adapters if self._adapters else None,
            use_tqdm=False,
        )
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "answers": [list(one.outputs[0].token_ids) for one in outputs],
        }


def _threads_and_cpus(worker: Any) -> tuple[int, list[int]]:
    """Runs in vLLM's worker process."""
    import os
    from pathlib import Path

    import torch

    # Each of its threads is bound to a core of its own.
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    cpus = {cpu for thread in threads for cpu in os.sched_getaffinity(thread)}
    return torch.get_num_threads(), sorted(cpus)


def main() -> None:
    # vLLM and what it starts print to file descriptor 1; the answers' way is kept apart.
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer()
    for line in sys.stdin:
        order = json.loads(line)
        op = order.pop("op")
        answer = peer.load(**order) if op == "load" else peer.run(**order)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
