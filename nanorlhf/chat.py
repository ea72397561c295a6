"""Conversations as token ids: one pass gives the ids and the mask of what the assistant says.

    <|user|>CONTENT<|end|><|assistant|>CONTENT<|end|>

The format is this package's own. Content is encoded as plain text, so text that spells a special token cannot end a
turn or open one.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanorlhf.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
END = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, SYSTEM, END)
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


def _check(tok: Tokenizer, messages: Sequence[dict], generation_prompt: bool) -> None:
    missing = [text for text in SPECIAL_TOKENS if text not in tok.special_tokens]
    if missing:
        raise ValueError(f"chat.render: expected a tokenizer with the special token {missing[0]}, got one without it")
    if not messages:
        raise ValueError("chat.render: expected at least one message, got none")
    for message in messages:
        if message.get("role") not in ROLES:
            raise ValueError(f"chat.render: expected a role among {', '.join(ROLES)}, got {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"chat.render: expected content of type str, got {type(message.get('content')).__name__}")
    if not generation_prompt and all(message["role"] != "assistant" for message in messages):
        raise ValueError("chat.render: expected an assistant message or generation_prompt=True, got neither")


def render(tok: Tokenizer, messages: Sequence[dict], generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """The ids of a conversation and, for each, 1 if the assistant is to learn to say it, else 0.

    messages           {"role": "user", "assistant" or "system", "content": str}, in order
    generation_prompt  end with <|assistant|>, for a model to go on from

    The mask covers the assistant's content and the <|end|> after it. Raises ValueError for no messages, an unknown
    role, content that is not a str, or a conversation whose mask would be empty although no answer is to be generated.

    >>> tok = Tokenizer.train([], 256 + len(SPECIAL_TOKENS), special_tokens=SPECIAL_TOKENS)
    >>> ids, mask = render(tok, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    >>> tok.decode(ids), mask
    ('<|user|>hi<|end|><|assistant|>yo<|end|>', [0, 0, 0, 0, 0, 1, 1, 1])
    """
    _check(tok, messages, generation_prompt)
    special = tok.special_tokens
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        said = [*tok.encode(message["content"]), special[END]]
        ids += [special[ROLES[message["role"]]], *said]
        mask += [0, *[int(message["role"] == "assistant")] * len(said)]
    if generation_prompt:
        ids.append(special[ASSISTANT])
        mask.append(0)
    return ids, mask
