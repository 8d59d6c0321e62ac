import pytest

from moe_lightning.errors import UsageError
from moe_lightning.transport.addresses import (
    check_address,
    is_loopback,
    join,
    numeric,
    pulse_address,
    seen_from,
    split,
)

LOOPBACK = ["127.0.0.1", "127.8.9.1", "localhost", "::1", "::ffff:127.0.0.1"]
PRIVATE = ["10.1.2.3", "172.16.0.1", "192.168.7.7", "fd00::1", "169.254.1.1"]
PUBLIC = ["8.8.8.8", "172.32.0.1", "2001:4860::1", "100.64.0.1", "*", "0.0.0.0", "::"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_needs_nothing(host):
    address = join(host, 4711)
    assert check_address(address, option="--listen", keys=False) == address
    assert is_loopback(host)


@pytest.mark.parametrize("host", PRIVATE + PUBLIC + ["node17", "localhost.example.org"])
def test_other_hosts_need_keys(host):
    address = join(host, 4711)
    with pytest.raises(UsageError, match=r"--listen: .*--new-keys DIR.*127\.0\.0\.1"):
        check_address(address, option="--listen", keys=False)
    assert check_address(address, option="--listen", keys=True) == address
    assert not is_loopback(host)


@pytest.mark.parametrize("host", PRIVATE + LOOPBACK)
def test_private_addresses_can_be_had_insecurely(host):
    address = join(host, 4711)
    assert check_address(address, option="--listen", keys=False, insecure=True) == address


@pytest.mark.parametrize("host", [*PUBLIC, "::ffff:8.8.8.8"])
def test_public_addresses_never_go_without_keys(host):
    with pytest.raises(UsageError, match="not one private address"):
        check_address(join(host, 4711), option="--listen", keys=False, insecure=True)


@pytest.mark.parametrize(
    ("found", "is_fine"),
    [(["10.0.0.1"], True), (["10.0.0.1", "fd00::1"], True), (["10.0.0.1", "8.8.8.8"], False)],
)
def test_a_name_is_private_if_all_its_addresses_are(monkeypatch, found, is_fine):
    answer = [(2, 1, 6, "", (number, 0)) for number in found]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: answer)
    if is_fine:
        check_address("tcp://node17:1", option="--listen", keys=False, insecure=True)
    else:
        with pytest.raises(UsageError, match="not one private address"):
            check_address("tcp://node17:1", option="--listen", keys=False, insecure=True)


@pytest.mark.parametrize("insecure", [True, False])
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:80",
        "tcp://",
        "tcp://:80",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:1234567",
        "tcp://127.0.0.1:80/path",
        "tcp://127.0.0.1:80\n",
        "tcp://user@127.0.0.1:80",
        "tcp://::1:80",
        "tcp://127.0.0.1:80;tcp://8.8.8.8:1",
        "tcp://hôte:80",
        "tcp://eth0;127.0.0.1:80",
        "udp://127.0.0.1:80",
        "http://127.0.0.1:80",
        "inproc://x",
        "tcp://127.0.0.1:\N{FULLWIDTH DIGIT EIGHT}",
        "x" * 100_000,
    ],
)
def test_what_is_no_address_is_refused(text, keys, insecure):
    with pytest.raises(UsageError, match=r"--listen: .*no address") as caught:
        check_address(text, option="--listen", keys=keys, insecure=insecure)
    assert len(str(caught.value)) < 400


def test_ipc_is_for_this_machine():
    check_address("ipc:///tmp/x", option="--listen", keys=False)
    check_address("ipc://" + "x" * 106, option="--listen", keys=False)
    for path in ("", "x" * 107, "ü" * 54):
        with pytest.raises(UsageError, match="1 to 106 bytes"):
            check_address("ipc://" + path, option="--listen", keys=False)


def test_split_and_join():
    assert split("tcp://[fd00::1]:80") == ("fd00::1", 80)
    assert split("tcp://node17.cluster:0") == ("node17.cluster", 0)
    assert join("fd00::1", 80) == "tcp://[fd00::1]:80"


def test_the_pulse_listens_beside():
    assert pulse_address("tcp://[fd00::1]:80") == "tcp://[fd00::1]:81"
    assert pulse_address("tcp://node:0") == "tcp://node:0"
    assert pulse_address("tcp://node:65535") == "tcp://node:0"
    assert pulse_address("ipc:///tmp/x") == "ipc:///tmp/x.pulse"


def test_a_master_dials_the_host_it_knows():
    assert seen_from("tcp://node17:80", "tcp://0.0.0.0:4711") == "tcp://node17:4711"
    assert seen_from("tcp://[fd00::1]:80", "tcp://*:81") == "tcp://[fd00::1]:81"
    assert seen_from("ipc:///tmp/x", "ipc:///tmp/x.pulse") == "ipc:///tmp/x.pulse"


def test_a_host_to_listen_on_gets_its_number():
    assert numeric("tcp://localhost:80") in ("tcp://127.0.0.1:80", "tcp://[::1]:80")
    for address in ("tcp://127.0.0.1:80", "tcp://[::1]:80", "tcp://*:80", "ipc:///tmp/x"):
        assert numeric(address) == address
    with pytest.raises(UsageError, match="not known"):
        numeric("tcp://no-such-host.invalid:80")
