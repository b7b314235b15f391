"""An import holds a few tensors at a time, whatever the model's size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.programs import environment
from support.public_models import LLAMA
from support.tiny import TinyCorpus

from stablelm.tokenizers import load_tokenizer

LAYERS = 12
LARGEST = 4 * 512 * 2048
"""Bytes of a matrix in fp32."""
PROGRAM = """
import re, sys, threading
import torch
import stablelm.checkpoint.commit, stablelm.model.decoder
from stablelm.export.importing.import_model import import_model

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

done, seen = threading.Event(), [anonymous()]
thread = threading.Thread(target=watch)
thread.start()
import_model(sys.argv[1], sys.argv[2], method="deepscalelm_pre")
done.set()
thread.join()
print(max(seen) - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_bounded_by_the_largest_tensors(tiny_corpus: TinyCorpus, tmp_path: Path):
    folder, pieces = tmp_path / "folder", load_tokenizer(tiny_corpus.tokenizer).pieces
    folder.mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **sizes, "vocab_size": pieces}))
    shutil.copy(tiny_corpus.tokenizer, folder / "tokenizer.model")
    shapes = {"model.embed_tokens": (pieces, 512), "lm_head": (pieces, 512), "model.norm": (512,)}
    for layer in range(LAYERS):
        own = {f"self_attn.{name}_proj": (512, 512) for name in "qkvo"}
        own |= {"mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512), "mlp.down_proj": (512, 2048)}
        own |= {"input_layernorm": (512,), "post_attention_layernorm": (512,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    tensors = {f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    whole = 4 * sum(tensor.numel() for tensor in tensors.values())
    # Two threads, each with a tensor as it is read and as fp32, and what the libraries allocate at their first use.
    assert 0 < int(done.stdout.split()[-1]) < 16 * LARGEST < whole / 2
