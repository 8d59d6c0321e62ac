"""What a worker answers, and to whom: messages in, messages out, no network."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from masters import CPU, LAYERS

import moe_lightning
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.transport.messages import (
    PROTOCOL,
    Compute,
    Control,
    Failure,
    FailureCode,
    Reply,
    Sums,
    WireDtype,
    parse,
)
from moe_lightning.transport.wire import buffer_of, decode, encode
from moe_lightning.workers.expert_host import ExpertHost
from moe_lightning.workers.session import WorkerSession, memory_pool

MANIFEST = "the hash"
HELLO = {
    "protocol": PROTOCOL,
    "version": moe_lightning.__version__,
    "manifest": MANIFEST,
    "timeout_s": 15.0,
    "master": "some host 17",
}
OURS, OTHERS = 7, 8  # sessions
EMPTY = memoryview(b"")


class MadeUpPulse:
    address = "ipc://somewhere.pulse"
    session = 0
    silence = 0.0

    def silence_s(self):
        return self.silence

    def busy(self):
        return nullcontext()


class Peer:
    """A worker's session, and what a master says to it."""

    def __init__(self, host, **options):
        self.pulse = MadeUpPulse()
        self.host = host
        self.joins, self.num_left = [], 0
        self.session = WorkerSession(
            host, self.pulse, manifest=MANIFEST, join=self._join, **options
        )
        self._request = 0

    def _join(self, body, answer):
        self.joins.append((body, answer))

        def leave():
            self.num_left += 1

        return leave

    def say(self, message):
        """The answer to a message; its number is that of the message."""
        answer = parse(as_views(self.session.handle(as_views(message.frames()))))
        assert (answer.session, answer.request) == (message.session, message.request)
        return answer

    def tell(self, verb, body=None, *, session=OURS):
        self._request += 1
        return self.say(Control(session, self._request, verb, body or {}))

    def hello(self, *, session=OURS, **changes):
        return self.tell("hello", HELLO | changes, session=session)

    def load(self, experts, **changes):
        body = {"dtype": "float32", "experts_backend": "auto", "experts": experts}
        return self.tell("load", body | changes)


def as_views(frames):
    return [memoryview(bytearray(frame)) for frame in frames]


@pytest.fixture(scope="module")
def view(checkpoint):
    with open_checkpoint(str(checkpoint)) as view:
        yield view


@pytest.fixture
def peer(view):
    """A worker of the checkpoint: ``peer(memory_bytes=..., ends_with_master=...)``."""

    def peer(*, ends_with_master=False, **options):
        return Peer(ExpertHost(view, device=CPU, **options), ends_with_master=ends_with_master)

    return peer


def question(layer, hidden_TD, index_TK, weights_TK, *, session=OURS, **changes):
    rows_dtype = changes.pop("rows_dtype", WireDtype.FLOAT32)
    encoded = encode(hidden_TD, rows_dtype)
    settings = {
        "num_rows": hidden_TD.shape[0],
        "num_choices": index_TK.shape[1],
        "width": hidden_TD.shape[1],
        "dtype": WireDtype.FLOAT32,
        "rows_dtype": rows_dtype,
        "sums_dtype": WireDtype.FLOAT32,
        "weights_dtype": WireDtype.FLOAT32,
        "wants_error": False,
        "rows": buffer_of(encoded.rows),
        "scales": EMPTY if encoded.scales is None else buffer_of(encoded.scales),
        "index": buffer_of(index_TK.to(torch.int16).contiguous()),
        "weights": buffer_of(weights_TK.contiguous()),
    }
    return Compute(session, 99, layer, **settings | changes)


def assert_failed(answer, code, *words):
    assert isinstance(answer, Failure), answer
    assert answer.code is code
    for word in words:
        assert word in answer.text, answer.text


# Who is served.


def test_a_worker_says_what_it_offers(peer):
    welcome = peer(memory_bytes=1e6).hello().body
    assert welcome["torch"] == torch.__version__
    assert (welcome["device"], welcome["free_bytes"]) == ("cpu", 1_000_000)
    assert welcome["pulse"] == "ipc://somewhere.pulse"
    assert welcome["experts_backend"] is None
    assert peer(experts_backend="cpu_int8").hello().body["experts_backend"] == "cpu_int8"
    assert peer().hello().body["free_bytes"] > 10**8, "what is free"


