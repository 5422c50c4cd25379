"""Log-probabilities in the two shapes of OpenAI's API: a list of objects for chat, parallel lists for completions."""

from collections.abc import Sequence

from llm_code.module_interface.interface import Engine, Token
from llm_code.service.replies import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob

LOWEST = -9999.0  # JSON has no -Infinity


def chat_logprobs(engine: Engine, tokens: Sequence[Token]) -> ChatLogprobs:
    """The tokens' texts join to the content: of a character in pieces, the last token has all and the others ""."""
    return ChatLogprobs(content=[_chat_token(engine, token) for token in tokens])


def _chat_token(engine: Engine, token: Token) -> TokenLogprob:
    alternatives = [
        TopLogprob(token=_text(engine, token, place), logprob=_finite(logprob), bytes=_bytes(engine, identifier))
        for place, (identifier, logprob) in enumerate(token.alternatives)
    ]
    return TokenLogprob(
        token=token.text,
        logprob=_finite(token.logprob),
        bytes=_bytes(engine, token.id) if token.id >= 0 else list(token.text.encode("utf-8")),
        top_logprobs=alternatives,
    )


def _text(engine: Engine, token: Token, place: int) -> str:
    return (
        token.alternative_texts[place] if token.alternative_texts else engine.token_text(token.alternatives[place][0])
    )


def _bytes(engine: Engine, token_id: int) -> list[int] | None:
    return list(engine.token_bytes(token_id)) if token_id >= 0 else None


def _finite(logprob: float | None) -> float:
    return max(logprob, LOWEST) if logprob is not None else LOWEST


def text_logprobs(engine: Engine, tokens: Sequence[Token], offset: int) -> TextLogprobs:
    """`offset` is the position of the first token in the choice's text.

    Tokens are named by their own bytes, so that two of them never share a key of `top_logprobs`.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(
        tokens=[_own_name(engine, token) for token in tokens],
        token_logprobs=[None if token.logprob is None else _finite(token.logprob) for token in tokens],
        top_logprobs=[_top(engine, token) for token in tokens],
        text_offset=offsets,
    )


def _top(engine: Engine, token: Token) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    texts = token.alternative_texts or [""] * len(token.alternatives)
    named = zip(token.alternatives, texts, strict=True)
    top = {_name(engine, identifier, text): _finite(logprob) for (identifier, logprob), text in named}
    top.setdefault(_own_name(engine, token), _finite(token.logprob))
    return top


def _own_name(engine: Engine, token: Token) -> str:
    """Of a token whose id an upstream server does not tell: the alternative it is, by its log-probability."""
    if token.id < 0:
        for text, (_, logprob) in zip(token.alternative_texts, token.alternatives, strict=False):
            if logprob == token.logprob:
                return text
    return _name(engine, token.id, token.text)


def _name(engine: Engine, token_id: int, text: str) -> str:
    if token_id < 0:
        return text
    name = engine.token_text(token_id)
    if "\ufffd" not in name:
        return name
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in engine.token_bytes(token_id))
