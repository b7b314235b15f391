"""A GGUF file read back by llama.cpp's own package holds the model, its metadata and its tokenizer."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import sentencepiece
import torch
from support import public_models
from support.tiny import TinyCorpus, synthetic_documents

from stablelm.errors import ConfigError
from stablelm.export.formats.gguf_vocabulary import GPT2, LLAMA3, QWEN2, vocabulary
from stablelm.export.gguf import write_file
from stablelm.tokenizers import training as sentencepiece_tokenizers

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEXTS = [
    *synthetic_documents(3, seed=7),
    "de le\nka  mista.\n\nfi",
    "a new line\nand a tab\tand Ünïcode 漢字 {x: 1}",
]


def tokenizer_of(files: dict[str, bytes], **ids: Any) -> Any:
    return SimpleNamespace(**{"eos": 2, "bos": 1, "unknown": 0, "add_bos": False, **ids}, files=lambda: files)


def made(model: Any, path: Path, dtype: str, tokenizer: Any) -> gguf.GGUFReader:
    """What a model of transformers is, written and read again."""
    config = {**model.config.to_dict(), "rope_theta": model.config.rope_parameters["rope_theta"]}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "rotary" not in name}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_file(path, config, tensors.items(), tokenizer, dtype, name="tiny")
    return gguf.GGUFReader(path)


def theirs(name: str) -> str:
    """llama.cpp's name of a tensor."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, leaf = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{leaf}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{leaf}"


def plain_values(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Every tensor dequantised by the package, row-major."""
    return {
        each.name: torch.from_numpy(
            gguf.quants.dequantize(each.data, each.tensor_type).astype(np.float32).reshape(tuple(each.shape[::-1]))
        )
        for each in reader.tensors
    }


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2 i + k of a head is what was its row i + k d_head / 2."""
    whole = tensor.reshape(heads, -1, *tensor.shape[1:])
    half = whole.shape[1] // 2
    order = [at + part * half for at in range(half) for part in (0, 1)]
    return whole[:, order].reshape(tensor.shape)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "llama_biased", "qwen3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8_0"])
def test_every_tensor_is_there_under_its_name(kind: str, dtype: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    model = public_models.make(kind, tiny_corpus.tokenizer, hidden_size=64, intermediate_size=80)
    files = {"tokenizer.model": Path(tiny_corpus.tokenizer).read_bytes()}
    reader = made(model, tmp_path / "model.gguf", dtype, tokenizer_of(files))
    found, expected = plain_values(reader), {}
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]) if kind != "qwen3" else None
        if not (name == "lm_head.weight" and kind == "llama_tied"):
            expected[theirs(name)] = tensor if heads is None else interleaved(tensor, heads)
    assert found.keys() == expected.keys()
    kinds = {each.name: each.tensor_type.name for each in reader.tensors}
    for name, tensor in expected.items():
        if tensor.ndim == 1 or dtype == "fp32":
            assert kinds[name] == "F32" and torch.equal(found[name], tensor), name
        elif dtype == "bf16":
            assert kinds[name] == "BF16" and torch.equal(found[name], tensor.bfloat16().float()), name
        elif tensor.shape[1] % 32:
            assert kinds[name] == "F16" and torch.equal(found[name], tensor.half().float()), name
        else:
            step = tensor.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 127
            error = (found[name] - tensor).unflatten(1, (-1, 32)).abs()
            # Half a step, and the rounding of the scale to fp16.
            assert kinds[name] == "Q8_0" and bool((error <= (0.5 + 127 / 2048) * step).all()), name


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_llama_cpps_way_to_turn_pairs_gives_the_logits_of_transformers(
    kind: str, tiny_corpus: TinyCorpus, tmp_path: Path
):
    """The model computed from the file alone: neighbouring features of a llama's head are turned together."""
    model = public_models.make(kind, tiny_corpus.tokenizer)
    files = {"tokenizer.model": Path(tiny_corpus.tokenizer).read_bytes()}
    reader = made(model, tmp_path / "model.gguf", "fp32", tokenizer_of(files))
    ids = torch.randint(0, model.config.vocab_size, (20,))
    expected = public_models.logits_of(model, ids[None])[0]
    torch.testing.assert_close(computed(reader, ids), expected, atol=1e-4, rtol=0)


