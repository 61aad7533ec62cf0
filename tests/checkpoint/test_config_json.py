from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_convert.checkpoint.config_json import edit_json
from gqa_convert.errors import CheckpointError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, width=32)
    | st.text(max_size=6)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)
LAYOUTS = st.sampled_from(
    [
        {},
        {"indent": 2},
        {"indent": 4},
        {"indent": "\t"},
        {"separators": (",", ":")},
        {"indent": 2, "ensure_ascii": False},
        {"indent": 0},
    ]
)


def paths(node: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of every object of a JSON value."""
    if not isinstance(node, dict):
        return []
    return [prefix] + [path for key, value in node.items() for path in paths(value, (*prefix, key))]


def set_in(node: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(node)
    here = result
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return result


@settings(max_examples=120, deadline=None)
@given(data=st.data(), before=OBJECTS, layout=LAYOUTS, crlf=st.booleans(), bom=st.booleans(), end=st.booleans())
def test_editing_the_text_is_editing_the_value(
    data: st.DataObject, before: dict[str, Any], layout: dict[str, Any], crlf: bool, bom: bool, end: bool
) -> None:
    text = json.dumps(before, **layout) + ("\n" if end else "")
    text = ("\ufeff" if bom else "") + (text.replace("\n", "\r\n") if crlf else text)
    parent = data.draw(st.sampled_from(paths(before)))
    path = (*parent, data.draw(st.text(max_size=4)))
    value = data.draw(VALUES)

    edited = edit_json(text, {path: value})

    assert json.loads(edited.removeprefix("\ufeff")) == set_in(before, path, value)
    assert edited.startswith("\ufeff") == bom
    assert edited.endswith("\n") == text.endswith("\n")
    if crlf:
        assert edited.count("\n") == edited.count("\r\n")
    # A key that was added leaves no trace when it is removed again.
    here: Any = before
    for key in parent:
        here = here[key]
    if path[-1] not in here:
        assert edit_json(edited, {}, [path]) == text
    # What already holds is not touched.
    assert edit_json(edited, {path: value}) == edited


@settings(max_examples=50, deadline=None)
@given(data=st.data(), before=OBJECTS, layout=LAYOUTS)
def test_removing_from_the_text_is_removing_from_the_value(
    data: st.DataObject, before: dict[str, Any], layout: dict[str, Any]
) -> None:
    candidates = [(*parent, key) for parent in paths(before) for key in _at(before, parent)]
    path = data.draw(st.sampled_from(candidates)) if candidates else ("missing",)

    edited = edit_json(json.dumps(before, **layout), {}, [path])

    expected = copy.deepcopy(before)
    if candidates:
        _at(expected, path[:-1]).pop(path[-1])
    assert json.loads(edited) == expected
    assert list(json.loads(edited)) == list(expected)


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


CONFIG = """{
  "architectures": ["LlamaForCausalLM"],
  "rms_norm_eps": 1e-05,
  "num_key_value_heads" : 32,
    "text_config": {"rope_theta": 1000000.0, "heads": 8},
  "big": 1E6, "odd":   "caf\\u00e9 \\"{[,]}\\"",
  "empty": {},
  "none": null
}
"""


def test_only_the_edited_value_changes() -> None:
    edited = edit_json(CONFIG, {("num_key_value_heads",): 4, ("text_config", "heads"): 2})

    assert edited == CONFIG.replace('heads" : 32', 'heads" : 4').replace('"heads": 8', '"heads": 2')


def test_new_keys_follow_the_style_of_their_siblings() -> None:
    edited = edit_json(
        CONFIG,
        {("head_dim",): 64, ("text_config", "kv"): 2, ("empty", "a"): True, ("list",): [1, 2]},
        after={("head_dim",): "rms_norm_eps"},
    )

    assert '"rms_norm_eps": 1e-05,\n  "head_dim": 64,\n  "num_key_value_heads"' in edited
    assert '"heads": 8, "kv": 2}' in edited
    assert '"empty": {"a": true}' in edited
    assert edited.endswith('  "none": null,\n  "list": [\n    1,\n    2\n  ]\n}\n')


def test_a_sibling_that_is_not_there_means_the_end() -> None:
    assert edit_json('{"a": 1}', {("b",): 2}, after={("b",): "gone"}) == '{"a": 1, "b": 2}'


def test_of_a_key_given_twice_the_last_counts_and_removal_takes_both() -> None:
    text = '{"a": 1, "b": 0, "a": 2}'
    assert json.loads(edit_json(text, {("a",): 3})) == {"a": 3, "b": 0}
    assert edit_json(text, {}, [("a",)]) == '{"b": 0}'


def test_equal_numbers_in_another_spelling_are_other_values() -> None:
    assert edit_json('{"a": 1.0}', {("a",): 1}) == '{"a": 1}'
    assert edit_json('{"a": 1e-05}', {("a",): 0.00001}) == '{"a": 1e-05}'
    assert edit_json('{"a": true}', {("a",): 1}) == '{"a": 1}'


def test_numbers_that_python_writes_are_read() -> None:
    assert edit_json('{"a": NaN, "b": -Infinity, "c": 1}', {("c",): 2}) == '{"a": NaN, "b": -Infinity, "c": 2}'


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ('{"a": 1}', ("b", "c"), "'b' is missing"),
        ('{"a": 1}', ("a", "c"), "'a' is not an object"),
        ('{"a": [{}]}', ("a", "c"), "'a' is not an object"),
        ('{"a": 1}', (), "empty path"),
        ("[1]", ("a",), "list"),
        ("{,}", ("a",), "not valid JSON"),
        ("", ("a",), "not valid JSON"),
        ('{"a":' * 3000 + "1" + "}" * 3000, ("b",), "not valid JSON"),
    ],
)
def test_what_cannot_be_edited_is_refused(text: str, path: tuple[str, ...], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        edit_json(text, {path: 1})


def test_removing_what_is_missing_does_nothing() -> None:
    assert edit_json('{"a": 1}', {}, [("x",), ("a", "b"), ("y", "z")]) == '{"a": 1}'
