"""Texts that a model is to continue, as tokens, and what is wrong with them (torch-free)."""

from collections.abc import Sequence
from dataclasses import dataclass

from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.tokenizers.interface import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """The tokens that are continued; `number` tells several samples of equal prompts apart."""

    tokens: list[int]
    number: int = 0


def encode_prompts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    new_tokens: int,
    samples: int = 1,
    label: str = "",
    limit: str = "max_new_tokens",
) -> list[Prompt]:
    """`samples` prompts for each text, one after the other.

    Raises ConfigError, for all of them at once, where a text has no tokens or leads beyond a learned table of
    positions; `label` comes before each sentence, and `limit` is the name of `new_tokens` in it.
    """
    found: list[Prompt] = []
    wrong: list[str] = []
    begin = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        name = f"{label}prompt {number}"
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of an argument, or half of a pair in JSON
            wrong.append(f"{name} is not Unicode text; write it in UTF-8")
            continue
        tokens = tokenizer.encode(text)
        if not tokens:
            wrong.append(f"{name} is empty; give it at least a word")
        tokens = [*begin, *tokens]
        wrong += _too_long(len(tokens), model, new_tokens, name, limit)
        first = seen.get(text, 0)
        seen[text] = first + samples
        found += [Prompt(tokens, first + sample) for sample in range(samples)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def beyond_training(prompts: Sequence[Prompt], model: ModelConfig, new_tokens: int) -> str:
    """A sentence where positions go beyond those of training, '' where they do not."""
    longest, trained = max((len(prompt.tokens) for prompt in prompts), default=0), model.max_seq_len
    if trained is None or longest + new_tokens <= trained:
        return ""
    return (
        f"{longest} tokens of a prompt and {new_tokens} new ones go beyond the {trained} tokens (model.max_seq_len) "
        "that the model was trained on"
    )


def _too_long(tokens: int, model: ModelConfig, new: int, name: str, limit: str) -> list[str]:
    """The sentence for a prompt that a learned table of positions cannot hold with its continuation, if it cannot."""
    most = model.max_seq_len
    if not model.axes.position.adds_table or most is None or tokens + new <= most:
        return []
    fix = f"ask for at most {most - tokens} new tokens, or shorten it" if tokens < most else "shorten it"
    return [
        f"{name} has {tokens} tokens, with {limit}={new} more than the {most} positions of the model's table "
        f"(model.max_seq_len); {fix}"
    ]