@pytest.mark.parametrize(
    ("name", "value"),
    [("protocol", PROTOCOL + 1), ("version", "0.0.1"), ("manifest", "another"), ("manifest", None)],
)
def test_a_master_that_does_not_fit_is_refused_and_told_why(name, value, peer):
    worker = peer()
    ours = str(HELLO[name])
    assert_failed(
        worker.hello(**{name: value}),
        FailureCode.REFUSED,
        f"{name}: the master has {value}, this worker {ours}",
        "same release",
        "same checkpoint",
    )
    assert worker.pulse.session == 0, "it is still free"
    assert isinstance(worker.hello(), Reply)


def test_all_that_differs_is_named_and_cut_to_what_one_can_read(peer):
    answer = peer().hello(version="9" * 500, manifest="m" * 500)
    assert_failed(answer, FailureCode.REFUSED, "version", "manifest")
    assert len(answer.text) < 400


@pytest.mark.parametrize("timeout_s", [0, -1, 1e7, "15", None, [1]])
def test_a_timeout_that_makes_no_sense_is_refused(timeout_s, peer):
    worker = peer()
    assert_failed(worker.hello(timeout_s=timeout_s), FailureCode.MALFORMED, "timeout_s")
    assert worker.pulse.session == 0


def test_a_master_without_a_session_is_refused(peer):
    assert_failed(peer().hello(session=0), FailureCode.MALFORMED, "session")


def test_one_master_at_a_time(peer):
    worker = peer()
    worker.hello()
    assert_failed(worker.hello(session=OTHERS), FailureCode.BUSY, "some host 17")
    assert worker.pulse.session == OURS
    assert isinstance(worker.load({"0": [1]}), Reply), "the first one is still served"


def test_a_master_may_ask_again_without_losing_anything(peer, rows):
    """Its first hello may have been sent twice, by a connection that broke."""
    worker = peer()
    worker.hello()
    worker.load({"1": list(range(8))})
    assert worker.hello().body.keys() == worker.hello().body.keys()
    assert isinstance(worker.say(question(1, *rows(3))), Sums)


@pytest.mark.parametrize("verb", ["load", "join", "bye", "nonsense"])
def test_who_has_not_been_met_is_told_so(verb, peer):
    worker = peer()
    assert_failed(worker.tell(verb), FailureCode.WRONG_SESSION)
    worker.hello()
    assert_failed(worker.tell(verb, session=OTHERS), FailureCode.WRONG_SESSION)
    assert worker.joins == []
    assert worker.pulse.session == OURS


def test_rows_of_another_session_are_not_computed(peer, rows):
    worker = peer()
    assert_failed(worker.say(question(0, *rows(2))), FailureCode.WRONG_SESSION)
    worker.hello()
    worker.load({"0": list(range(8))})
    stranger = question(0, *rows(2), session=OTHERS)
    assert_failed(worker.say(stranger), FailureCode.WRONG_SESSION)


# The end of a session.


def test_bye_frees_everything_and_the_next_master_is_served(peer, rows):
    worker = peer(memory_bytes=1e6)
    worker.hello()
    left = worker.load({"0": [1, 2], "2": [0]}).body["free_bytes"]
    assert left == 1_000_000 - 3 * 3 * 32 * 24 * 4
    assert isinstance(worker.tell("bye"), Reply)
    assert worker.pulse.session == 0
    assert worker.host.offered_bytes() == 1_000_000
    assert worker.session.watch_master(), "it waits for the next"
    assert worker.hello(session=OTHERS).body["free_bytes"] == 1_000_000
    assert_failed(worker.say(question(0, *rows(2), session=OTHERS)), FailureCode.NOT_HELD)


def test_a_silent_master_is_given_up_and_its_experts_are_freed(peer):
    worker = peer(memory_bytes=1e6)
    worker.hello(timeout_s=3)
    worker.load({"0": [1, 2]})
    worker.pulse.silence = 2.9
    assert worker.session.watch_master()
    assert worker.pulse.session == OURS
    worker.pulse.silence = 3.1
    assert worker.session.watch_master(), "it was started by hand, and goes on"
    assert worker.session.has_lost_master
    assert worker.pulse.session == 0
    assert worker.host.offered_bytes() == 1_000_000
    assert_failed(worker.load({"0": [1]}), FailureCode.WRONG_SESSION)
    assert isinstance(worker.hello(session=OTHERS), Reply)


