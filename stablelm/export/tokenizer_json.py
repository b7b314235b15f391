"""A SentencePiece model as a tokenizer.json of the `tokenizers` library that gives the same ids.

transformers' own converter was tried: it takes text for special tokens and byte pieces where SentencePiece does not,
and puts a pre-tokenizer in front that the model has not.
"""

import re
from typing import Any

from stablelm.errors import ConfigError

SPACE = "\u2581"
"""What SentencePiece writes a space as."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of pieces, as sentencepiece_model.proto numbers them."""
UNIGRAM, BPE = 1, 2


def from_sentencepiece(content: bytes, *, begin: str | None = None) -> str:
    """The text of tokenizer.json; `begin`: the piece that documents begin with.

    Raises ConfigError for models that are neither unigram nor BPE, or mark words at their ends.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(content)
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        raise ConfigError(
            "the run's SentencePiece model is neither unigram nor BPE with marks at the begin of words, which no "
            "tokenizer.json computes; use --format gguf, or train with another tokenizer"
        )
    tokenizer = Tokenizer(_unigram(proto) if trainer.model_type == UNIGRAM else _bpe(proto))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(spec))
    if trainer.model_type == UNIGRAM and (cuts := _cuts(proto)):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    own = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and trainer.model_type == BPE]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    if begin is not None:
        template, pair = f"{begin} $A", f"{begin} $A {begin} $B"
        ids = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=ids)
    return tokenizer.to_str()


def _unigram(proto: Any) -> Any:
    from tokenizers import models

    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL] or [0.0]
    # A piece that text never gives scores less than any way to write its characters, if there is one (see `_cuts`).
    never = (min(scores) - 10) * (1 + max(len(piece.piece) for piece in proto.pieces))

    def score(piece: Any) -> float:
        if piece.type == USER_DEFINED:
            return len(piece.piece.encode()) * max(scores) - 0.1  # as SentencePiece has it, so that it is taken whole
        return piece.score if piece.type == NORMAL else never

    vocabulary = [(piece.piece, score(piece)) for piece in proto.pieces]
    return models.Unigram(vocabulary, unk_id=_unknown(proto)[0], byte_fallback=proto.trainer_spec.byte_fallback)


def _cuts(proto: Any) -> str:
    """A pattern of what text is cut behind, so that it gives no control, unknown or byte piece by its name.

    Needed where a character of the name is in no piece, as `<` often is: any piece is better than an unknown one. No
    piece is cut, since none has that character.
    """
    known = {character for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED) for character in piece.piece}
    cuts: dict[str, list[str]] = {}
    for name in (piece.piece for piece in proto.pieces if piece.type in (CONTROL, UNKNOWN, BYTE)):
        unknown = [character not in known for character in name]
        # Bytes are written one by one, but several unknown characters in a row are one unknown piece.
        apart = any if proto.trainer_spec.byte_fallback else (lambda sides: len(set(sides)) == 2)
        place = next((at for at in range(1, len(name)) if apart(unknown[at - 1 : at + 1])), None)
        if place is not None:
            cuts.setdefault(re.escape(name[:place]), []).append(re.escape(name[place:]))
    return "|".join(f"{begin}(?={'|'.join(rests)})" for begin, rests in cuts.items())


def _bpe(proto: Any) -> Any:
    """SentencePiece merges the two neighbours that make the piece of the best score, whatever they are."""
    from tokenizers import models

    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        (score, (whole[:cut], whole[cut:]))
        for whole, score in scores.items()
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    merges.sort(key=lambda merge: -merge[0])
    return models.BPE(
        vocabulary,
        [pair for _, pair in merges],
        unk_token=_unknown(proto)[1],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unknown(proto: Any) -> tuple[int, str]:
    """Every SentencePiece model has such a piece."""
    return next((number, piece.piece) for number, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)


def _normalizers(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    found: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        found += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        found.append(normalizers.Prepend(SPACE if spec.escape_whitespaces else " "))
    if spec.escape_whitespaces:
        found.append(normalizers.Replace(" ", SPACE))
    return found
