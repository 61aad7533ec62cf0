"""Rows of messages: what they become by a chat template, which tokens are learnt, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqa_convert.calibrate.tokens import calibration_tokens
from gqa_convert.data.batches import IGNORE, collate_causal
from gqa_convert.data.blocks import Block
from gqa_convert.data.conversations import TOKEN, UNSCORED, ChatTemplate, Conversation, conversation
from gqa_convert.data.documents import SourceSpec, open_corpus
from gqa_convert.data.encoding import Encoder
from gqa_convert.errors import UsageError

SAMPLE = Path(__file__).parent / "conversations.jsonl"
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>"
    "{% endgeneration %}{% else %}{{ m.content }} <end>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TURNS = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "well thanks"},
]


def tokenizer_with(template: str | None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [SAMPLE.read_text(), "hello there good day how are you well thanks plain text"]
    words = {word for text in texts for word in text.split()}
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(sorted(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>", "<end>"]})
    tokenizer.chat_template = template
    return tokenizer


def learnt_words(tokenizer: Any, document: Conversation) -> list[str]:
    rendered = ChatTemplate(tokenizer).render(document)
    words = tokenizer.convert_ids_to_tokens(rendered.ids.tolist())
    return [word for word, is_learnt in zip(words, rendered.assistant, strict=True) if is_learnt]


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "marks"])
def test_what_the_assistant_says_and_how_it_ends_is_learnt(template: str) -> None:
    said = said_in_turns()
    assert learnt_words(tokenizer_with(template), said) == ["good", "day", "<end>", "well", "thanks", "<end>"]


def said_in_turns() -> Conversation:
    said = conversation({"messages": TURNS}, "text")
    assert said is not None
    return said


def test_prefixes_and_marks_agree_on_every_sample_conversation() -> None:
    rows: list[Any] = [conversation(json.loads(line), "text") for line in SAMPLE.read_text().splitlines()]
    by_prefix, by_mark = (ChatTemplate(tokenizer_with(template)) for template in (CHAT, MARKED))
    assert len(rows) >= 36
    for row in rows:
        a, b = by_prefix.render(row), by_mark.render(row)
        assert (a.ids == b.ids).all()
        assert (a.assistant == b.assistant).all()
        assert 0 < a.assistant.sum() < len(a.ids)


def test_a_template_that_rewrites_earlier_turns_is_refused_and_all_still_works() -> None:
    forgetful = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content if loop.last or m.role == 'user' else 'day' }} <end>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    said = said_in_turns()
    tokenizer = tokenizer_with(forgetful)
    with pytest.raises(UsageError, match=r"does not tell what the assistant says in turn 2.*generation"):
        ChatTemplate(tokenizer).render(said)
    ids = Encoder(tokenizer, append_eos=False, loss_on="all").encode([said])[0]
    assert (ids < UNSCORED).all()


def test_a_template_that_refuses_says_which_conversation() -> None:
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    with pytest.raises(UsageError, match=r"refuses a conversation \(system first\).*user: hello there"):
        ChatTemplate(tokenizer_with(strict)).render(said_in_turns())


def test_no_template_is_said_and_text_needs_none() -> None:
    encoder = Encoder(tokenizer_with(None), append_eos=True)
    assert encoder.encode(["plain text"])[0][-1] == 1
    with pytest.raises(UsageError, match="no chat template"):
        encoder.encode([said_in_turns()])


def test_labels_are_the_learnt_tokens_alone_and_inputs_are_plain_ids() -> None:
    tokenizer = tokenizer_with(CHAT)
    ids = Encoder(tokenizer, append_eos=False).encode([said_in_turns()])[0]
    batch = collate_causal(True)([(0, Block(ids, np.zeros(len(ids), np.int64)), 1 << 62)])
    plain = ids & TOKEN
    assert (batch.inputs["input_ids"][0].numpy() == plain[:-1]).all()
    assert int(batch.inputs["input_ids"].max()) < len(tokenizer)
    learnt = [int(label) for label in batch.labels[0] if label != IGNORE]
    assert tokenizer.convert_ids_to_tokens(learnt) == ["good", "day", "<end>", "well", "thanks", "<end>"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "messages": TURNS}, None),
        ({"messages": "a"}, None),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "day"}]},
         [{"content": "hello", "role": "user"}, {"content": "day", "role": "assistant"}]),
        ({"messages": [{"role": "user", "content": "hello", "name": None}]}, [{"content": "hello", "role": "user"}]),
    ],
    ids=["text wins", "not a list", "from and value", "nulls of a table"],
)  # fmt: skip
def test_rows_that_are_conversations(row: dict[str, Any], expected: list[dict[str, Any]] | None) -> None:
    said = conversation(row, "text")
    assert (None if said is None else said.parsed[0]) == expected


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"content": "x"}], "line 2: message 1 under 'messages' has no role"),
        ([{"role": "user"}], r"message 1 under 'messages' \(user\) has no content"),
        ([{"role": "user", "content": "x"}, "y"], "message 2 under 'messages' is a str"),
    ],
)
def test_messages_that_are_none_name_file_and_line(tmp_path: Path, messages: list[Any], problem: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"messages": m}) for m in (TURNS, messages)))
    corpus = open_corpus(SourceSpec(kind="jsonl", paths=(str(file),)))
    with pytest.raises(UsageError, match=f"a.jsonl.*{problem}"):
        list(corpus.all_documents())


def test_files_parquet_and_functions_give_the_same_conversations(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [row["messages"] for row in rows]}), table)
    of_file, of_table, of_function = (
        list(open_corpus(SourceSpec(kind=kind, paths=(path,))).all_documents())
        for kind, path in (
            ("jsonl", str(SAMPLE)), ("parquet", str(table)), ("python", "tests.data.test_conversations:sample_messages")
        )
    )  # fmt: skip
    assert of_file == of_table == of_function
    assert all(isinstance(document, Conversation) for document in (*of_file, *of_table, *of_function))


def sample_messages() -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in SAMPLE.read_text().splitlines()]


def test_calibration_reads_conversations_through_the_template() -> None:
    tokenizer = tokenizer_with(CHAT)
    tokens = calibration_tokens(str(SAMPLE), tokenizer, sequences=4, length=32)
    words = tokenizer.convert_ids_to_tokens(tokens.flatten().tolist())
    assert tokens.shape == (4, 32)
    assert {"<user>", "<assistant>", "<end>"} <= set(words)
    with pytest.raises(UsageError, match=r"conversations\.jsonl.*no chat template"):
        calibration_tokens(str(SAMPLE), tokenizer_with(None), sequences=4, length=32)