def test_a_free_worker_is_not_waiting_for_anybody(peer):
    worker = peer(ends_with_master=True)
    worker.pulse.silence = 1e9
    assert worker.session.watch_master()
    assert not worker.session.has_lost_master


def test_a_new_master_takes_over_from_a_silent_one_at_once(peer, rows):
    """Before the worker has looked for itself."""
    worker = peer()
    worker.hello()
    worker.load({"0": list(range(8))})
    worker.pulse.silence = 15.5
    assert isinstance(worker.hello(session=OTHERS), Reply)
    worker.pulse.silence = 0.0
    assert_failed(worker.say(question(0, *rows(2), session=OTHERS)), FailureCode.NOT_HELD)
    assert_failed(worker.say(question(0, *rows(2))), FailureCode.WRONG_SESSION)


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_worker_that_ends_with_its_master_leaves(is_silent, peer):
    worker = peer(ends_with_master=True)
    assert worker.session.watch_master(), "the first one may still come"
    worker.hello()
    assert worker.session.watch_master()
    if is_silent:
        worker.pulse.silence = 16
    else:
        worker.tell("bye")
    assert not worker.session.watch_master()
    assert worker.session.has_lost_master == is_silent


# Loading.


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float8"},
        {"dtype": None},
        {"dtype": "__class__"},
        {"experts_backend": "magic"},
        {"experts_backend": 3},
        {"experts_backend": None},
        {"experts": None},
        {"experts": [[1, 2]]},
        {"experts": {"0": 1}},
        {"experts": {"0": ["1"]}},
        {"experts": {"0": [1.0]}},
        {"experts": {"0": [True]}},
        {"experts": {"0": [-1]}},
        {"experts": {"0": [8]}},
        {"experts": {"0": [0, 10**30]}},
        {"experts": {"3": [0]}},
        {"experts": {"-1": [0]}},
        {"experts": {"one": [0]}},
        {"experts": {"": [0]}},
        {"experts": {"9" * 5000: [0]}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_a_load_that_makes_no_sense_is_refused(changes, peer, rows):
    worker = peer(memory_bytes=1e6)
    worker.hello()
    wrong = {"experts": {}} | changes
    assert_failed(worker.load(**wrong), FailureCode.LOAD)
    assert worker.host.offered_bytes() == 1_000_000
    # Once some are held as well.
    worker.load({"0": [0, 1]})
    left = worker.host.offered_bytes()
    assert_failed(worker.load(**wrong), FailureCode.LOAD)
    assert worker.host.offered_bytes() == left
    assert isinstance(worker.load({"0": list(range(8))}), Reply)
    assert isinstance(worker.say(question(0, *rows(2))), Sums)


def test_a_load_that_fails_is_told_whatever_it_is(peer, monkeypatch):
    worker = peer()
    worker.hello()
    for error in (KeyError("a tensor"), OSError("disk"), MemoryError(), IndexError("out")):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ExpertHost, "load", fail)
            assert_failed(worker.load({"0": [1]}), FailureCode.LOAD, type(error).__name__)
    assert isinstance(worker.load({"0": [1]}), Reply)


def test_more_than_fits_is_refused_with_its_numbers(peer):
    worker = peer(memory_bytes=3e6)
    worker.hello()
    assert_failed(worker.load({"0": [0]}, dtype="float99"), FailureCode.LOAD)
    small = peer(memory_bytes=9216 * 5)
    small.hello()
    assert isinstance(small.load({"0": [0, 1], "1": [3]}), Reply)
    assert_failed(small.load({"2": [0, 1, 2]}), FailureCode.LOAD, "GB are free")
    assert isinstance(small.load({"2": [0, 1]}), Reply), "to the byte"
    assert small.host.offered_bytes() == 0


def test_loading_the_same_again_changes_nothing(peer):
    """A request may come twice."""
    worker = peer(memory_bytes=1e6)
    worker.hello()
    answers = [worker.load({"0": [1, 2], "1": [0]}) for _ in range(3)]
    assert len({answer.body["free_bytes"] for answer in answers}) == 1
    worker.load({"0": [2, 3]})
    assert worker.host.offered_bytes() == 1_000_000 - 4 * 9216


def test_nothing_to_load_is_legal(peer):
    worker = peer()
    worker.hello()
    assert isinstance(worker.load({}), Reply)
    assert isinstance(worker.load({"0": []}), Reply)


# Other verbs, and what is no request.


