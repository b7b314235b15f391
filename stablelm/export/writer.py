"""Exports a checkpoint: opens it, chooses the format, and writes a folder that appears only when it is complete."""

import json
import math
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stablelm.checkpoint.remote_path import FULL, UNWRITABLE
from stablelm.errors import ConfigError, StorageError
from stablelm.evaluate.trained_run import TrainedRun, open_run
from stablelm.export import centred_norms, gguf, hub, model_card, tokenizer_files
from stablelm.export.folding import Folded
from stablelm.export.formats.choice import GGUF, LAYER_NORMS, OWN, STANDARD, choose, format_of, gguf_architecture
from stablelm.export.sample_text import sample_documents, sample_tokens
from stablelm.export.shards import write_shards
from stablelm.export.weights import Weights
from stablelm.new_files import rename_to_new, sync_directory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how. `dtype`: fp32 or bf16, of GGUF q8_0 too; `checked`: a file of documents for the
    tokenizer; `push`: the hub's repository OWNER/NAME; `trusted`, `average`: as for
    `open_run`; `norm`: of `centred_norms.NORMS`."""

    checkpoint: str
    out: Path
    format: str = "auto"
    dtype: str = "bf16"
    shard_bytes: int = 5 * 10**9
    tokenizer: str | None = None
    checked: str | None = None
    push: str | None = None
    trusted: bool = False
    average: str | None = None
    norm: str = centred_norms.OWN


@dataclass(frozen=True)
class Exported:
    """What was written; `notes` are sentences for the user."""

    folder: Path
    format: str
    parameters: int
    notes: tuple[str, ...]


def export(request: ExportRequest) -> Exported:
    """Writes the export's folder.

    Raises ConfigError and CheckpointError before anything is created, for `out` that holds something, a checkpoint that
    cannot be opened and a model that the format does not compute; StorageError where `out` cannot be written.
    """
    _check_out(request)
    run = open_run(request.checkpoint, tokenizer=request.tokenizer, trusted=request.trusted, average=request.average)
    folded = Folded(run.config.model, Weights(run.checkpoint, run))
    name = _format(request, folded)
    texts = sample_documents(run, request.checked)
    longest = run.config.model.max_seq_len or 0
    files = tokenizer_files.contents(run.tokenizer, longest=longest) if name != GGUF else {}
    if request.push is not None:
        hub.prepare(request.push)
    with _complete_at_end(request.out) as folder:
        folded = folded if name == OWN else folded.calibrated(sample_tokens(run, texts))
        notes = _differences(folded, run, name)
        if files:
            notes.append(_tokenizer_difference(files, run, texts))
        parameters = _write_model(request, name, folded, run, folder)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        written = model_card.Written(name, request.dtype, parameters, tuple(notes))
        (folder / "README.md").write_text(model_card.card(run, written), encoding="utf-8")
    if request.push is not None:
        address = hub.push(request.push, request.out, message=f"Step {run.step} in format {name}")
        notes.append(f"Sent to the hub: {address}.")
    return Exported(request.out, name, parameters, tuple(notes))


def _format(request: ExportRequest, folded: Folded) -> str:
    """The format to write; all standard ones but gpt2 have root-mean-square norms anyway. Raises ConfigError."""
    if request.norm == centred_norms.OWN:
        return choose(request.format, folded)
    crms = request.norm == centred_norms.CRMS
    if request.format == LAYER_NORMS or (crms and request.format not in ("auto", OWN)):
        raise ConfigError(
            f"--norm {request.norm} is not in --format {request.format}, whose norms are "
            f"{'layer' if request.format == LAYER_NORMS else 'root-mean-square'} norms; use --format {OWN}"
        )
    if request.format != "auto" and request.format != OWN:
        return choose(request.format, folded)
    fitting = (name for name in STANDARD if name != LAYER_NORMS and not format_of(name).obstacles(folded))
    if request.format == "auto" and not crms and (found := next(fitting, None)) is not None:
        return found
    centred_norms.check(folded.model, request.norm)
    return choose(OWN, folded)


def _check_out(request: ExportRequest) -> None:
    out = request.out
    if request.checked is not None and request.format == GGUF:
        raise ConfigError(
            f"--check-tokenizer {request.checked} compares the tokenizer's files for transformers, which "
            f"--format {GGUF} does not write; leave it out"
        )
    if request.dtype not in DTYPES and request.format != GGUF:
        raise ConfigError(f"--dtype {request.dtype} is for --format {GGUF} alone; use bf16 or fp32")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out {out} is not a directory; name a new one")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; name a new directory")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"--out {out}: {there} is not a directory; name another one")


@contextmanager
def _complete_at_end(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes its name where the with block ends well, and goes where it does not, with
    the parents that were missing."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    temporary = out.absolute().with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_directory(temporary)
        rename_to_new(temporary, out.absolute())
        sync_directory(out.absolute().parent)
    except FileExistsError:
        raise ConfigError(f"--out {out} is not empty; name a new directory") from None
    except OSError as error:
        if error.errno in FULL | UNWRITABLE:
            raise StorageError(f"cannot write {out} ({error.strerror})") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for parent in made:  # the deepest first; those that hold something stay
                parent.rmdir()


def _differences(folded: Folded, run: TrainedRun, name: str) -> list[str]:
    """Sentences on what a standard architecture computes in another way."""
    found = []
    if name != OWN and not folded.is_exact:
        found.append(
            f"The stream's scales are in the weights, but norms of {name} have one eps for all depths: their gains "
            f"make up for it on average, and a norm's output is off by a share of {folded.largest_error:.0e} at most."
        )
    if name != OWN and run.config.model.attention.document_end is not None:
        found.append("In training attention did not reach beyond a document; here it does: give one document a row.")
    return found


def _tokenizer_difference(files: dict[str, bytes], run: TrainedRun, texts: list[str]) -> str:
    found = tokenizer_files.difference(files, run.tokenizer, texts)
    if not found.documents:
        return "The tokenizer was compared on no text: the run's validation text is not here; use --check-tokenizer."
    return f"The tokenizer gives other ids than the run's in {found.differing} of {found.documents} documents."


def _write_model(request: ExportRequest, name: str, folded: Folded, run: TrainedRun, folder: Path) -> int:
    """Configuration and tensors; returns the number of values."""
    if name == GGUF:
        gguf.write(folded, run.tokenizer, folder, request.dtype)
        return sum(math.prod(tensor.shape) for _, tensor in format_of(gguf_architecture(folded)).tensors(folded))
    architecture, dtype = format_of(name), DTYPES[request.dtype]
    if name == OWN and request.norm != centred_norms.OWN:
        architecture = centred_norms.CentredNorms(folded, request.norm)
    ids = tokenizer_files.token_ids(run.tokenizer)
    # No pad_token_id here: an embedding of that id would not be trained further.
    tokens = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": None}
    config = {**architecture.config(folded), **tokens, "dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {**tokens, "pad_token_id": ids.pad})
    if (modelling := getattr(architecture, "MODELLING_FILE", None)) is not None:
        shutil.copyfile(modelling, folder / Path(modelling).name)
    return write_shards(folder, architecture.tensors(folded), dtype, shard_bytes=request.shard_bytes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