def computed(reader: gguf.GGUFReader, ids: torch.Tensor) -> torch.Tensor:
    """(seq, vocab_size) of a LLaMA or Qwen 3 as llama.cpp reads it."""
    kind = reader.fields["general.architecture"].contents()
    start = f"{kind}."
    held = {n.removeprefix(start): field.contents() for n, field in reader.fields.items() if n.startswith(start)}
    tensors = plain_values(reader)
    eps, base = held["attention.layer_norm_rms_epsilon"], held["rope.freq_base"]
    heads, groups = held["attention.head_count"], held["attention.head_count_kv"]
    width = held["rope.dimension_count"]
    angles = torch.arange(len(ids))[:, None] * base ** (-torch.arange(0, width, 2) / width)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"], eps)

    def turned(x: torch.Tensor, count: int, own_norm: str) -> torch.Tensor:
        x = x.reshape(len(ids), count, -1)
        if kind == "qwen3":  # feature i with i + d_head / 2
            x = norm(x, own_norm).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2).transpose(0, 1)

    x = tensors["token_embd.weight"][ids]
    for layer in range(held["block_count"]):
        own = {name: tensors[f"blk.{layer}.{name}.weight"] for name in NAMES.values() if "norm" not in name}
        h = norm(x, f"blk.{layer}.attn_norm")
        q = turned(h @ own["attn_q"].T, heads, f"blk.{layer}.attn_q_norm")
        k = turned(h @ own["attn_k"].T, groups, f"blk.{layer}.attn_k_norm")
        v = (h @ own["attn_v"].T).reshape(len(ids), groups, -1).transpose(0, 1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + mixed.transpose(0, 1).flatten(1) @ own["attn_output"].T
        h = norm(x, f"blk.{layer}.ffn_norm")
        gate = torch.nn.functional.silu(h @ own["ffn_gate"].T)
        x = x + (gate * (h @ own["ffn_up"].T)) @ own["ffn_down"].T
    return norm(x, "output_norm") @ tensors["output.weight"].T


def test_the_metadata_is_what_llama_cpp_asks_for(tiny_corpus: TinyCorpus, tmp_path: Path):
    model = public_models.make("llama", tiny_corpus.tokenizer)
    content = Path(tiny_corpus.tokenizer).read_bytes()
    reader = made(model, tmp_path / "model.gguf", "bf16", tokenizer_of({"tokenizer.model": content}, bos=None))
    found = {name: field.contents() for name, field in reader.fields.items()}
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert {name: value for name, value in found.items() if name.startswith(("general.", "llama."))} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16),
        "general.quantization_version": 2,
        "llama.vocab_size": model.config.vocab_size,
        "llama.context_length": 64,
        "llama.embedding_length": 48,
        "llama.block_count": 6,
        "llama.feed_forward_length": 80,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 12,
        "llama.attention.value_length": 12,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 12,
        "llama.rope.freq_base": 5e5,
    }
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.pre"] == "default"
    pieces = processor.get_piece_size()
    tokens = [processor.id_to_piece(number) for number in range(pieces)]
    assert found["tokenizer.ggml.tokens"] == [*tokens, *(f"[PAD{pieces + extra}]" for extra in range(3))]
    scores = [processor.get_score(number) for number in range(pieces)]
    assert found["tokenizer.ggml.scores"][:pieces] == pytest.approx(scores)
    types = [2, 3, 3, *([1] * (pieces - 3)), 5, 5, 5]
    assert found["tokenizer.ggml.token_type"] == types
    assert found["tokenizer.ggml.eos_token_id"] == 2 and found["tokenizer.ggml.unknown_token_id"] == 0
    assert "tokenizer.ggml.bos_token_id" not in found and found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_space_prefix"] is True


def best_sum(tokens: list[str], types: list[int], scores: list[float], text: str) -> list[int]:
    """Ids by llama.cpp's unigram: the path of the best sum over pieces that are text, other characters unknown."""
    unknown = types.index(2)
    pieces = {token: number for number, token in enumerate(tokens) if types[number] in (1, 4)}
    lowest = min(score for score, each in zip(scores, types, strict=True) if each == 1)
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    longest = max(map(len, pieces))
    for end in range(1, len(text) + 1):
        found = (-math.inf, [])
        for start in range(max(0, end - longest), end):
            number = pieces.get(text[start:end])
            if number is None and end - start == 1 and text[start:end] not in pieces:
                number, score = unknown, lowest - 10
            elif number is not None:
                score = scores[number]
            else:
                continue
            if best[start][0] + score > found[0]:
                found = best[start][0] + score, [*best[start][1], number]
        best.append(found)
    return best[-1][1]


