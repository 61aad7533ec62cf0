"""Conversations: rows of messages, made tokens by the model's own chat template, with the assistant's turns marked.

A conversation travels through the data room as every document does, as a text: `Conversation`, the JSON of its messages
(and tools). So it is hashed, held out, sharded and resumed like any other; what turns it into tokens is `ChatTemplate`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gqa_convert.errors import UsageError

COLUMNS = ("messages", "conversations")
"""Columns that are looked for messages in where a row has no text."""
PAIRS = (("input", "target"), ("inputs", "targets"), ("prompt", "completion"))
"""Columns of a text and of what is to be answered, where a row has neither text nor messages."""
LOSSES = ("assistant", "all")
UNSCORED = 1 << 30
"""Added to a token's id where the token is context and not to be predicted: no vocabulary reaches so far."""
TOKEN = UNSCORED - 1
"""Mask that leaves the id itself."""
_MARK = "{% generation"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Names of roles in rows of `from` and `value` (ShareGPT's), in the templates' words."""
_SHOWN = 120


class Conversation(str):
    """One conversation as JSON: `{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`."""

    __slots__ = ()

    @property
    def parsed(self) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Its messages, and its tools if there are any."""
        values = json.loads(self)
        return values["messages"], values.get("tools")

    @property
    def plain(self) -> str:
        """What is said in it, without roles."""
        return "\n".join(str(message.get("content") or "") for message in self.parsed[0])


def conversation(row: dict[str, Any], column: str) -> Conversation | None:
    """The conversation that a row holds; None if the row has text under `column`, or no messages at all.

    Args:
        row: of a file or a dataset. Messages are a list of `{role, content}`, or of `{from, value}`; a text and its
            answer under `PAIRS` are two of them.
        column: where to look first; where it is not there, in `COLUMNS`.

    Raises:
        ValueError: saying what is wrong with messages that are none.
    """
    names = (column,) if row.get(column) is not None else () if row.get("text") is not None else COLUMNS
    name = next((name for name in names if _is_list_of_objects(row.get(name))), None)
    if name is None:
        return _pair(row) if row.get(column) is None and row.get("text") is None else None
    messages = [_message(entry, name, number) for number, entry in enumerate(row[name], start=1)]
    if not messages:
        return Conversation("")
    values: dict[str, Any] = {"messages": messages}
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"its field 'tools' is text, but not JSON ({error})") from error
    if tools:
        values["tools"] = _without_nulls(tools)
    return _as_json(values)


def _pair(row: dict[str, Any]) -> Conversation | None:
    """Rows of a text and its answer, as a conversation of two turns."""
    for said, answered in PAIRS:
        texts = row.get(said), row.get(answered)
        if all(isinstance(text, str) for text in texts):
            turns = zip(("user", "assistant"), texts, strict=True)
            return _as_json({"messages": [{"role": role, "content": text} for role, text in turns]})
    return None


def _as_json(values: dict[str, Any]) -> Conversation:
    text = json.dumps(values, ensure_ascii=False, sort_keys=True)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"its messages hold half a surrogate pair ({text[error.start]!a})") from error
    return Conversation(text)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and (not value or any(isinstance(entry, dict) for entry in value))


def _message(entry: Any, name: str, number: int) -> dict[str, Any]:
    where = f"message {number} under {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {type(entry).__name__}, not an object with role and content")
    message: dict[str, Any] = _without_nulls(entry)
    if "role" not in message and "from" in message:
        role = str(message.pop("from"))
        message = {"role": _ROLES.get(role, role), "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} has no role; it has {', '.join(map(str, entry)) or 'nothing'}")
    if message.get("content") is None and not any(key in message for key in ("tool_calls", "reasoning_content")):
        raise ValueError(f"{where} ({message['role']}) has no content")
    return message


