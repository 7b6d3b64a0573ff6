"""The eight languages: which Debian packages carry source in them, and how they write comments. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """`line_comments` are what a whole line of comment may begin with, `block_comments` pairs of begin and end.

    `ends`: lines after which a file is no longer source.
    """

    name: str
    packages: tuple[str, ...]
    suffixes: tuple[str, ...]
    line_comments: tuple[str, ...]
    block_comments: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, ...] = ()


LANGUAGES = (
    Language(
        "Perl",
        ("libmojolicious-perl", "libmoose-perl"),
        (".pm", ".pl"),
        ("#",),
        (("=pod", "=cut"), ("=head1", "=cut")),
        ("__END__", "__DATA__"),
    ),
    Language(
        "Ruby",
        ("ruby-activesupport", "ruby-rack", "ruby-sinatra"),
        (".rb",),
        ("#",),
        (("=begin", "=end"),),
        ("__END__",),
    ),
    Language("Lua", ("awesome", "lua-penlight", "prosody"), (".lua",), ("--",), (("--[[", "]]"),)),
    Language("Racket", ("racket-common",), (".rkt",), (";", "#lang"), (("#|", "|#"),)),
    Language(
        "R",
        (
            "r-cran-data.table",
            "r-cran-dplyr",
            "r-cran-ggplot2",
            "r-cran-lattice",
            "r-cran-mass",
            "r-cran-nlme",
            "r-cran-survival",
        ),
        (".R",),
        ("#",),
    ),
    Language("D", ("libphobos2-ldc-shared-dev",), (".d",), ("//",), (("/*", "*/"), ("/+", "+/"))),
    Language("Tcl", ("tcllib",), (".tcl",), ("#",)),
    Language("OCaml", ("libbase-ocaml-dev", "liblwt-ocaml-dev"), (".ml",), (), (("(*", "*)"),)),
)
