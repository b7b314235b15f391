"""Texts that the model writes at each evaluation, on every rank alike; nothing of the training depends on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.generation.generate import Language, Watcher, continue_prompts
from stablelm.evaluate.generation.prompts import Prompt, encode_prompts
from stablelm.evaluate.generation.sampling import Sampling
from stablelm.train.prepare import Prepared


@dataclass(frozen=True)
class Samples:
    """The prompts of `evaluate.samples`, and how they are continued: by the likeliest tokens."""

    texts: list[str]
    prompts: list[Prompt]
    language: Language
    rows: int
    new_tokens: int

    def write(self, engine: Engine, ranks: Ranks, reached: Callable[[str], None]) -> list[dict[str, str]]:
        """`prompt` and `text` of each. `reached` is called before each token on all ranks alike, and may raise."""
        was_training = engine.module.training
        engine.module.eval()
        try:
            watcher = Watcher(agree=lambda tokens: of_first_rank(tokens, ranks), reached=reached)
            sampling = Sampling(self.new_tokens, temperature=0)
            found = continue_prompts(self.language, self.prompts, sampling, batch_size=self.rows, watcher=watcher)
        finally:
            engine.module.train(was_training)
        return [{"prompt": text, "text": each.text} for text, each in zip(self.texts, found, strict=True)]


def build_samples(prepared: Prepared, engine: Engine) -> Samples:
    """The samples that a run asks for, maybe none."""
    config, tokenizer = prepared.config, prepared.tokenizer
    asked = config.evaluate
    prompts = encode_prompts(asked.samples, tokenizer, config.model, new_tokens=asked.sample_tokens)
    language = Language(engine.logits, config.model, tokenizer, engine.device)
    return Samples(asked.samples, prompts, language, asked.micro_batch_size, asked.sample_tokens)


def of_first_rank(tokens: list[int], ranks: Ranks) -> list[int]:
    """Rank 0's tokens: where ranks round differently, they would part, and a sharded model needs all of them."""
    if ranks.cpu_group is None:
        return tokens
    ranks.passed()
    shared = torch.tensor(tokens)
    dist.broadcast(shared, src=0, group=ranks.cpu_group)
    return shared.tolist()
