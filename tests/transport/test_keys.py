import os
import stat

import pytest
import zmq

from moe_lightning.errors import UsageError
from moe_lightning.transport.keys import Keys, new_keys

NAMES = ["master.key", "master.key_secret", "worker.key", "worker.key_secret"]


@pytest.fixture
def directory(tmp_path):
    new_keys(tmp_path / "keys")
    return tmp_path / "keys"


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_new_keys_are_for_their_owner_only(tmp_path):
    directory = tmp_path / "some" / "where"
    before = os.umask(0)
    try:
        files = new_keys(directory)
    finally:
        os.umask(before)
    assert [file.name for file in files] == NAMES
    assert sorted(path.name for path in directory.parent.iterdir()) == ["where"]
    assert mode_of(directory) == 0o700
    assert {mode_of(file) for file in files if file.suffix == ".key_secret"} == {0o600}


def test_both_sides_know_each_other(directory):
    master, worker = Keys.load(directory, "master"), Keys.load(str(directory), "worker")
    assert (master.peer, worker.peer) == (worker.public, master.public)
    assert master.public != worker.public
    for keys in (master, worker):
        assert zmq.curve_public(keys.secret) == keys.public
        assert keys.secret.decode() not in repr(keys)


def test_a_side_needs_only_its_own_secret(directory):
    (directory / "master.key_secret").unlink()
    Keys.load(directory, "worker")
    with pytest.raises(UsageError, match=r"master.key_secret.*--new-keys"):
        Keys.load(directory, "master")


def test_nothing_is_overwritten(directory):
    before = [file.read_bytes() for file in sorted(directory.iterdir())]
    with pytest.raises(UsageError, match="not empty"):
        new_keys(directory)
    with pytest.raises(UsageError, match="not empty"):
        new_keys(directory / "master.key")
    assert [file.read_bytes() for file in sorted(directory.iterdir())] == before


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "empty").mkdir(mode=0o755)
    new_keys(tmp_path / "empty")
    assert mode_of(tmp_path / "empty") == 0o700


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        new_keys(tmp_path / "file" / "keys")
    with pytest.raises(UsageError, match="cannot be written"):
        new_keys("/proc/nothing")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_secret_that_others_may_read_is_refused(directory, mode):
    (directory / "worker.key_secret").chmod(mode)
    with pytest.raises(UsageError, match=f"{mode:04o}.*chmod 600"):
        Keys.load(directory, "worker")
    Keys.load(directory, "master")


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no such key.*--new-keys DIR"):
        Keys.load(tmp_path / "none", "master")


@pytest.mark.parametrize("name", ["master.key_secret", "worker.key"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
        b'curve\n    public-key = "short"\n    secret-key = "short"\n',
        b'curve\n    public-key = "' + b"\xe9" * 40 + b'"\n    secret-key = "' + b"~" * 40 + b'"',
    ],
)
def test_what_is_no_key_is_refused(directory, name, content):
    (directory / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}.*--new-keys"):
        Keys.load(directory, "master")


def test_a_public_key_is_no_secret(directory):
    secret = directory / "master.key_secret"
    secret.write_bytes((directory / "master.key").read_bytes())
    with pytest.raises(UsageError, match="no secret key"):
        Keys.load(directory, "master")


def test_a_mixed_pair_is_refused(directory):
    master, worker = directory / "master.key_secret", directory / "worker.key_secret"
    lines = master.read_text().splitlines()
    lines[-1] = worker.read_text().splitlines()[-1]
    master.write_text("\n".join(lines))
    with pytest.raises(UsageError, match="not a pair"):
        Keys.load(directory, "master")


def test_a_directory_in_place_of_a_key_is_refused(directory):
    (directory / "worker.key").unlink()
    (directory / "worker.key").mkdir()
    with pytest.raises(UsageError, match="no such key"):
        Keys.load(directory, "master")
