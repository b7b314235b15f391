"""Writes docs/configuration.md from the schema: `python docs/make_config_reference.py`."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stablelm.config.keys import Key, described, keys, sections  # noqa: E402 - after the path is set

INTRODUCTION = """# Configuration

<!-- Written by docs/make_config_reference.py from stablelm/config/schema.py; do not edit. -->

A run is described by YAML files and single keys:

```
python launch/pretrain.py --config configs/quickstart.yaml --config mine.yaml train.lr=1e-3 'data.path=[a.gz, b.gz]'
```

- Files are merged in the order given, then the single keys. Mappings are merged key by key; lists and single values
  replace what was there. `data.validation={}` empties a mapping, `model.d_ff=null` undoes a key.
- Values are YAML 1.2: `3e-4` is a number, `on` and `yes` are words, only `true` and `false` are truth values.
- An integer may be written `1e9`. Nothing else is converted: `3.7` is not an integer, and `"3"` is not a number.
- Every mistake in the keys is reported at once, each with the file and line or the argument it came from, and the
  program ends with exit code 78 before anything is created.
- `--print-config` prints what every key becomes, as `run.dir/resolved.yaml` keeps it. `run.dir/config.yaml` keeps what
  was asked: fed back with another `run.dir` it starts the same run anew, and any key of it can still be changed.
- In a path `~` is the home directory. Variables are not expanded: a `$` in a path is refused.
- The value of a single key is taken literally unless it is a YAML scalar, or a list or mapping in brackets:
  `'run.dir=runs/a #b'` names a folder with a `#`.
- A default of `null` is derived from other keys, as the key's text says.
- Keys marked **identity** make a run what it is: they must be equal on resume, and those that differ are named.
  Some may have other values from a checkpoint on, by `run.allow`: [changing_a_run.md](changing_a_run.md).
  `data.path` counts by the files' base names and `data.tokenizer` by its contents. `train.steps` and `train.tokens` may
  grow where `train.schedule` is `constant`, or `wsd` before its cooldown. `model.method` counts by the axes it sets.
"""


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section, text in sections().items():
        parts.append(f"\n## {section}\n\n{text[0].upper()}{text[1:]}.\n\n")
        parts.append("| key | type | default | unit | identity | meaning |\n|---|---|---|---|---|---|\n")
        parts += [_row(key) for key in keys().values() if key.name.rpartition(".")[0] == section]
    return "".join(parts)


def _row(key: Key) -> str:
    cells = [
        f"`{key.name}`",
        described(key),
        f"`{_default(key.default)}`",
        key.unit,
        "yes" if key.identity else "",
        key.text.replace("None:", "null:").replace("<", "&lt;"),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _default(value: Any) -> str:
    """The value as one writes it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(render(), encoding="utf-8")
