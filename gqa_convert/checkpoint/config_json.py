"""Edits JSON as text: what is not edited keeps every byte (number spelling, order, indentation, line ends).

Other programs read a config.json in spellings that a parse-and-dump would lose (`1e-05`, `rope_theta` beside
`rope_parameters`, key order); only the values that must change may change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gqa_convert.errors import CheckpointError

Path = tuple[str, ...]
"""Keys from the root object down to a value."""

_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
)

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SCALAR = re.compile(r"[^\s,\]}]+")
_BOM = "\ufeff"


@dataclass
class _Value:
    start: int
    end: int
    members: list[_Member] | None = None
    """The members, if the value is an object."""

    def last(self, key: str) -> _Member | None:
        """The member that counts: of a repeated key, JSON readers keep the last."""
        return next((member for member in reversed(self.members or []) if member.key == key), None)


@dataclass
class _Member:
    key: str
    start: int
    """Where the key's opening quote stands."""
    key_end: int
    value: _Value = field(repr=False)


def edit_json(
    text: str,
    edits: Mapping[Path, Any],
    removals: Iterable[Path] = (),
    *,
    after: Mapping[Path, str] | None = None,
) -> str:
    """Set and remove values of a JSON object, leaving every other character as it is.

    A value that already equals the wanted one is not respelled. A missing key is added in the style of its siblings.

    Args:
        text: JSON whose root is an object; a byte-order mark and any line ends are kept.
        edits: new values by path. All but the last key of a path must exist and hold objects.
        removals: paths to drop; those that do not exist are ignored.
        after: for a path in `edits` that is missing, the sibling key behind which to add it (default: at the end).

    Returns:
        The edited text.

    Raises:
        CheckpointError: if the text is not a JSON object, or a path's parent is missing or not an object.
    """
    for path in removals:
        text = _remove(text, path)
    for path, value in edits.items():
        text = _set(text, path, value, (after or {}).get(path))
    return text


def _set(text: str, path: Path, value: Any, after: str | None) -> str:
    root = _scan_root(text)
    parent = _parent(root, path)
    member = parent.last(path[-1])
    style = _Style.of(text, root)
    if member is not None:
        span = slice(member.value.start, member.value.end)
        if _canonical(json.loads(text[span])) == _canonical(value):
            return text
        return text[: span.start] + style.spell(value, _lead(text, member.start)) + text[span.stop :]
    name = json.dumps(path[-1])
    sibling = (parent.last(after) if after else None) or (parent.members[-1] if parent.members else None)
    if sibling is None:
        at = parent.start + 1
        return text[:at] + name + style.colon + style.spell(value, "") + text[at:]
    at = sibling.value.end
    colon = text[sibling.key_end : sibling.value.start]
    lead = _lead(text, sibling.start)
    if "\n" not in lead and sibling is (parent.members or [sibling])[0]:
        # The first of a line has no comma before it, so nothing shows how wide the gap after one is.
        lead = " " if colon.endswith(" ") else ""
    return text[:at] + "," + lead + name + colon + style.spell(value, lead) + text[at:]


def _remove(text: str, path: Path) -> str:
    try:
        parent = _parent(_scan_root(text), path)
    except _MissingParent:
        return text
    members = parent.members or []
    for i in reversed(range(len(members))):
        if members[i].key != path[-1]:
            continue
        if i > 0:
            start, end = members[i - 1].value.end, members[i].value.end
        elif len(members) > 1:
            start, end = members[i].start, members[i + 1].start
        else:
            start, end = parent.start + 1, members[i].value.end
        text = text[:start] + text[end:]
        members = _parent(_scan_root(text), path).members or []
    return text


class _MissingParent(CheckpointError):
    """A path runs through something that is no object."""


def _parent(root: _Value, path: Path) -> _Value:
    if not path:
        raise _MissingParent("an empty path names no value of config.json.")
    here = root
    for depth, key in enumerate(path[:-1]):
        member = here.last(key)
        if member is None or member.value.members is None:
            what = "is missing" if member is None else "is not an object"
            raise _MissingParent(
                f"cannot set {'.'.join(path)!r} in config.json: {'.'.join(path[: depth + 1])!r} {what}."
            )
        here = member.value
    return here


def _lead(text: str, at: int) -> str:
    """The white space directly before position `at`."""
    start = at
    while start > 0 and text[start - 1] in " \t\r\n":
        start -= 1
    return text[start:at]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class _Style:
    """How the text is laid out: one level of indentation (empty: on one line), line ends, the colon."""

    indent: str
    newline: str
    colon: str

    @classmethod
    def of(cls, text: str, root: _Value) -> _Style:
        if not root.members:
            return cls("", "\n", ": ")
        first = root.members[0]
        lead = _lead(text, first.start)
        return cls(
            lead.rpartition("\n")[2] if "\n" in lead else "",
            "\r\n" if "\r\n" in lead else "\n",
            text[first.key_end : first.value.start],
        )

    def spell(self, value: Any, lead: str) -> str:
        """Spell a value that stands on a line indented like `lead`."""
        if not self.indent or "\n" not in lead:
            return json.dumps(value)
        return json.dumps(value, indent=self.indent).replace("\n", self.newline + lead.rpartition("\n")[2])


def _scan_root(text: str) -> _Value:
    body = text.removeprefix(_BOM)
    try:
        value = json.loads(body)
        root = _scan(text, _skip(text, len(text) - len(body)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"config.json is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json holds a {type(value).__name__}, not a JSON object.")
    return root


def _skip(text: str, at: int) -> int:
    return _end(_SPACE, text, at)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None
    return match.end()


def _scan(text: str, at: int) -> _Value:
    """Find the extent of the value at `at`, in text that `json.loads` has already accepted."""
    if text[at] == '"':
        return _Value(at, _end(_STRING, text, at))
    if text[at] not in "{[":
        return _Value(at, _end(_SCALAR, text, at))
    return _scan_object(text, at) if text[at] == "{" else _scan_array(text, at)


def _scan_object(text: str, start: int) -> _Value:
    members: list[_Member] = []
    at = _skip(text, start + 1)
    while text[at] != "}":
        key_end = _end(_STRING, text, at)
        value = _scan(text, _skip(text, _skip(text, key_end) + 1))
        members.append(_Member(json.loads(text[at:key_end]), at, key_end, value))
        at = _next(text, value.end)
    return _Value(start, at + 1, members)


def _scan_array(text: str, start: int) -> _Value:
    at = _skip(text, start + 1)
    while text[at] != "]":
        at = _next(text, _scan(text, at).end)
    return _Value(start, at + 1)


def _next(text: str, at: int) -> int:
    """Step over white space and a comma."""
    at = _skip(text, at)
    return _skip(text, at + 1) if text[at] == "," else at


def stated_context(read: Callable[[str], Any]) -> int | None:
    """Return the context length, in tokens, that a decoder's configuration states; None if it states none.

    `read` gives a setting's value by name, None where it is missing.
    """
    for name in _CONTEXT_NAMES:
        value = read(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
