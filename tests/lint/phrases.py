"""Finds phrases that messages and documentation avoid, and says what to write instead.

    python tests/lint/phrases.py [FILE ...]

Without files: the documentation and every string that the programs can print. In Python, strings other than docstrings
are read, and the docstring of a module that uses it as its help (`__doc__`); in shell scripts, the lines that are not
comments; in Markdown, everything but code between backticks. A phrase may run over a line break.
Prints `file:line: "phrase": write "better"` and ends with exit code 1 if it finds any.
"""

import ast
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("stablelm/**/*.py", "launch/*.py", "data/*.py", "slurm/*.py", "slurm/*.sh")
PAGES = ("*.md", "docs/**/*.md", "data/*.md", ".github/*.md")

# A phrase is a regular expression, without regard to case; a space matches any white space.
NOUN = (
    r"(directory|file|folder|link|method|key|option|command|program|number|integer|text|string|list|mapping|token|"
    r"tokenizer|checkpoint|run|regular file|positive number|shard|share|split|column|url|address|name|value|record)"
)
COUNT = r"(tokens|nats|bytes|bits|memory|collectives|operations|sequences|documents|one line|one record|one task)"
EACH = r"(rank|step|sequence|token|second|batch|set|document|node|gpu|layer|micro-batch|run|checkpoint|interval|line)"

PHRASES = {
    r"(is|are|was|were|be|been|being) told": "reported, requested or given",
    r"(unless|if|as|than|not) told": "reported, requested or given",
    r"tells more": "has the details",
    r"(if|as|what|to) (you|they|we|it) wish(es)?": "want, or: request",
    r"(the|a|no|their|its) wish(es)?": "the request",
    r"(the|a|one|no|its) mend(s|ing)?": "the fix",
    r"stands? in": "is in, is set in or replaces",
    r"what it stands for": "its value",
    r"(is|are|was|were) gone": "does not exist, or: was deleted",
    rf"(?<!there\s)(is|are|was|were) no {NOUN}s?": "is not a ..., or: does not exist",
    r"whole numbers?": "integer",
    r"a list of texts?": "a list of strings",
    r"to make it text": "to make it a string",
    r"must be text": "must be a string",
    r"(not|is|are|be|left|found) whole": "complete, intact or OK",
    r"(can(not)? be )?shared out( evenly)?": "must be divisible by, or: is divided among",
    r"(is|are) not named like": "unsupported file type",
    r"rehears(al|als|e|ed|es|ing)": "dry run",
    r"weights told": "parameters",
    r"what is kept": "activations kept for the backward pass, or the name of the thing",
    r"at (its|their) fullest": "peak memory per GPU",
    r"memory (of a|a) rank": "memory per GPU, or: memory per rank",
    r"other traffic": "memory-bound ops",
    r"not hidden": "exposed communication",
    r"products \{\}": "matmul",
    r"(seconds|minutes|hours|steps|time|disk|space|bytes|memory|room|days) left": "remaining",
    r"(the|a|its|their|no) culprits?": "the cause, or: the rank that hung",
    r"(the|a|its|their|no) (shelf|shelves)": "disk offload",
    r"(the|a|its|their|no) (ledger|gauge|pulse)s?": "memory tracker, layer hook or progress marker",
    r"a unigram model (of the \w+ (text|tokens) )?has": "x nats below the unigram baseline (its loss)",
    r"by your word": "if you ask for it, with the option's name",
    r"the last word": "take precedence",
    r"(no|without a) word( of its own)?": "no summary, or: silently",
    r"so many (times|seconds|steps|bytes|rows|tokens|documents|processes|ranks)": "that number of ...",
    r"is no hang yet": "does not count as a hang",
    r"held alike": "replicated, or: are identical",
    r"(made|written|starts?|started|begins?|begun|drawn|trains?|asked) anew": "again, or: a new ...",
    r"(to go|goes|went|going|gone) on( with)?": "continue, or: resume",
    rf"{COUNT} an? {EACH}": "per",
}  # fmt: skip


class Finding(NamedTuple):
    file: Path
    line: int
    phrase: str
    better: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: "{self.phrase}": write "{self.better}"'


def compiled(phrase: str) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + phrase.replace(" ", r"\s+") + r")\b", re.IGNORECASE)


PATTERNS = {compiled(phrase): better for phrase, better in PHRASES.items()}


def find(text: str) -> Iterator[tuple[int, str, str]]:
    """Offset, phrase and what to write instead, for every phrase in a text."""
    for pattern, better in PATTERNS.items():
        for match in pattern.finditer(text):
            yield match.start(), " ".join(match[0].split()), better


def python_strings(source: str) -> Iterator[tuple[int, int, str]]:
    """First line, last line and text of each string that is not a docstring; a field of an f-string is written {}."""
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    uses_help = any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    if uses_help and tree.body:
        statements.discard(id(getattr(tree.body[0], "value", None)))
    for node in ast.walk(tree):
        if id(node) in inside or id(node) in statements:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        yield node.lineno, node.end_lineno or node.lineno, text


def findings_in_python(file: Path, source: str) -> Iterator[Finding]:
    lines = source.splitlines()
    for first, last, text in python_strings(source):
        for _, phrase, better in find(text):
            start = phrase.split()[0].lower()
            named = (number for number in range(first, last + 1) if phrase.lower() in lines[number - 1].lower())
            begun = (
                number for number in range(first, last + 1) if lines[number - 1].lower().rstrip('" ').endswith(start)
            )
            yield Finding(file, next(named, next(begun, first)), phrase, better)


def findings_in_text(file: Path, text: str) -> Iterator[Finding]:
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    for offset, phrase, better in find(text):
        yield Finding(file, bisect_right(starts, offset), phrase, better)


def blank(match: re.Match[str]) -> str:
    """The same number of characters and lines without words."""
    return re.sub(r"[^\n]", "`", match[0])


def check(file: Path) -> list[Finding]:
    """The findings of one file, by line."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        found = findings_in_python(file, text)
    elif file.suffix == ".sh":
        found = findings_in_text(file, re.sub(r"(?m)^\s*#.*$", blank, text))
    else:
        found = findings_in_text(file, re.sub(r"(?<!`)`[^`\n]+`(?!`)", blank, text))
    return sorted(found, key=lambda finding: (finding.line, finding.phrase))


def main(names: list[str]) -> int:
    files = [Path(name) for name in names] or sorted(
        {file.relative_to(ROOT) for pattern in (*SOURCES, *PAGES) for file in ROOT.glob(pattern)}
    )
    found = [finding for file in files for finding in check(file if names else ROOT / file)]
    for finding in found:
        print(finding._replace(file=Path(finding.file).relative_to(ROOT)) if not names else finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
