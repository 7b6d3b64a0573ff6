"""The comparison on source code leaks nothing from training to judging, and a kill changes no number of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.quality_languages.contest import (
    BARS,
    KINDS,
    SEARCHED_IN,
    Losses,
    Sizes,
    best_rates,
    contest_runs,
    rows_of,
    search_losses,
    search_runs,
)
from benchmarks.quality_languages.languages import LANGUAGES, Language
from benchmarks.quality_languages.packages import Package, PackagesError, fetch, sources
from benchmarks.quality_languages.resumable_job import OtherJobError, ResumableJob
from benchmarks.quality_languages.study import Findings, Study
from benchmarks.quality_languages.windows import (
    SHARED_RUN,
    Counts,
    Parts,
    TooLittleSourceError,
    cleaned,
    split,
)
from tests.training.tiny_jobs import VOCABULARY, tiny_base

BY_NAME = {language.name: language for language in LANGUAGES}
TINY = Sizes(window=8, steps=4, search_tokens=6, search_steps=2, counts=Counts(6, 2, 2))


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def tiny_parts(languages: Sequence[str] = SEARCHED_IN) -> dict[str, Parts]:
    """Windows of counting by another stride for every language."""

    def windows(stride: int, starts: range) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(3 + (start + stride * i) % (VOCABULARY - 3) for i in range(TINY.window + 1))
            for start in starts
        )

    return {
        name: Parts(
            windows(number + 1, range(6)),
            windows(number + 1, range(6, 8)),
            windows(number + 1, range(8, 10)),
        )
        for number, name in enumerate(languages)
    }


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("Perl", "#!/usr/bin/perl\n# (c) somebody\n\nuse strict;\n__END__\n=head1 LICENSE\n"),
        ("Ruby", "# frozen_string_literal: true\n=begin\nMIT licence\n=end\nuse strict;\n"),
        ("Lua", "--[[ one\ntwo ]]\n-- three\nuse strict;\n-- @author somebody\n"),
        ("Racket", "#lang racket/base\n;; mine\n#| all\nrights |#\nuse strict;\n"),
        ("R", "# Copyright\n\n\nuse strict;\n# License: GPL\n"),
        ("D", "// Written in D.\n/**\nLicense: Boost\n*/\n/+ x +/\nuse strict;\n"),
        ("Tcl", "# a.tcl --\n#\n#   text\nuse strict;\n"),
        ("OCaml", "(****)\n(* INRIA *)\n\n(* two\n lines *)\nuse strict;\n"),
    ],
)
def test_a_file_loses_its_head_and_what_is_legal(language: str, text: str) -> None:
    assert cleaned(text, BY_NAME[language]) == "use strict;\n"


def test_comments_that_explain_code_stay() -> None:
    text = "use strict;\n# why it is so\nmy $licence = 1;\n"
    assert cleaned(text, BY_NAME["Perl"]) == text


def test_a_file_that_is_one_open_comment_is_empty() -> None:
    assert cleaned("(* never\nclosed\n", BY_NAME["OCaml"]).strip() == ""


def test_no_file_and_no_run_of_tokens_is_in_two_parts() -> None:
    def text(number: int) -> str:
        return "".join(chr(1000 + 300 * number + i) for i in range(250)) + "\n"

    shared = "".join(chr(90_000 + i) for i in range(100))
    files = [(f"{i}.tcl", text(i)) for i in range(12)]
    files += [(f"copy-{i}.tcl", f"\n{text(i)}\n\n") for i in range(12)]
    files += [(f"same-{i}.tcl", shared + text(20 + i)) for i in range(6)]
    counts = Counts(training=20, validation=4, held_out=8)
    parts = split(files, BY_NAME["Tcl"], encode, window=50, counts=counts)
    named = (parts.training, parts.validation, parts.held_out)
    assert [len(part) for part in named] == [20, 4, 8]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        runs = [
            {window[at : at + SHARED_RUN] for window in named[part] for at in range(19)}
            for part in (one, other)
        ]
        assert runs[0].isdisjoint(runs[1])
        files_of = [{window[25] // 300 for window in named[part]} for part in (one, other)]
        assert files_of[0].isdisjoint(files_of[1])


def test_too_little_source_is_said_by_language() -> None:
    with pytest.raises(TooLittleSourceError, match="Tcl"):
        split(
            [("a.tcl", "puts 1\n" * 9)], BY_NAME["Tcl"], encode, window=20, counts=Counts(2, 2, 2)
        )


def test_packages_that_changed_since_they_were_recorded_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(b"another one")
    record = [Package("a", "1", "a.deb", "0" * 64)]
    (tmp_path / "packages.json").write_text(
        json.dumps(
            [
                {"name": p.name, "version": p.version, "file": p.file, "sha256": p.sha256}
                for p in record
            ]
        )
    )
    with pytest.raises(PackagesError, match=r"a\.deb"):
        fetch(tmp_path, ["a"])
    with pytest.raises(PackagesError, match="lacks b"):
        fetch(tmp_path, ["a", "b"])


def test_only_source_of_the_language_is_read(tmp_path: Path) -> None:
    language = Language("Tcl", ("one",), (".tcl",), ("#",))
    folder = tmp_path / "unpacked" / "one" / "usr"
    folder.mkdir(parents=True)
    (folder / "a.tcl").write_text("puts ä", encoding="utf-8")
    (folder / "b.tcl").write_bytes(b"puts \xff")
    (folder / "c.txt").write_text("puts")
    (folder / "d.tcl").symlink_to("a.tcl")
    assert list(sources(tmp_path, language)) == [("unpacked/one/usr/a.tcl", "puts ä")]


def test_all_kinds_and_rates_are_searched_in_one_job_by_windows_that_judge_nothing() -> None:
    parts = tiny_parts((*SEARCHED_IN, "Lua"))
    runs = search_runs(parts, TINY)
    assert len(runs) == len(SEARCHED_IN) * sum(len(kind.rates) for kind in KINDS)
    assert len({run.name for run in runs}) == len(runs)
    judged = {window for part in parts.values() for window in part.held_out}
    seen = {one.tokens for run in runs for one in (*run.data.training, *run.data.held_out)}
    cut = {window[: TINY.search_tokens + 1] for window in judged}
    assert seen.isdisjoint(cut)


def test_the_best_rate_is_that_of_the_lowest_mean_and_one_that_failed_is_never_it() -> None:
    runs = search_runs(tiny_parts(), TINY)
    losses = {run.name: {2: 3.0} for run in runs}
    losses["flora-r1-tcl-2"] = {2: 1.0}
    losses["lora-r4-tcl-0"] = {2: 0.5}
    del losses["lora-r4-racket-0"]
    best = best_rates(losses)
    assert best["FLoRA r1"] == KINDS[2].rates[2]
    assert best["LoRA r4"] == KINDS[1].rates[1]
    assert search_losses(losses)["LoRA r4"][KINDS[1].rates[0]] == float("inf")


def test_a_job_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    rates = {kind.title: kind.rates[1] for kind in KINDS}

    def job(name: str, sizes: Sizes = TINY) -> ResumableJob:
        return ResumableJob(
            tiny_base(),
            contest_runs(tiny_parts(), rates, sizes, seed=0),
            tmp_path / f"{name}.pt",
            save_every=1,
            max_step_tokens=1000,
            tell=lambda line: None,
        )

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    undisturbed = job("undisturbed")
    undisturbed.run()
    steps = 0
    while not (killed := job("killed")).is_done:
        assert killed.step == steps
        with pytest.raises(Killed):
            killed.run(at_save=kill)
        steps += 1
    assert steps == TINY.steps
    assert killed.held_out == undisturbed.held_out
    assert {tuple(losses) for losses in killed.held_out.values()} == {(2, 4)}
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(OtherJobError, match="killed"):
        job("killed", Sizes(window=8, steps=5))


def test_a_study_tells_of_every_stage_and_only_the_whole_one_is_judged(tmp_path: Path) -> None:
    found: list[Findings] = []
    study = Study(tiny_base(), tiny_parts(), TINY, tmp_path, save_every=2, tell=lambda line: None)
    study.run(2, found.append)
    assert [[one.step for one in findings.seeds] for findings in found[:2]] == [[2], [4]]
    assert [one.step for one in found[-1].seeds] == [4, 4]
    assert found[-1].seeds[0].by_language != found[-1].seeds[1].by_language
    partial = rows_of(found[0].seeds, TINY.steps)
    assert all(row.name.startswith("partial, step 2 of 4: ") and row.bar is None for row in partial)
    whole = rows_of(found[-1].seeds, TINY.steps)
    assert [row.bar for row in whole if row.bar is not None] == [bar for _, _, bar in BARS]
    assert all(len(row.rounds) == 2 for row in whole)

    again: list[Findings] = []
    resumed = Study(tiny_base(), tiny_parts(), TINY, tmp_path, save_every=2, tell=lambda line: None)
    resumed.run(2, again.append)
    assert again[-1] == found[-1]


def test_gains_are_measured_from_the_base_model() -> None:
    def losses(values: Mapping[str, float]) -> Losses:
        return Losses(4, {("Tcl", who): loss for who, loss in values.items()})

    seed = losses({"base": 3.0, "IA3": 2.8, "LoRA r4": 2.0, "FLoRA r1": 2.2, "FLoRA r4": 1.9})
    rows = {row.name: row for row in rows_of([seed], 4)}
    assert rows["FLoRA r4's gain over the base / LoRA r4's"].value == pytest.approx(1.1)
    assert rows["FLoRA r1's gain over the base / LoRA r4's"].met is False
    assert rows["FLoRA r1's gain over the base / IA3's"].met is True
    assert rows["Tcl: base, held-out loss"].value == 3.0
