"""Adapters on source code of eight languages: FLoRA beside LoRA, IA3 and the base model, by held-out loss.

The paper's first table in miniature. Two jobs of many adapters in one trainer each, without Ray: the first tries
learning rates in two languages, the second trains every kind in every language at its best rate; further seeds follow
in jobs of their own. Source comes from Debian's packages through apt. Everything is kept in `--directory`: the same
command goes on after a kill. The result is written anew whenever state is, and says so while it is partial.

    python -m benchmarks.quality_languages --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path

import torch

from benchmarks.command import parse
from benchmarks.quality_languages.contest import SEARCHED_IN, Sizes, rows_of
from benchmarks.quality_languages.languages import LANGUAGES
from benchmarks.quality_languages.packages import Package, fetch, sources
from benchmarks.quality_languages.study import Findings, Study
from benchmarks.quality_languages.windows import Counts, Parts, split
from benchmarks.results_file import Row, print_rows, write_result
from training.frozen_base import FrozenBase
from workers.large_pages import kept_memory
from workers.models.loading import LoadedBase, load_base

CLAIM = (
    "On source code of languages that few models know well, FLoRA gains on the base model what LoRA gains, and more "
    "than IA3; 32 adapters of four kinds are trained in one job"
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_parts(directory: Path, base: LoadedBase, sizes: Sizes) -> dict[str, Parts]:
    """Windows of every language; the same ones whenever the packages are the same."""

    def encode(text: str) -> list[int]:
        tokens: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    return {
        language.name: split(
            sources(directory, language),
            language,
            encode,
            window=sizes.window + 1,
            counts=sizes.counts,
        )
        for language in LANGUAGES
    }


def main() -> None:
    arguments = _parse()
    sizes = Sizes(
        window=arguments.window,
        steps=arguments.steps,
        search_tokens=arguments.search_tokens,
        search_steps=arguments.search_steps,
        counts=Counts(held_out=arguments.held_out),
    )
    directory = arguments.directory.expanduser()
    loaded = load_base(
        str(arguments.base), _DTYPES[arguments.dtype], torch.device(arguments.device)
    )
    packages = fetch(
        directory / "packages", [name for language in LANGUAGES for name in language.packages]
    )
    parts = read_parts(directory / "packages", loaded, sizes)
    base = FrozenBase.adopt(loaded, max_tokens=sizes.window + 1)
    told: list[Row] = []

    def found(findings: Findings) -> None:
        told[:] = rows_of(findings.seeds, sizes.steps)
        path = write_result(
            "quality_languages",
            CLAIM,
            told,
            seed=0,
            workload=_workload(findings, sizes, arguments, packages, parts),
        )
        print("wrote", path.name, told[0].name, f"{told[0].value:.3f}", flush=True)

    study = Study(
        base,
        parts,
        sizes,
        directory,
        arguments.save_every,
        arguments.max_step_tokens,
        tell=lambda line: print(line, flush=True),
    )
    study.run(arguments.seeds, found)
    print_rows(told)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = Sizes()
    parser.add_argument("--base", type=Path, required=True, help="a model directory")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("~/.cache/flora/quality_languages"),
        help="packages and state",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the frozen base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--window", type=int, default=sizes.window, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=sizes.steps)
    parser.add_argument("--search-tokens", type=int, default=sizes.search_tokens)
    parser.add_argument("--search-steps", type=int, default=sizes.search_steps)
    parser.add_argument("--held-out", type=int, default=sizes.counts.held_out, help="windows")
    parser.add_argument("--save-every", type=int, default=5, help="steps")
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    return parse(parser, kept_memory())


def _workload(
    findings: Findings,
    sizes: Sizes,
    arguments: argparse.Namespace,
    packages: list[Package],
    parts: Mapping[str, Parts],
) -> dict[str, object]:
    step = min(losses.step for losses in findings.seeds)
    return {
        "partial": None if step == sizes.steps else f"step {step} of {sizes.steps}",
        "seeds": len(findings.seeds),
        "seeds_asked": arguments.seeds,
        "dtype": arguments.dtype,
        "sizes": asdict(sizes),
        "step": "one window per adapter and step, every token learnt; linear schedule, a tenth of it warm-up",
        "adapters_together": len(parts) * len(findings.rates),
        "searched_in": SEARCHED_IN,
        "searched_mean_loss": {
            kind: {f"{rate:g}": loss if isfinite(loss) else None for rate, loss in losses.items()}
            for kind, losses in findings.searched.items()
        },
        "learning_rates": dict(findings.rates),
        "packages": [asdict(one) for one in packages],
        "windows_sha256": {language: part.digest for language, part in parts.items()},
    }


if __name__ == "__main__":
    main()