def test_joining_is_handed_on_and_ends_with_the_session(peer):
    worker = peer()
    worker.hello()
    worker.tell("join", {"rank": 3})
    ((body, answer),) = worker.joins
    assert body == {"rank": 3}
    assert answer == worker.session.handle_compute
    assert worker.num_left == 0
    worker.tell("bye")
    assert worker.num_left == 1


def test_joining_that_fails_is_told(peer):
    worker = peer()

    def fail(body, answer):
        raise ValueError("no such rank")

    worker.session._join = fail
    worker.hello()
    assert_failed(worker.tell("join", {}), FailureCode.LOAD, "no such rank")
    assert isinstance(worker.tell("bye"), Reply)


@pytest.mark.parametrize("verb", ["exec", "hello2", "HELLO", "compute"])
def test_an_unknown_verb_is_refused(verb, peer):
    worker = peer()
    worker.hello()
    assert_failed(worker.tell(verb), FailureCode.MALFORMED, "unknown verb")


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"MoEL"],
        [b"x" * 64] * 5,
        [b"\0" * 24],
        [*Control(OURS, 1, "bye", {}).frames(), b"more"],
        Control(OURS, 1, "bye", {}).frames()[:1],
        Reply(OURS, 1, {}).frames(),
        Failure(OURS, 1, FailureCode.COMPUTE, "no").frames(),
    ],
    ids=range(9),
)
def test_what_is_no_request_is_dropped(frames, peer, caplog):
    worker = peer()
    worker.hello()
    assert worker.session.handle(as_views(frames)) is None
    assert "dropped" in caplog.text
    assert worker.pulse.session == OURS
    assert isinstance(worker.tell("bye"), Reply)


# Rows.


@pytest.fixture
def loaded(peer):
    """A worker that holds all experts of layers 0 and 1, and 0 to 3 of layer 2."""
    worker = peer()
    worker.hello()
    worker.load({"0": list(range(8)), "1": list(range(8)), "2": [0, 1, 2, 3]})
    return worker


def sums_of(answer, dtype=torch.float32):
    assert isinstance(answer, Sums), getattr(answer, "text", answer)
    return decode(
        answer.rows, answer.scales, answer.num_rows, answer.width, answer.sums_dtype, dtype
    )


@pytest.mark.parametrize("num_rows", [0, 1, 50])
def test_sums_are_those_of_the_family(num_rows, loaded, rows, expected):
    some = rows(num_rows)
    for layer in (0, 1):
        answer = loaded.say(question(layer, *some))
        assert math.isnan(answer.error), "nobody asked"
        assert answer.compute_us > 0
        # fp32 sums in another order.
        torch.testing.assert_close(sums_of(answer), expected(layer, *some), atol=1e-6, rtol=1e-5)


def test_a_request_is_a_pure_question(loaded, rows):
    """The same rows give the same bits, whatever came between."""
    asked = question(0, *rows(20))
    first = bytes(loaded.say(asked).rows)
    loaded.say(question(1, *rows(7, seed=1)))
    loaded.load({"2": [6]})
    loaded.say(question(7, *rows(7)))
    assert bytes(loaded.say(asked).rows) == first


def test_a_part_of_the_experts(loaded, rows, expected):
    hidden_TD, index_TK, weights_TK = rows(40)
    here_TK = index_TK.masked_fill(index_TK >= 4, 8)  # 8 stands for "not yours"
    weights_here_TK = weights_TK.masked_fill(index_TK >= 4, 0.0)
    got_TD = sums_of(loaded.say(question(2, hidden_TD, here_TK, weights_TK)))
    want_TD = expected(2, hidden_TD, index_TK, weights_here_TK)
    torch.testing.assert_close(got_TD, want_TD, atol=1e-6, rtol=1e-5)


def test_experts_that_are_not_here_are_not_computed(loaded, rows):
    hidden_TD, index_TK, weights_TK = rows(4)
    elsewhere_TK = torch.full_like(index_TK, 8)
    assert_failed(
        loaded.say(question(2, hidden_TD, elsewhere_TK.fill_(5), weights_TK)),
        FailureCode.NOT_HELD,
        "layer 2",
    )
    assert_failed(loaded.say(question(3, *rows(4))), FailureCode.NOT_HELD, "layer 3")
    assert_failed(loaded.say(question(2**31, *rows(4))), FailureCode.NOT_HELD)
    nobodys_TK = torch.full_like(index_TK, 8)
    assert not sums_of(loaded.say(question(2, hidden_TD, nobodys_TK, weights_TK))).any()


