"""The commands of the documentation: programs and targets exist, take those options, and the keys are in the schema."""

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from support.pages import KEY, commands

from stablelm.config import packaged
from stablelm.config.load import load
from stablelm.programs.command import COMMANDS as COMMAND_MODULES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "data" / "README.md"]
LINKS = [
    pytest.param(page, link, id=f"{page.relative_to(ROOT)}-{link}")
    for page in PAGES
    if page.parent.name != "methods"  # test_method_pages.py has those
    for link in dict.fromkeys(re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")))
    if "://" not in link
]
CONFIGURED = {"pretrain.py", "probe.py", "plan.py", "preview.py", "pretrain.sh"}
OPTION = re.compile(r"--[a-z][a-z-]*")


COMMANDS = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}-{command[:60]}")
    for page in PAGES
    for command in dict.fromkeys(commands(page))
]


@lru_cache
def help_of(*program: str) -> str:
    command = [sys.executable, *program, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def is_placeholder(value: str) -> bool:
    """Whether it is no file of the repository: a name to replace, or what an earlier command of the page writes."""
    return (
        value.startswith("runs/")
        or value.isupper()
        or "..." in value
        or re.match(r"[A-Z]{3,}", value) is not None
        or value == "mine.yaml"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_programs_take(command):
    words = shlex.split(command.partition("&&")[0], comments=True)
    while "=" in words[0]:
        del words[0]
    if words[0] == "make":
        targets = [word for word in words[1:] if not word.startswith("CONSTRAINTS=")]
        subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return
    if words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if "/" in word)
        return
    if words[0] == "stablelm" or "-m stablelm" in command:
        at = words.index("stablelm") + 1
        module, _ = COMMAND_MODULES[words[at]]
        words[at] = next(file for file in (f"launch/{module}.py", f"data/{module}.py") if (ROOT / file).is_file())
    at = next(i for i, word in enumerate(words) if re.fullmatch(r"\w+/[\w/]+\.(py|sh)", word))
    program, arguments = words[at], words[at + 1 :]
    assert (ROOT / program).is_file()
    if program.endswith(".py"):
        subcommand = [word for word in arguments[:1] if word.islower() and word.isalpha()]
        assert not [word for word in arguments if OPTION.fullmatch(word) and word not in help_of(program, *subcommand)]
    if Path(program).name in CONFIGURED:
        files = [
            str(ROOT / word)
            for word in arguments
            if word.endswith(".yaml") and not KEY.match(word) and not is_placeholder(word)
        ]
        load([*files, *filter(packaged.find, arguments)], [word for word in arguments if KEY.match(word)])


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_relative_link_of_a_page_resolves(page, link):
    target, _, anchor = link.partition("#")
    path = page.parent / target if target else page
    assert path.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
