"""What goes wrong on the way or at a worker, and real processes that are killed and stopped.

The second half is a sample of ``scripts/chaos_rpc.py``, which says what a run has to bear and how.
"""

import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import placed
from relay import Relay, is_sums
from worker_threads import ThreadWorker

from moe_lightning.transport.messages import Reply, WireDtype, parse
from moe_lightning.workers import question

HALVES = placed((0, 1, 2, 3), (4, 5, 6, 7))
SEED = 15  # faults of all kinds in all stages, naps of less and of more than timeout_s
TIMEOUT_S = 2.0


@pytest.fixture
def relay():
    """A worker's address, as it is seen through a relay: ``relay(address, change)``."""
    relays = []

    def make(address, change):
        relays.append(Relay(address, change))
        return relays[-1].address

    yield make
    for each in relays:
        each.close()


@pytest.fixture
def two_workers(worker_threads, checkpoint):
    return worker_threads(checkpoint, 2)


def rebuilt(frames, **changes):
    """The frames of other sums."""
    return [bytes(frame) for frame in replace(parse(frames), **changes).frames()]


WRONG = {
    "the header is cut": (lambda f: [f[0][:-1], *f[1:]], "makes no sense"),
    "another protocol": (lambda f: [f[0][:4] + b"\x09" + f[0][5:], *f[1:]], "makes no sense"),
    "a frame is missing": (lambda f: f[:-1], "makes no sense"),
    "sums are cut": (lambda f: [f[0], f[1][:-4], *f[2:]], "makes no sense"),
    "sums of fewer rows": (
        lambda f: rebuilt(f, num_rows=1, rows=memoryview(f[1])[: 32 * 4]),
        "another question",
    ),
    "wider sums": (
        lambda f: rebuilt(f, width=64, rows=memoryview(bytes(2 * len(f[1])))),
        "another question",
    ),
    "sums of another dtype": (
        lambda f: rebuilt(f, sums_dtype=WireDtype.FLOAT16, rows=memoryview(f[1])[: len(f[1]) // 2]),
        "another question",
    ),
    "no sums at all": (
        lambda f: Reply(parse(f).session, parse(f).request, {}).frames(),
        "no sums",
    ),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_worker_whose_answer_is_wrong_is_given_up_and_its_rows_are_computed_elsewhere(
    change, reason, relay, two_workers, master, check_sums
):
    changed = []

    def once(frames):
        if changed or not is_sums(frames):
            return [frames]
        changed.append(frames)
        return [change(frames)]

    made = master([relay(two_workers[0], once), two_workers[1]], HALVES)
    check_sums(made)
    assert changed
    assert list(made.fleet.lost) == [0]
    assert re.search(reason, made.fleet.lost[0])
    check_sums(made)


@pytest.mark.parametrize("number", [None, 10**9], ids=["no answer", "to another request"])
def test_a_worker_that_never_answers_is_given_up_although_its_pulse_beats(
    number, relay, two_workers, master, check_sums, monkeypatch
):
    monkeypatch.setattr(question, "ANSWER_TIMEOUT_S", 0.5)

    def change(frames):
        if not is_sums(frames):
            return [frames]
        return [] if number is None else [rebuilt(frames, request=number)]

    made = master([relay(two_workers[0], change), two_workers[1]], HALVES)
    check_sums(made)
    assert made.fleet.lost == {0: "it gave no answer for 0 s"}


def test_double_late_and_unknown_answers_are_dropped(relay, two_workers, master, check_sums):
    """Each answer comes twice, after the one before has come once more and one to nobody."""
    before = []

    def change(frames):
        if not is_sums(frames):
            return [frames]
        before.append(frames)
        return [*before[-2:-1], rebuilt(frames, request=10**9), frames, frames]

    made = master([relay(two_workers[0], change), two_workers[1]], HALVES)
    for num_rows in (37, 5, 0):
        check_sums(made, num_rows=num_rows)
    assert len(before) > 3
    assert made.fleet.lost == {}


@pytest.fixture
def restarts(checkpoint, tmp_path):
    """A worker's address, and what starts another worker there."""
    listen = f"ipc://{tmp_path}/w"
    workers = [ThreadWorker(checkpoint, listen=listen)]

    def restart():
        workers[-1].end()
        workers.append(ThreadWorker(checkpoint, listen=listen))

    yield listen, restart
    workers[-1].end()


def test_a_worker_that_is_started_again_at_the_same_address_is_lost(
    restarts, two_workers, master, check_sums
):
    listen, restart = restarts
    made = master([listen, two_workers[1]], HALVES)
    check_sums(made)
    restart()
    check_sums(made)
    assert list(made.fleet.lost) == [0]
    # By its pulse, or by its answer.
    assert re.search("restarted|serves no such run", made.fleet.lost[0])


def test_a_worker_that_is_started_again_before_it_has_loaded_is_lost(
    restarts, two_workers, master, check_sums
):
    """It is not a worker that cannot load, which would end the run."""
    listen, restart = restarts
    made = master([listen, two_workers[1]])
    restart()
    made.start_loading(HALVES)()
    check_sums(made)
    assert list(made.fleet.lost) == [0]
    assert re.search("restarted", made.fleet.lost[0])


# Real processes.


@pytest.fixture(scope="module")
def scripts():
    """The parts of ``scripts/chaos_rpc.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        import chaos_rpc
        import chaos_rpc_nursery
        import chaos_rpc_plan
        import chaos_rpc_team

        yield {
            **vars(chaos_rpc),
            **vars(chaos_rpc_nursery),
            **vars(chaos_rpc_plan),
            **vars(chaos_rpc_team),
        }


@pytest.fixture(scope="module")
def nursery(scripts):
    nursery = scripts["Nursery"]()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def chaos(scripts, nursery, tmp_path_factory):
    """So many workers that serve run after run: ``chaos(num_workers)``."""
    made = {}

    def chaos(num_workers):
        if num_workers not in made:
            made[num_workers] = scripts["Chaos"](
                tmp_path_factory.mktemp("chaos"),
                nursery,
                num_workers=num_workers,
                timeout_s=TIMEOUT_S,
                num_rows=12,
                num_tokens=24,
            )
        return made[num_workers]

    return chaos


@pytest.fixture
def carry_out(scripts, chaos):
    """Carry out a plan of some faults: ``carry_out(number, start, ["kill", 0, "decode"], ...)``."""

    def carry_out(number, start, *faults, num_workers=3, sort="one"):
        made = tuple(
            scripts["Fault"](*fault, turn=0.0, fraction=0.05 + 0.25 * n)
            for n, fault in enumerate(faults)
        )
        num_asked = 1 if sort == "last" else num_workers
        plan = scripts["Plan"](number, sort, start, "zmq", "Generate", num_asked, made)
        line = chaos(num_workers).run(plan)
        print(line)
        assert line.violations == []
        assert len(line.stages) == len(faults), "they have happened"
        return line

    return carry_out


@pytest.mark.parametrize("number", range(20))
def test_a_run_bears_what_happens_to_its_workers(number, scripts, chaos):
    plan = scripts["draw"](
        number,
        seed=SEED,
        kinds=("kill", "stop", "restart"),
        transports=("zmq", "zmq", "zmq", "zmq", "tensorpipe"),
        starts=("hand",),
        tasks=("Generate", "Score"),
        num_workers=3,
        timeout_s=TIMEOUT_S,
    )
    line = chaos(3).run(plan)
    print(f"seed {SEED}: {line}")
    assert line.violations == []


def test_with_nobody_to_take_over_the_run_ends_with_6_and_names_what_is_lost(carry_out):
    line = carry_out(100, "hand", ("kill", 0, "decode"), sort="last")
    assert line.outcome == "refused, 6"


def test_workers_of_a_killed_master_serve_the_next(carry_out):
    assert carry_out(101, "hand", ("kill_master", 0, "decode")).outcome == "killed"
    assert carry_out(102, "hand").outcome == "ok"


def test_ctrl_c_while_the_master_waits_for_a_worker(carry_out):
    faults = (("stop", 1, "decode"), ("interrupt_twice", 0, "decode"))
    assert carry_out(103, "hand", *faults).outcome == "interrupted"
    assert carry_out(104, "hand").outcome == "ok"


def test_one_ctrl_c_lets_the_batch_be_finished_with_the_workers_that_are_left(carry_out):
    faults = (("stop", 1, "decode"), ("interrupt", 0, "decode"))
    assert carry_out(105, "hand", *faults).outcome == "ok"  # there is one batch


def test_local_workers_bear_and_end_like_others(carry_out):
    """One test, since interpreters have to start each time."""
    line = carry_out(110, "local", ("kill", 1, "decode"), num_workers=2)
    assert line.outcome == "ok"
    assert line.adopted_s is not None
    line = carry_out(111, "local", ("kill_master", 0, "decode"), num_workers=2)
    assert line.outcome == "killed"
    assert line.orphans_s < 2
    faults = (("stop", 1, "decode"), ("interrupt_twice", 0, "decode"))
    line = carry_out(112, "local", *faults, num_workers=2)
    assert line.outcome == "interrupted"
    assert line.orphans_s < 2


def test_a_worker_whose_master_is_killed_frees_its_memory(scripts, nursery, tmp_path):
    from moe_lightning.demo.random_checkpoint import make_checkpoint

    size = {"hidden_size": 256, "expert_size": 512, "num_layers": 4, "num_experts": 16, "top_k": 2}
    checkpoint = make_checkpoint(
        tmp_path / "large", family="mixtral", **size, num_heads=4, num_kv_heads=2, vocab_size=320
    )
    expert_bytes = 4 * 16 * 3 * 256 * 512 * 4
    address = f"ipc://{tmp_path}/w"
    worker = scripts["HandWorker"](nursery, address, str(checkpoint), tmp_path / "worker.log")
    assert worker.wait_until_listening()
    before = anonymous_bytes(worker.child.pid)
    marks = tmp_path / "marks"
    (tmp_path / "rows.txt").write_text("to be or not to be\n" * 50)
    master = nursery.start(
        [
            *("predict", "--model.checkpoint", checkpoint, "--output_dir", tmp_path / "out"),
            *("--data.input", tmp_path / "rows.txt", "--data.max_batch_tokens", 64),
            *("--trainer.strategy", "chaos_rpc_master.WatchedRPCStrategy"),
            *("--trainer.strategy.workers", f"[{address}]"),
            *("--trainer.strategy.timeout_s", TIMEOUT_S, "--trainer.accelerator", "cpu"),
        ],
        log=tmp_path / "master.log",
        environ={"CHAOS_MARKS": str(marks)},
    )
    wait_until = scripts["wait_until"]
    assert wait_until(lambda: marks.exists() and "prefill" in marks.read_text(), 60), master.said()
    loaded = anonymous_bytes(worker.child.pid) - before
    assert loaded > 0.9 * expert_bytes
    master.send(signal.SIGKILL)
    at_s = time.monotonic()
    assert wait_until(lambda: worker.num_freed == 1, 30)
    assert time.monotonic() - at_s < TIMEOUT_S + 2
    assert wait_until(lambda: anonymous_bytes(worker.child.pid) - before < 0.2 * expert_bytes, 5)
    worker.kill()


def anonymous_bytes(pid):
    """Memory of a process that no file backs."""
    (line,) = (
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024
