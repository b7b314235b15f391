"""New tokenizers from text: SentencePiece models and byte-level BPE."""

import io
import random
import re
from collections.abc import Iterable

from stablelm.errors import ConfigError

# A longer line is cut, so that SentencePiece neither skips it nor slows down on it.
LONGEST_LINE = 4096
END_OF_TEXT = "<|endoftext|>"

_WITH_ENDS = re.compile(r"[^\n]+\n*")


def sample_lines(texts: Iterable[str], count: int, seed: int, *, ends: bool = False) -> list[str]:
    """At most `count` non-blank lines, drawn uniformly (reservoir sampling); the same ones for the same texts and seed.

    Lines are what SentencePiece trains on: a newline is never part of a piece, byte fallback writes it as one id.
    `ends`: with the newlines that follow them, of which byte-level BPE makes pieces.
    """
    draw = random.Random(seed)
    kept: list[str] = []
    seen = 0
    for text in texts:
        for line in _WITH_ENDS.findall(text) if ends else text.split("\n"):
            if not line.strip():
                continue
            line = line[:LONGEST_LINE]
            if len(kept) < count:
                kept.append(line)
            elif (place := draw.randrange(seen + 1)) < count:
                kept[place] = line
            seen += 1
    return kept


def train(lines: Iterable[str], *, vocab_size: int, model_type: str = "unigram", key: str = "vocab_size") -> bytes:
    """Content of a new SentencePiece `.model` file; equal lines give equal bytes.

    Unknown characters fall back to bytes and nothing is normalised, so that decode(encode(text)) == text.
    Ids: 0 unknown, 1 eos, then 256 bytes, then the learned pieces; there is no bos.

    Raises ConfigError under `key` when this text cannot give `vocab_size` pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * LONGEST_LINE + 1,
            # Partial sums are added thread by thread, so another number would give other scores.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: {vocab_size} pieces cannot be learned from this text, {_possible(str(error))}"
        ) from None
    return model.getvalue()


def _possible(error: str) -> str:
    """The fix that SentencePiece's message contains, without the options that it names."""
    if most := re.search(r"value <= (\d+)", error):
        return f"it gives at most {most[1]}; give fewer pieces or more text"
    if least := re.search(r"required_chars. \d+ vs (\d+)", error):
        return f"it needs at least {least[1]}; give more pieces"
    reason = " ".join(error.rsplit("] ", 1)[-1].split()).rstrip(".")
    return f"there is too little of it{f' ({reason})' if reason else ''}; give more text"


def train_byte_level(lines: Iterable[str], *, vocab_size: int, key: str = "vocab_size") -> bytes:
    """Content of a new `tokenizer.json`: byte-level BPE in GPT-2's form; equal lines give equal bytes.

    Every text is a sequence of bytes, so that decode(encode(text)) == text and nothing is unknown.
    Ids: 0 `<|endoftext|>`, which ends documents, then 256 bytes, then the learned pieces; there is no bos.

    Raises ConfigError under `key` when this text cannot give `vocab_size` pieces.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 1
    learned = f"{key}: {vocab_size} pieces cannot be learned from this text"
    if vocab_size < least:
        raise ConfigError(f"{learned}, it needs at least {least}; give more pieces")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ConfigError(f"{learned}, it gives at most {found}; give fewer pieces or more text")
    return (tokenizer.to_str(pretty=True) + "\n").encode()
