"""What is not public in torch and DeepSpeed is used in one module alone."""

import ast
import re
from collections.abc import Iterator

from support.samples import REPOSITORY

PACKAGE = REPOSITORY / "stablelm"


def private_names(tree: ast.AST) -> Iterator[str]:
    """Imports of private modules or names of torch or deepspeed, and attributes of `torch.` with an underscore."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        yield from (name for name in names if re.fullmatch(r"(torch|deepspeed)\.(\w+\.)*_\w+(\.\w+)*", name))


def test_private_names_are_in_one_module():
    found = {
        path.relative_to(PACKAGE).as_posix(): sorted(set(private_names(ast.parse(path.read_text()))))
        for path in PACKAGE.rglob("*.py")
    }
    assert [path for path, names in found.items() if names] == ["private_names.py"], found
