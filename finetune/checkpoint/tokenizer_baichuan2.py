"""Baichuan2's sentencepiece model -> a Hugging Face fast tokenizer with the same ids, and the ids to compare with.

sentencepiece joins the pair whose result has the best score; a fast tokenizer joins the pair that stands first in its
merge list. So the list holds every split of every ordinary piece in score order (in Baichuan2's model the order of ids
is another one).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.checkpoint.chat_templates import BAICHUAN2_TEMPLATE
from finetune.errors import UserError

USER_TOKEN, USER_ID = "<reserved_106>", 195
ASSISTANT_TOKEN, ASSISTANT_ID = "<reserved_107>", 196
SPACE = "\u2581"


def read_model(path: Path) -> Any:
    """The parsed sentencepiece model. Raises UserError if it is missing, damaged or without Baichuan2's options."""
    if not path.exists():
        raise UserError(f"{path} is missing: it is the vocabulary. Run the download step again.")
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path}: not a sentencepiece model ({error}). Download the file again.") from error
    check_options(path, model)
    return model


def check_options(path: Path, model: Any) -> None:
    """Raise UserError unless the conversion below is exact for this model."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    found = {
        "model_type": trainer.ModelType.Name(trainer.model_type),
        "byte_fallback": trainer.byte_fallback,
        "normalizer": normalizer.name,
        "add_dummy_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "piece 195": model.pieces[USER_ID].piece if len(model.pieces) > ASSISTANT_ID else None,
        "piece 196": model.pieces[ASSISTANT_ID].piece if len(model.pieces) > ASSISTANT_ID else None,
    }
    expected = ("BPE", True, "identity", False, False, USER_TOKEN, ASSISTANT_TOKEN)
    wrong = [
        f"{key} {value!r} (expected {want!r})"
        for (key, value), want in zip(found.items(), expected, strict=True)
        if value != want
    ]
    if wrong:
        raise UserError(f"{path}: not the tokenizer of a Baichuan2 model: {', '.join(wrong)}.")


def merges_by_score(pieces: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into an ordinary piece, best score first, then lowest id."""
    known = {piece.piece for piece in pieces}
    ordinary = [(-piece.score, i, piece.piece) for i, piece in enumerate(pieces) if piece.type == piece.NORMAL]
    return [
        (text[:cut], text[cut:])
        for _, _, text in sorted(ordinary)
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]


def build_tokenizer(model: Any) -> Any:
    """A tokenizers.Tokenizer: spaces as U+2581, BPE with byte fallback, user-defined pieces matched first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = model.pieces
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(pieces)},
            merges=merges_by_score(pieces),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    controls = [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    controls += [USER_TOKEN, ASSISTANT_TOKEN]
    defined = [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED and piece.piece not in controls]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in controls])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in defined])
    return tokenizer


def token_ids(source: Path) -> dict[str, int]:
    """Role of a token -> id, read from the source folder."""
    trainer = read_model(source / "tokenizer.model").trainer_spec
    return {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.unk_id}


def write_tokenizer(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from finetune.checkpoint.tokenizer_files import write_tokenizer_files

    model = read_model(source / "tokenizer.model")
    if len(model.pieces) != config["vocab_size"]:
        raise UserError(
            f"tokenizer.model has {len(model.pieces)} pieces, config.json vocab_size {config['vocab_size']}: the two "
            "belong to different models."
        )
    settings = {
        "additional_special_tokens": [USER_TOKEN, ASSISTANT_TOKEN],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": config["max_position_embeddings"],
        "pad_token": "<unk>",
        "unk_token": "<unk>",
    }
    write_tokenizer_files(target, build_tokenizer(model), settings, BAICHUAN2_TEMPLATE)


def reference_ids(source: Path, texts: Iterable[str]) -> list[list[int]]:
    """What the published tokenizer gives: sentencepiece, but <s>, </s> and <unk> in the text are control tokens."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    controls = {"<unk>": processor.unk_id(), "<s>": processor.bos_id(), "</s>": processor.eos_id()}

    def encode(text: str) -> list[int]:
        parts = re.split("(<unk>|<s>|</s>)", text)
        return [i for part in parts for i in ([controls[part]] if part in controls else processor.encode(part))]

    return [encode(text) for text in texts]