def _without_nulls(value: Any) -> Any:
    """Tables give every struct every field: what is null was not in the row that was written."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation as the model reads it.

    Attributes:
        text: what the template makes of it.
        ids: its tokens.
        assistant: for each token whether the assistant says it, the end of the turn included.
        ends: for each token how many characters of `text` it and those before it cover; None without a fast tokenizer.
    """

    text: str
    ids: NDArray[np.int64]
    assistant: NDArray[np.bool_]
    ends: list[int] | None


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Where it marks what the assistant says (`{% generation %}`), transformers' own mask is taken. Elsewhere an
    assistant's turn is what a longer rendering adds to that of the turns before it with a generation prompt; a template
    for which one is no beginning of the other is refused, since there is no telling then what the assistant says.

    Raises:
        UsageError: if the tokenizer has no template.
    """

    tokenizer: Any

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                "data: the rows hold messages, and the model's tokenizer has no chat template. Put the original's "
                "chat_template.jinja beside the weights, or give rows of text."
            )

    @property
    def marks(self) -> bool:
        """Whether the template says itself what the assistant says."""
        template = self.tokenizer.chat_template
        whole = template if isinstance(template, str) else " ".join(map(str, template.values()))
        return _MARK in whole.replace("{%-", "{%")

    @property
    def way(self) -> str:
        """How the assistant's turns are told, in words."""
        return "the template's generation marks" if self.marks else "renderings with and without each turn"

    @cached_property
    def _fast(self) -> bool:
        return bool(getattr(self.tokenizer, "is_fast", False))

    def render(self, document: Conversation, *, spans: bool = True) -> Rendered:
        """Make a conversation tokens.

        Args:
            document: the conversation.
            spans: find out what the assistant says; without, every token counts as the assistant's.

        Raises:
            UsageError: if the template refuses the conversation, or does not tell its turns apart.
        """
        messages, tools = document.parsed
        text = self._text(messages, tools)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self._fast, verbose=False)
        ids = np.asarray(coded["input_ids"], dtype=np.int64)
        ends: list[int] | None = None
        offsets: list[tuple[int, int]] = []
        if self._fast:
            offsets = list(coded["offset_mapping"])
            ends = list(np.maximum.accumulate([end for _, end in offsets])) if offsets else []
        if not spans:
            return Rendered(text, ids, np.ones(len(ids), dtype=bool), ends)
        if self.marks:
            assistant = self._marked(messages, tools, ids)
        elif self._fast:
            assistant = np.zeros(len(ids), dtype=bool)
            for start, end in self._turns(messages, tools, text):
                assistant |= np.array([a < end and b > start for a, b in offsets], dtype=bool)
        else:
            assistant = self._by_tokens(messages, tools, text, ids)
        return Rendered(text, ids, assistant, ends)

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template raises what it likes, and jinja what it must
            words = " ".join(str(error).split())[:200]
            raise UsageError(
                f"data: the chat template refuses a conversation ({words or type(error).__name__}). It begins "
                f"{_beginning(messages)}."
            ) from error
        return str(rendered)

    def _turns(self, messages: list[dict[str, Any]], tools: list[Any] | None, text: str) -> list[tuple[int, int]]:
        """Where in the text the assistant speaks: from behind the generation prompt to the end of the turn."""
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], tools, prompt=True) if number else None
            behind = text if number + 1 == len(messages) else self._text(messages[: number + 1], tools)
            if before is None or not behind.startswith(before) or not text.startswith(behind):
                raise UsageError(
                    f"data: the chat template does not tell what the assistant says in turn {number + 1}: with the "
                    "turn the rendering does not go on where it stopped without (it begins "
                    f"{_beginning(messages)}). Mark the turns by {{% generation %}} in the template, or set "
                    "data.loss_on to all."
                )
            # What stands between turns (a line end, mostly) belongs to nobody.
            turns.append((len(before), max(len(before), len(behind.rstrip()))))
        return turns

    def _marked(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, ids: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        try:
            coded = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            raise UsageError(f"data: the chat template's generation marks cannot be followed ({words}).") from error
        if list(coded["input_ids"]) != ids.tolist():
            raise UsageError("data: the chat template gives other tokens with generation marks than without.")
        return np.asarray(coded["assistant_masks"], dtype=bool)

    def _by_tokens(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, text: str, ids: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Without offsets: the tokens of a beginning must be the beginning of the tokens."""
        assistant = np.zeros(len(ids), dtype=bool)
        for start, end in self._turns(messages, tools, text):
            parts = [self.tokenizer(text[:cut], add_special_tokens=False)["input_ids"] for cut in (start, end)]
            if any(ids[: len(part)].tolist() != list(part) for part in parts):
                raise UsageError(
                    "data: the tokenizer joins a turn of the assistant's with what stands beside it. Give the model a "
                    "fast tokenizer (tokenizer.json), or set data.loss_on to all."
                )
            assistant[len(parts[0]) : len(parts[1])] = True
        return assistant


def _beginning(messages: list[dict[str, Any]]) -> str:
    said = f"{messages[0]['role']}: {messages[0].get('content')}"
    return repr(said if len(said) <= _SHOWN else said[:_SHOWN] + " ...")
