"""What every benchmark's command line has."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from benchmarks.results_file import use_cores
from workers.config import EngineSettings
from workers.large_pages import with_large_pages


def parser_of(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser of `--base`, `--rounds` and `--threads`, to be read by `parse`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="a model directory")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def add_runner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runner", choices=["auto", "hf", "native"], default="auto")


def parse(
    parser: argparse.ArgumentParser, beside: Mapping[str, str] = MappingProxyType({})
) -> argparse.Namespace:
    """The command line; from now on this process computes with `--threads` threads on as many cores.

    Begins the process anew where it was begun without the large pages that served engines have, or without what else
    is to be in its environment.
    """
    arguments = parser.parse_args()
    environment = with_large_pages({**os.environ, **beside})
    if environment != dict(os.environ):
        os.execve(sys.executable, sys.orig_argv, environment)
    use_cores(arguments.threads)
    arguments.base = arguments.base.expanduser()
    return arguments


def engine_settings(arguments: argparse.Namespace) -> EngineSettings:
    """An engine's defaults, with the runner asked for."""
    return EngineSettings(runner=arguments.runner)