@pytest.mark.parametrize("number", [9, 32767, -1, -8, -9, -32768])
def test_a_number_that_no_expert_has_is_not_computed(number, loaded, rows):
    hidden_TD, index_TK, weights_TK = rows(4)
    index_TK[2, 1] = number
    answer = loaded.say(question(0, hidden_TD, index_TK, weights_TK))
    assert_failed(answer, FailureCode.NOT_HELD)


def test_rows_of_another_width_are_refused(loaded, rows):
    hidden_TD, index_TK, weights_TK = rows(4)
    answer = loaded.say(question(0, hidden_TD[:, :31].contiguous(), index_TK, weights_TK))
    assert_failed(answer, FailureCode.COMPUTE)
    assert isinstance(loaded.say(question(0, *rows(4))), Sums)


# Relative errors of one rounding of Gaussian numbers: half an ulp, or 1/254 of the largest of 32.
ROUNDED = {
    WireDtype.BFLOAT16: (1e-4, 4e-3),
    WireDtype.FLOAT16: (1e-5, 5e-4),
    WireDtype.INT8: (1e-3, 1e-2),
}


@pytest.mark.parametrize("dtype", ROUNDED, ids=lambda dtype: dtype.name)
def test_sums_can_be_asked_for_in_fewer_bits_with_their_error(dtype, loaded, rows, expected):
    some = rows(50)
    answer = loaded.say(question(0, *some, sums_dtype=dtype, wants_error=True))
    assert answer.sums_dtype is dtype
    want_TD = expected(0, *some)
    error = float((sums_of(answer) - want_TD).norm() / want_TD.norm())
    least, most = ROUNDED[dtype]
    assert least < answer.error < most
    assert answer.error == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("dtype", ROUNDED, ids=lambda dtype: dtype.name)
def test_rows_can_come_in_fewer_bits(dtype, loaded, rows, expected):
    hidden_TD, index_TK, weights_TK = rows(50)
    answer = loaded.say(question(0, hidden_TD, index_TK, weights_TK, rows_dtype=dtype))
    encoded = encode(hidden_TD, dtype)
    scales = EMPTY if encoded.scales is None else buffer_of(encoded.scales)
    rounded_TD = decode(buffer_of(encoded.rows), scales, 50, 32, dtype, torch.float32)
    # The worker computes with the rounded rows, in float32: sums in another order.
    want_TD = expected(0, rounded_TD, index_TK, weights_TK)
    torch.testing.assert_close(sums_of(answer), want_TD, atol=1e-6, rtol=1e-5)


def test_a_row_that_is_not_finite_gives_a_sum_that_is_not(loaded, rows):
    for bad in (float("nan"), float("inf")):
        for dtype in (WireDtype.FLOAT32, *ROUNDED):
            hidden_TD, index_TK, weights_TK = rows(6)
            hidden_TD[2, 5] = bad
            got_TD = sums_of(
                loaded.say(
                    question(0, hidden_TD, index_TK, weights_TK, rows_dtype=dtype, sums_dtype=dtype)
                )
            )
            is_finite = got_TD.isfinite().all(dim=1).tolist()
            assert is_finite == [True, True, False, True, True, True], dtype


# Requests that come by another transport.


def test_by_another_transport_there_are_only_rows(loaded, rows):
    by_zmq = loaded.say(question(0, *rows(9)))
    answer = loaded.session.handle_compute(as_views(question(0, *rows(9)).frames()))
    assert bytes(parse(as_views(answer)).rows) == bytes(by_zmq.rows)
    for frames, code in (
        (Control(OURS, 1, "bye", {}).frames(), FailureCode.WRONG_SESSION),
        (question(0, *rows(2), session=OTHERS).frames(), FailureCode.WRONG_SESSION),
        ([b"nonsense"], FailureCode.MALFORMED),
    ):
        assert_failed(parse(as_views(loaded.session.handle_compute(as_views(frames)))), code)
    assert loaded.pulse.session == OURS


def test_memory_is_one_pool_for_all_processes_of_a_machine():
    assert memory_pool(CPU) == memory_pool(torch.device("cpu"))
    assert len(memory_pool(CPU)) > 10
    assert LAYERS == (0, 1, 2)
