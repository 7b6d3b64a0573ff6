"""Source files out of Debian's packages, through apt as the machine is set up; no root, nothing is installed.

A package that is there already is not asked for again, so that a run that goes on reads the same files.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.quality_languages.languages import Language

_RECORD = "packages.json"


class PackagesError(Exception):
    """Packages could not be had, or are no longer the ones that were."""


@dataclass(frozen=True, slots=True)
class Package:
    """One package as downloaded."""

    name: str
    version: str
    file: str
    sha256: str


def fetch(directory: Path, names: Sequence[str]) -> list[Package]:
    """Download and unpack what `directory` does not have yet, by name.

    Raises:
        PackagesError: apt or dpkg refuse, or a file is not the one that was recorded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    record = directory / _RECORD
    if not record.exists():
        _run(["apt-get", "download", *names], directory)
        found = sorted((_described(deb) for deb in directory.glob("*.deb")), key=lambda p: p.name)
        _write_whole(record, json.dumps([asdict(one) for one in found], indent=1))
    packages = [Package(**one) for one in json.loads(record.read_text(encoding="utf-8"))]
    missing = set(names) - {one.name for one in packages}
    if missing:
        raise PackagesError(f"{record} lacks {', '.join(sorted(missing))}: remove it")
    for package in packages:
        _unpack(directory, package)
    return packages


def sources(directory: Path, language: Language) -> Iterator[tuple[str, str]]:
    """(path in its package, text) of the language's files as `fetch` left them, in an order of no meaning.

    The order depends on paths alone. Files that are not UTF-8 are left out.
    """
    paths = {
        str(path.relative_to(directory)): path
        for name in language.packages
        for path in _unpacked(directory, name).rglob("*")
        if path.suffix in language.suffixes and path.is_file() and not path.is_symlink()
    }
    for name in sorted(paths, key=lambda one: hashlib.sha256(one.encode()).digest()):
        try:
            yield name, paths[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def _unpacked(directory: Path, name: str) -> Path:
    return directory / "unpacked" / name


def _unpack(directory: Path, package: Package) -> None:
    deb, target = directory / package.file, _unpacked(directory, package.name)
    if not deb.exists() or _sha256(deb) != package.sha256:
        raise PackagesError(f"{deb} is not the package of {directory / _RECORD}: remove both")
    if not target.exists():
        part = target.with_name(f"{package.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        _run(["dpkg", "-x", str(deb), str(part)], directory)
        part.rename(target)


def _described(deb: Path) -> Package:
    name, version = _run(
        ["dpkg-deb", "--show", "--showformat=${Package}\n${Version}", deb.name], deb.parent
    ).splitlines()
    return Package(name, version, deb.name, _sha256(deb))


def _run(command: Sequence[str], directory: Path) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PackagesError(f"{command[0]} is not here: this needs a Debian-like system") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PackagesError(f"{' '.join(command[:2])}: {last} (has `apt-get update` been run?)")
    return done.stdout


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
