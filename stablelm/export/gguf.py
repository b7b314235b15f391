"""One GGUF file of a model that the architecture llama or qwen3 computes, for llama.cpp: tensors, metadata, tokenizer.

Written on top of the formats `llama` and `qwen3`, by the `gguf` package of llama.cpp itself, one tensor in memory at a
time. In a llama llama.cpp turns neighbouring features of a head by a position's angle where transformers turns feature
i with i + d_head / 2, so that the rows of queries and keys of each head are interleaved; in a qwen3 both turn the same.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stablelm.errors import ConfigError
from stablelm.export.folding import Folded
from stablelm.export.formats.choice import format_of, gguf_architecture
from stablelm.export.formats.gguf_vocabulary import vocabulary
from stablelm.tokenizers.interface import Tokenizer

FILE = "model.gguf"
QUANTISED = "q8_0"
BLOCK = 32
"""Values of a row that share a scale in q8_0."""


class Values(Protocol):
    """A tensor that is computed when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def to(self, dtype: Any) -> Any: ...


def write(folded: Folded, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Writes FILE into `folder`: a folded model that fits its `gguf_architecture`, in fp32, bf16 or q8_0.

    Raises ConfigError for a tokenizer that llama.cpp does not compute, or where the `gguf` package is missing; OSError.
    """
    name = f"stablelm-{folded.model.method}-{folded.model.n_layers}x{folded.model.d_model}"
    architecture = format_of(gguf_architecture(folded))
    write_file(folder / FILE, architecture.config(folded), architecture.tensors(folded), tokenizer, dtype, name=name)


def write_file(
    path: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Values]],
    tokenizer: Tokenizer,
    dtype: str,
    *,
    name: str,
) -> None:
    """Writes a model of a config.json and tensors by the names of transformers; `dtype`: fp32, bf16 or q8_0.

    Vectors stay fp32, and rows that q8_0 cannot divide into blocks fp16.
    """
    gguf = _library()
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(None, architecture)
    _add_metadata(gguf, writer, config, dtype, name)
    _add_tokenizer(writer, tokenizer, config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    listed = []
    for own, tensor in tensors:
        kind, shape = _kind(gguf, tensor.shape, dtype), tuple(tensor.shape)
        size = prod(gguf.quants.quant_shape_to_byte_shape(shape, kind))
        theirs = names.get_name(own, (".weight", ".bias"))
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), size, kind)
        listed.append((own, tensor, kind))
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own, tensor, kind in listed:
            writer.write_tensor_data(gguf.quants.quantize(_values(own, tensor, config), kind))
    finally:
        writer.close()


def _library() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ConfigError(f"--format gguf needs the package gguf ({error}); install stablelm[gguf]") from None


def _kind(gguf: Any, shape: tuple[int, ...], dtype: str) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2 or dtype == "fp32":
        return kinds.F32
    if dtype == QUANTISED:
        return kinds.F16 if shape[-1] % BLOCK else kinds.Q8_0
    return kinds.BF16


def _values(name: str, tensor: Values, config: Mapping[str, Any]) -> Any:
    """As an fp32 array, with the rows of a llama's queries and keys interleaved."""
    import torch

    found = tensor.to(torch.float32)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is not None and config["model_type"] == "llama":
        found = found.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return found.contiguous().numpy()


def _add_metadata(gguf: Any, writer: Any, config: Mapping[str, Any], dtype: str, name: str) -> None:
    files = gguf.LlamaFileType
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type({"fp32": files.ALL_F32, "bf16": files.MOSTLY_BF16, QUANTISED: files.MOSTLY_Q8_0}[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    found = vocabulary(dict(tokenizer.files()), size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list([token.encode() for token in found.tokens])
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.charsmap:
        writer.add_precompiled_charsmap(found.charsmap)
    for flag, value in found.flags.items():
        getattr(writer, f"add_{flag}")(value)
    writer.add_eos_token_id(tokenizer.eos)
    if tokenizer.bos is not None:
        writer.add_bos_token_id(tokenizer.bos)
    if tokenizer.unknown is not None:
        writer.add_unk_token_id(tokenizer.unknown)
    # Without these llama.cpp takes what its algorithm is usually trained with.
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)
