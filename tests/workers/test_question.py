"""A message of rows, and what is made of its answer, with a transport that is made up."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masters import CPU

from moe_lightning.transport.messages import (
    Compute,
    Failure,
    FailureCode,
    Reply,
    Sums,
    WireDtype,
    parse,
)
from moe_lightning.transport.transport import Pending, WorkerLost
from moe_lightning.transport.wire import (
    buffer_of,
    decode,
    encode,
    relative_error,
    tensor_of,
    torch_dtype,
)
from moe_lightning.workers.question import Questions, WireOptions, WorkerFlight

SESSION, WORKER = 77, 3
NAMES = ("working", "bfloat16", "float16", "int8")
DTYPES = {
    "bfloat16": WireDtype.BFLOAT16,
    "float16": WireDtype.FLOAT16,
    "int8": WireDtype.INT8,
}


class Answered(Pending):
    """A request whose answer is there, or what waiting for it raises."""

    def __init__(self, answer):
        self._answer = answer

    def result(self, timeout_s):
        if isinstance(self._answer, BaseException):
            raise self._answer
        return [memoryview(bytearray(frame)) for frame in self._answer]


def questions(wire=None):
    return Questions(SESSION, wire or WireOptions(), ids=itertools.count(500), device=CPU)


def some_rows(num_rows=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows)
    rows_RD = torch.randn(num_rows, 16, generator=generator).to(dtype)
    index_RK = torch.randint(0, 9, (num_rows, 2), generator=generator)
    return rows_RD, index_RK, torch.rand(num_rows, 2, generator=generator)


def read(asked):
    message = parse([memoryview(bytearray(frame)) for frame in asked.frames])
    assert isinstance(message, Compute)
    return message


def sums_for(message, sums_RD, *, error=float("nan"), **changes):
    """What a worker answers to a message."""
    settings = {
        "request": message.request,
        "num_rows": message.num_rows,
        "width": message.width,
        "sums_dtype": message.sums_dtype,
    } | changes
    encoded = encode(sums_RD, settings["sums_dtype"])
    return Sums(
        SESSION,
        compute_us=1500,
        waited_us=0,
        error=error,
        rows=buffer_of(encoded.rows),
        scales=memoryview(b"") if encoded.scales is None else buffer_of(encoded.scales),
        **settings,
    ).frames()


def flight_of(asked, answer):
    given_up = []
    flight = WorkerFlight(
        WORKER, asked, Answered(answer), give_up=lambda *args: given_up.append(args)
    )
    return flight, given_up


# The message.


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_experts_and_weights_arrive_to_the_bit(num_rows, dtype):
    rows_RD, index_RK, weights_RK = some_rows(num_rows, dtype)
    asked = questions().put(40, rows_RD, index_RK, weights_RK)
    message = read(asked)
    assert (message.session, message.request, message.layer) == (SESSION, 500, 40)
    assert not message.wants_error
    assert torch_dtype(message.dtype) == torch_dtype(message.rows_dtype) == dtype
    got_RD = decode(
        message.rows, message.scales, num_rows, 16, message.rows_dtype, torch_dtype(message.dtype)
    )
    assert torch.equal(got_RD, rows_RD)
    assert torch.equal(tensor_of(message.index, torch.int16, (num_rows, 2)).long(), index_RK)
    got_RK = tensor_of(message.weights, torch_dtype(message.weights_dtype), (num_rows, 2))
    assert torch.equal(got_RK, weights_RK)


def test_rows_that_are_not_contiguous():
    rows_RD, index_RK, weights_RK = some_rows(6)
    asked = questions().put(
        0, rows_RD.t().contiguous().t(), index_RK.t().contiguous().t(), weights_RK[:, [1, 0]]
    )
    message = read(asked)
    got_RD = decode(message.rows, message.scales, 6, 16, message.rows_dtype, torch.float32)
    assert torch.equal(got_RD, rows_RD)
    assert torch.equal(tensor_of(message.index, torch.int16, (6, 2)).long(), index_RK)
    got_RK = tensor_of(message.weights, torch.float32, (6, 2))
    assert torch.equal(got_RK, weights_RK[:, [1, 0]])


def test_requests_are_numbered_and_bytes_counted():
    put = questions()
    first, second = (put.put(0, *some_rows()) for _ in range(2))
    assert (first.request, second.request) == (500, 501)
    header = len(first.frames[0])
    # 5 rows of 16 floats, 2 experts in int16, 2 float weights.
    assert first.num_bytes == header + 5 * (16 * 4 + 2 * 2 + 2 * 4)
    small = questions(WireOptions("int8")).put(0, *some_rows())
    assert small.num_bytes == header + 5 * (16 + 4 + 2 * 2 + 2 * 4)


# What compression loses.


@pytest.mark.parametrize("name", DTYPES)
def test_the_first_message_of_each_layer_is_measured(name):
    wire = WireOptions(dispatch_dtype=name)
    put = questions(wire)
    rows_RD, index_RK, weights_RK = some_rows(50)
    messages = [read(put.put(layer, rows_RD, index_RK, weights_RK)) for layer in (0, 0, 4, 4, 0)]
    assert [message.wants_error for message in messages] == [True, False, True, False, False]
    assert {message.rows_dtype for message in messages} == {DTYPES[name]}
    assert {message.sums_dtype for message in messages} == {WireDtype.FLOAT32}
    error = relative_error(rows_RD, encode(rows_RD, DTYPES[name]))
    assert wire.errors == {"dispatch": pytest.approx(error)}
    assert 1e-5 < error < 1e-2


def test_without_compression_nothing_is_measured():
    wire = WireOptions()
    put = questions(wire)
    assert not any(read(put.put(layer, *some_rows())).wants_error for layer in range(3))
    assert wire.errors == {}


@pytest.mark.parametrize("name", DTYPES)
def test_the_largest_error_of_the_sums_is_kept(name):
    wire = WireOptions(combine_dtype=name)
    put = questions(wire)
    for error in (0.25, float("nan"), 0.5, 0.125):
        asked = put.put(0, *some_rows())
        message = read(asked)
        assert message.sums_dtype is DTYPES[name]
        flight, _ = flight_of(asked, sums_for(message, torch.ones(5, 16), error=error))
        flight.result()
    assert wire.errors == {"dispatch": 0.0, "combine": 0.5}


# The answer.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_come_back_in_the_dtype_of_the_rows(name, dtype):
    asked = questions(WireOptions(combine_dtype=name)).put(0, *some_rows(dtype=dtype))
    sums_RD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    frames = sums_for(read(asked), sums_RD)
    flight, given_up = flight_of(asked, frames)
    got_RD = flight.result()
    assert got_RD.dtype == dtype
    if name == "working":
        assert torch.equal(got_RD, sums_RD)
    else:  # as the tests of the wire dtypes have it
        assert float((got_RD - sums_RD).norm() / sums_RD.norm()) < 1e-2
    assert given_up == []
    assert flight.compute_s == pytest.approx(0.0015)
    assert flight.num_bytes_sent == asked.num_bytes
    assert flight.num_bytes_received == sum(len(frame) for frame in frames[1:])


@pytest.mark.parametrize(
    ("changes", "sums_RD"),
    [
        ({"request": 499}, torch.ones(5, 16)),
        ({"num_rows": 4}, torch.ones(4, 16)),
        ({"num_rows": 0}, torch.ones(0, 16)),
        ({"width": 17}, torch.ones(5, 17)),
        ({"sums_dtype": WireDtype.INT8}, torch.ones(5, 16)),
        ({"sums_dtype": WireDtype.FLOAT64}, torch.ones(5, 16).double()),
    ],
)
def test_sums_of_another_question_are_not_taken(changes, sums_RD):
    asked = questions().put(0, *some_rows())
    flight, given_up = flight_of(asked, sums_for(read(asked), sums_RD, **changes))
    with pytest.raises(WorkerLost, match="another question") as lost:
        flight.result()
    assert lost.value.worker == WORKER
    assert given_up == [(WORKER, "its answer is to another question")]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (TimeoutError("no answer in 600 s"), "no answer for 600 s"),
        ([b"nonsense"], "makes no sense"),
        ([], "makes no sense"),
        (Reply(SESSION, 500, {}).frames(), "refused"),
        (Failure(SESSION, 500, FailureCode.NOT_HELD, "layer 7").frames(), "layer 7"),
        (Failure(SESSION, 500, FailureCode.WRONG_SESSION, "no such run").frames(), "no such run"),
        (Failure(SESSION, 500, FailureCode.MALFORMED, "bad").frames(), "bad"),
    ],
)
def test_a_worker_that_does_not_answer_the_question_is_given_up(answer, words):
    flight, given_up = flight_of(questions().put(0, *some_rows()), answer)
    with pytest.raises(WorkerLost, match=words) as lost:
        flight.result()
    assert given_up == [(WORKER, lost.value.reason)]


def test_a_loss_that_the_transport_has_seen_is_passed_on():
    flight, given_up = flight_of(questions().put(0, *some_rows()), WorkerLost(WORKER, "it fell"))
    with pytest.raises(WorkerLost, match="it fell"):
        flight.result()
    assert given_up == []


def test_rows_that_cannot_be_computed_are_not_the_workers_fault():
    failure = Failure(SESSION, 500, FailureCode.COMPUTE, "RuntimeError: 31 is not 32")
    flight, given_up = flight_of(questions().put(0, *some_rows()), failure.frames())
    with pytest.raises(RuntimeError, match="worker 3: RuntimeError: 31 is not 32"):
        flight.result()
    assert given_up == []


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    num_rows=st.integers(0, 20),
    num_choices=st.integers(1, 9),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_any_rows_come_back_from_a_worker_that_returns_them(
    name, num_rows, num_choices, width, seed
):
    generator = torch.Generator().manual_seed(seed)
    rows_RD = torch.randn(num_rows, width, generator=generator)
    index_RK = torch.randint(0, 300, (num_rows, num_choices), generator=generator)
    weights_RK = torch.rand(num_rows, num_choices, generator=generator)
    asked = questions(WireOptions(name, name)).put(3, rows_RD, index_RK, weights_RK)
    message = read(asked)
    back_RD = decode(
        message.rows, message.scales, num_rows, width, message.rows_dtype, torch.float32
    )
    flight, _ = flight_of(asked, sums_for(message, back_RD))
    got_RD = flight.result()
    assert got_RD.shape == rows_RD.shape
    # A row rounded twice; int8 in steps of 1/127 of its largest.
    bound = {"working": 0.0, "bfloat16": 2**-8, "float16": 2**-10, "int8": 1.1 / 127}[name]
    if num_rows:
        assert float((got_RD - rows_RD).abs().max()) <= bound * float(rows_RD.abs().max()) + 1e-6
