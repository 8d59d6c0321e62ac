import pytest

from moe_lightning.data.records import (
    Record,
    RecordError,
    RowBatch,
    RowError,
    RowOptions,
    parse_record,
)


def chat(**body: object) -> dict[str, object]:
    return {
        "custom_id": "r1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "hi"}], **body},
    }


def test_prompt_row() -> None:
    obj = {"id": "x", "prompt": " hi ", "max_new_tokens": 3, "stop": "\n", "other": [1]}
    assert parse_record(obj, row=4, line=7) == Record(
        row=4,
        line=7,
        id="x",
        prompt=" hi ",
        messages=None,
        options=RowOptions(max_new_tokens=3, stop=("\n",)),
    )


@pytest.mark.parametrize("obj", [{"prompt": "a"}, {"prompt": "a", "id": None}])
def test_missing_id_is_the_line(obj: dict[str, object]) -> None:
    assert parse_record(obj, row=0, line=12).id == 12


def test_all_options_and_null_options() -> None:
    options = {"temperature": 0, "top_p": 1, "seed": -3, "stop": ["x", "y"], "max_new_tokens": None}
    assert parse_record({"prompt": "a", **options}, row=0, line=1).options == RowOptions(
        None, 0.0, 1.0, -3, ("x", "y")
    )


def test_text_parts_are_joined_and_null_fields_dropped() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": None}]
    record = parse_record({"messages": messages}, row=0, line=1)
    assert record.messages == [{"role": "user", "content": "ab"}]
    assert record.prompt is None


def test_openai_chat_line() -> None:
    obj = chat(model="m", max_completion_tokens=5, temperature=0.5, n=1, stream=False, tools=None)
    record = parse_record(obj, row=0, line=1)
    assert record.id == "r1"
    assert record.messages == [{"role": "user", "content": "hi"}]
    assert record.options == RowOptions(max_new_tokens=5, temperature=0.5)


def test_openai_completion_line() -> None:
    body = {"prompt": "hi", "max_tokens": 5, "stop": ["."], "seed": 1, "logprobs": None}
    obj = {"custom_id": "q", "url": "/v1/completions", "body": body}
    record = parse_record(obj, row=0, line=1)
    assert (record.id, record.prompt) == ("q", "hi")
    assert record.options == RowOptions(max_new_tokens=5, seed=1, stop=(".",))


BAD_OBJECTS = [
    ([1], "JSON object"),
    ("text", "a string"),
    ({}, "neither 'prompt' nor 'messages'"),
    ({"text": "a"}, "['text']"),
    ({"prompt": None}, "neither"),
    ({"prompt": 3}, "a number"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "both"),
    ({"prompt": "x\ud800"}, "character 1"),
    ({"prompt": "a", "id": True}, "a boolean"),
    ({"prompt": "a", "id": 1.5}, "'id'"),
    ({"prompt": "a", "id": [1]}, "a list"),
    ({"prompt": "a", "id": "\udfff"}, "surrogate"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": 1.5}, "max_new_tokens"),
    ({"prompt": "a", "max_new_tokens": 2**31}, "max_new_tokens"),
    ({"prompt": "a", "max_tokens": 2}, "max_new_tokens"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": float("nan")}, "temperature"),
    ({"prompt": "a", "temperature": 10**400}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_p": 1.1}, "top_p"),
    ({"prompt": "a", "seed": 1.0}, "seed"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": ["x", 1]}, "stop"),
    ({"messages": []}, "an empty list"),
    ({"messages": "hi"}, "a string"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "", "content": "a"}]}, "role"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"messages": [{"role": "a", "content": "", "tool_calls": [1]}]}, "tool_calls"),
    (chat(n=2), "body.n"),
    (chat(stream=True), "body.stream"),
    (chat(n=True), "body.n"),
    (chat(tools=[{}]), "body.tools"),
    (chat(logprobs=True), "body.logprobs"),
    (chat(surprise=1), "body.surprise"),
    (chat(messages=None), "body.messages"),
    (chat(max_tokens=1, max_completion_tokens=2), "two different lengths"),
    (chat(max_tokens=0), "max_new_tokens"),
    ({**chat(), "method": "GET"}, "method"),
    ({**chat(), "url": "/v1/embeddings"}, "/v1/embeddings"),
    ({**chat(), "body": None}, "body"),
    ({**chat(), "custom_id": False}, "custom_id"),
]


@pytest.mark.parametrize(("obj", "part"), BAD_OBJECTS)
def test_bad_objects_name_the_fault(obj: object, part: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(obj, row=0, line=1)
    assert part in str(caught.value)
    str(caught.value).encode()  # must be writable to errors.jsonl


def test_error_carries_the_id_where_it_is_known() -> None:
    with pytest.raises(RecordError) as caught:
        parse_record({"id": "k", "prompt": 1}, row=0, line=1)
    assert caught.value.id == "k"
    with pytest.raises(RecordError) as caught:
        parse_record({"id": [], "prompt": "a"}, row=0, line=1)
    assert caught.value.id is None


def test_row_error_json() -> None:
    error = RowError(row=0, line=3, id="k", stage="read", error="why", offset=70)
    assert error.to_json() == {
        "id": "k",
        "line": 3,
        "offset": 70,
        "stage": "read",
        "error": "why",
    }


def test_lightning_leaves_a_row_batch_alone() -> None:
    import torch
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch.plugins.precision import HalfPrecision

    from moe_lightning.data.records import Row

    batch = RowBatch(0, [Row(0, 1, "a", [1, 2], RowOptions())], [])
    assert move_data_to_device(batch, torch.device("cpu")) is batch
    assert HalfPrecision("bf16-true").convert_input(batch) is batch