def best_pairs(tokens: list[str], types: list[int], scores: list[float], text: str) -> list[int]:
    """Ids by llama.cpp's BPE of scores: the neighbours that make the best piece join, the leftmost first."""
    numbers = {token: number for number, token in enumerate(tokens) if types[number] in (1, 4)}
    bytes_ = {token: number for number, token in enumerate(tokens) if types[number] == 6}
    parts = list(text)
    while True:
        found = [
            (scores[numbers[a + b]], -at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in numbers
        ]
        if not found:
            break
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        spelled = [bytes_.get(f"<0x{byte:02X}>", types.index(2)) for byte in part.encode()]
        ids += [numbers[part]] if part in numbers else spelled
    return ids


@pytest.mark.parametrize(("kind", "algorithm"), [("unigram", best_sum), ("bpe", best_pairs)])
def test_llama_cpps_algorithm_gives_the_ids_of_a_sentencepiece_model(kind: str, algorithm: Callable, tmp_path: Path):
    lines = [line for text in synthetic_documents(80, seed=0) for line in text.split("\n")]
    content = sentencepiece_tokenizers.train(lines, vocab_size=330, model_type=kind)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    found = vocabulary({"tokenizer.model": content}, 384)
    assert found.model == {"unigram": "t5", "bpe": "llama"}[kind]
    assert found.flags["add_space_prefix"] is False
    assert len(found.tokens) == len(found.types) == len(found.scores or []) == 384
    for text in TEXTS:
        # Its unigram has no bytes for what is outside ASCII.
        plain = text if kind == "bpe" else text.encode("ascii", "ignore").decode()
        ids = algorithm(found.tokens, found.types, found.scores, plain.replace(" ", "\u2581"))
        assert ids == processor.encode(plain), text


def byte_level(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tokenizer.json of GPT-2's kind, with an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(synthetic_documents(80, seed=0), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = json.loads((folder / "tokenizer.json").read_text())
    return {**found, **changes}


def split(pattern: str) -> dict[str, Any]:
    parts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [(None, False, "gpt-2"), (GPT2, False, "gpt-2"), (LLAMA3, True, "llama-bpe"), (LLAMA3, False, "dbrx"),
     (QWEN2, False, "qwen2")],
)  # fmt: skip
def test_a_byte_level_bpe_is_known_by_how_it_splits_text(pattern, ignore_merges: bool, name: str, tmp_path: Path):
    from tokenizers import Tokenizer

    described = byte_level(tmp_path)
    described["pre_tokenizer"] = described["pre_tokenizer"] if pattern is None else split(pattern)
    described["model"]["ignore_merges"] = ignore_merges
    found = vocabulary({"tokenizer.json": json.dumps(described).encode()}, 448)
    assert (found.model, found.pre, found.scores) == ("gpt2", name, None)
    assert found.types[0] == 3 and set(found.types[1:]) == {1, 5} and found.tokens[0] == "<|endoftext|>"
    own = Tokenizer.from_str(json.dumps(described))
    assert found.tokens[: own.get_vocab_size()] == [own.id_to_token(number) for number in range(own.get_vocab_size())]
    for text in TEXTS:
        assert by_ranks(found, pattern or GPT2, ignore_merges, text) == own.encode(text).ids


def by_ranks(found: Any, pattern: str, ignore_merges: bool, text: str) -> list[int]:
    """Ids by llama.cpp's byte-level BPE: words by the pattern, then the pair of the lowest rank joins first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + at) for at, byte in enumerate(sorted(set(range(256)) - set(plain)))}
    numbers = {token: number for number, token in enumerate(found.tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(found.merges)}
    ids: list[int] = []
    for word in regex.findall(pattern, text):
        parts = [letters[byte] for byte in word.encode()]
        if ignore_merges and "".join(parts) in numbers:
            parts = ["".join(parts)]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, math.inf), at) for at, pair in enumerate(itertools.pairwise(parts)))
            if rank == math.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [numbers[part] for part in parts]
    return ids


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": split(r"\p{L}+")},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "WordPiece", "vocab": {}, "merges": []}},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_a_tokenizer_that_llama_cpp_does_not_compute_is_refused(changes: dict[str, Any], tmp_path: Path):
    described = byte_level(tmp_path, **changes)
    with pytest.raises(ConfigError, match="--format gguf"):
        vocabulary({"tokenizer.json": json.dumps(described).encode()}, 448)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"stablelm\[gguf\]"):
        write_file(tmp_path / "model.gguf", {}, (), tokenizer_of({}), "fp32", name="tiny")
    assert not (tmp_path / "model.gguf").exists()
