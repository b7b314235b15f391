"""YAML in and out: the core schema of YAML 1.2, so that 3e-4 is a number and `on` is a word."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import yaml

MOST_NODES = 1_000_000
"""Far more values than a configuration has: a few lines of aliases of aliases would make billions."""
_TAG = "tag:yaml.org,2002:"
_FIRST_OF_NUMBER = list("-+.0123456789")
_RESOLVERS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", _FIRST_OF_NUMBER),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _FIRST_OF_NUMBER,
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {}


class _Dumper(yaml.SafeDumper):
    # Also quotes what YAML 1.1 would not read as text, such as `on`: other programs read these files.
    yaml_implicit_resolvers: ClassVar = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _style(words: str) -> str | None:
    # PyYAML turns these into plain line breaks unless they are escaped, which double quotes do.
    return '"' if any(mark in words for mark in "\x85\u2028\u2029\ufeff") else None


for _kind, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern})$"), _first)
_Dumper.add_representer(str, lambda dumper, data: dumper.represent_scalar(_TAG + "str", data, style=_style(data)))
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence(_TAG + "seq", data, flow_style=True))


class TextError(ValueError):
    """Text that is not what we read; `line` counts from 1."""

    def __init__(self, problem: str, line: int):
        super().__init__(problem)
        self.line = line


def read(text: str) -> yaml.Node | None:
    """The node tree of one YAML document, None if it is empty; raises TextError."""
    with _yaml_errors(text):
        node = yaml.compose(text, Loader=_Loader)
        if node is not None and _size(node, {}) > MOST_NODES:
            raise TextError(f"its aliases make more than {MOST_NODES} values; write it out", 1)
        return node


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a tree once its aliases are replaced by what they stand for; `known`: by id of a node."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 0  # where it contains itself, which whoever walks the tree finds
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def is_bare(text: str) -> bool:
    """Whether YAML text is all value: no comment, anchor, alias, tag, directive, document mark or block scalar.

    Raises TextError.
    """
    end = 0
    with _yaml_errors(text):
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, _NOT_VALUES) or getattr(token, "style", None) in ("|", ">"):
                return False
            if "#" in text[end : token.start_mark.index]:
                return False
            end = max(end, token.end_mark.index)
    return "#" not in text[end:]


_NOT_VALUES = (
    yaml.AnchorToken,
    yaml.AliasToken,
    yaml.TagToken,
    yaml.DirectiveToken,
    yaml.DocumentStartToken,
    yaml.DocumentEndToken,
)


@contextmanager
def _yaml_errors(text: str) -> Iterator[None]:
    """Turns what PyYAML says of `text` into TextError."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise TextError(f"not valid YAML: {error.problem or error.context}", mark.line + 1 if mark else 1) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise TextError(f"not valid YAML: {error.reason}", line) from error
    except RecursionError as error:
        raise TextError("nested too deeply", 1) from error


def plain(node: yaml.Node | None) -> Any:
    """The value of a node: None, bool, int, float, str, list or dict; raises TextError."""
    if node is None:
        return None
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {name: plain(item) for name, item, _ in items(node)}
    return _scalar(node)


def items(node: yaml.MappingNode) -> list[tuple[str, yaml.Node, int]]:
    """Name, value and line of each entry; raises TextError for a name that is no text or comes twice."""
    found: dict[str, tuple[str, yaml.Node, int]] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise TextError("a name must be a string, not a list or mapping", line)
        if key.value in found:
            raise TextError(f"{key.value} is given twice, first in line {found[key.value][2]}", line)
        found[key.value] = (key.value, value, line)
    return list(found.values())


def _scalar(node: yaml.Node) -> Any:
    kind, value = node.tag.removeprefix(_TAG), node.value
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()]
        if kind == "int":
            return int(value)
        if kind == "float":
            return float(value.replace(".inf", "inf").replace(".nan", "nan") if value[-1:].isalpha() else value)
    except (ValueError, KeyError) as error:
        raise TextError(f"{value!r} does not fit its tag {node.tag}", node.start_mark.line + 1) from error
    if kind != "str":
        raise TextError(f"the tag {node.tag} is not supported", node.start_mark.line + 1)
    return value


def write(tree: dict[str, Any]) -> str:
    """YAML of nested mappings in their own order; lists on one line. `plain(read(write(x))) == x`."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
