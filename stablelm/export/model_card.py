"""The README.md of an export: what was trained on what, how well it does, and how to load it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablelm import json_text
from stablelm.config.load import dump
from stablelm.evaluate.trained_run import TrainedRun
from stablelm.methods import catalogue
from stablelm.methods.sizes import parameter_counts
from stablelm.observe import provenance
from stablelm.printable import printable
from stablelm.redaction import redacted
from stablelm.small_files import read_small

MOST_FILES = 10
"""Names of text files that are listed."""


@dataclass(frozen=True)
class Written:
    """What an export did: its format, dtype, number of values, and sentences on how it differs from the run."""

    format: str
    dtype: str
    parameters: int
    notes: tuple[str, ...]


def card(run: TrainedRun, written: Written) -> str:
    """The text of README.md. What comes from the run is shown as it is, in blocks that it cannot leave."""
    model = run.config.model
    method = catalogue.find(model.method)
    trust = ", trust_remote_code=True" if written.format == "hf" else ""
    usage = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        'prompt = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"
    )
    parts = [
        _front_matter(model.method, written.format),
        f"# A language model of {written.parameters / 1e6:.1f} M parameters\n",
        "Trained with stablelm and written by its export: a base model, without instruction tuning or chat template.\n",
        _block(usage, "python") if written.format != "gguf" else "",
        "## Model\n",
        f"Method {_inline(model.method)} ({method.paper}), {model.n_layers} layers of width {model.d_model}, "
        f"{parameter_counts(model)['total'] / 1e6:.1f} M parameters while it was trained, sequences of up to "
        f"{model.max_seq_len} tokens. Format {written.format}, {written.dtype}.\n",
        *(f"- {note}" for note in written.notes),
        "\n## Training data\n",
        _block("\n".join(_texts(run)), "text"),
        "## Figures\n",
        _block(json.dumps(_figures(run), indent=2), "json"),
        "## Configuration\n",
        _block(dump(run.config), "yaml"),
    ]
    return redacted("\n".join(part for part in parts if part)) + "\n"


def _front_matter(method: str, architecture: str) -> str:
    tags, library = json.dumps(["stablelm", method]), "gguf" if architecture == "gguf" else "transformers"
    return f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags: {tags}\n---\n"


def _figures(run: TrainedRun) -> dict[str, Any]:
    """Step, tokens and losses of the run's summary, and the commit of its program."""
    found: dict[str, Any] = {"step": run.step}
    folder = _run_dir(run)
    if folder is None:
        return found
    try:
        summary = json_text.parse(read_small(folder / "summary.json"), dict[str, Any])
    except (OSError, ValueError):
        summary = {}
    if summary.get("step") == run.step:
        found |= {name: summary[name] for name in ("tokens", "loss", "val_loss") if name in summary}
    attempts = provenance.read(folder)
    return found | ({"commit": attempts[-1].get("commit")} if attempts else {})


def _texts(run: TrainedRun) -> list[str]:
    """Base names of the training files."""
    from stablelm.checkpoint import saved_run

    names = saved_run.read_state(run.checkpoint)["identity"].get("data.path", [])
    each = [f"{source}: {name}" for source, own in names.items() for name in own] if isinstance(names, dict) else names
    shown = [str(name) for name in each[:MOST_FILES]]
    return shown + ([f"and {len(each) - MOST_FILES} more files"] if len(each) > MOST_FILES else [])


def _run_dir(run: TrainedRun) -> Path | None:
    return run.checkpoint.parent.parent if isinstance(run.checkpoint, Path) else None


def _block(content: str, language: str) -> str:
    """A code block whose fence is longer than any in its content."""
    longest = max((len(fence) for fence in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(content)}\n{fence}\n"


def _inline(word: str) -> str:
    return f"`{printable(word).replace('`', '')}`"
