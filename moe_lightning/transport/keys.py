"""CURVE keys on disk: a master and its workers know each other by them, and encrypt with them.

    DIR/master.key  master.key_secret  worker.key  worker.key_secret

All machines of a user have the same directory: the workers are one role with one key.
"""

import shutil
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import zmq
from zmq.auth import create_certificates, load_certificate

from moe_lightning.errors import UsageError

Role = Literal["master", "worker"]
_ROLES: tuple[Role, Role] = ("master", "worker")
_HOW = (
    "Make keys once with `python -m moe_lightning worker --new-keys DIR`, and copy DIR to every "
    "machine as it is (`scp -rp`)."
)


@dataclass(frozen=True)
class Keys:
    """The keys that one side of a connection needs, each as 40 characters of Z85.

    Args:
        role: Whose they are.
        public: The own public key.
        secret: The own secret key.
        peer: The public key of the other role.
    """

    role: Role
    public: bytes
    secret: bytes = field(repr=False)
    peer: bytes

    @classmethod
    def load(cls, directory: str | Path, role: Role) -> "Keys":
        """Read the keys of a role.

        Args:
            directory: What `new_keys` made.
            role: The side that this process is.

        Returns:
            The keys.

        Raises:
            UsageError: If a file is missing, is no key, or if others may read the secret.
        """
        directory = Path(directory)
        (other,) = (name for name in _ROLES if name != role)
        secret_file = directory / f"{role}.key_secret"
        public, secret = _read_key(secret_file)
        _refuse_readable_secret(secret_file)
        if secret is None:
            raise UsageError(f"{secret_file}: holds no secret key. {_HOW}")
        if zmq.curve_public(secret) != public:
            raise UsageError(f"{secret_file}: its two keys are not a pair. {_HOW}")
        return cls(
            role=role, public=public, secret=secret, peer=_read_key(directory / f"{other}.key")[0]
        )


def new_keys(directory: str | Path) -> list[Path]:
    """Make the keys of a master and its workers.

    Args:
        directory: Where; it is made, readable by its owner only. Nothing is overwritten.

    Returns:
        The files.

    Raises:
        UsageError: If the directory already holds something, or cannot be written.
    """
    directory = Path(directory)
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UsageError(
                f"{directory}: exists and is not empty, and keys are never overwritten. Give "
                "another directory, or remove this one on every machine."
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Others must not see the secrets for a moment either: mkdtemp's directories are 0700.
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            for role in _ROLES:
                Path(create_certificates(temporary, role)[1]).chmod(0o600)
            temporary.rename(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise UsageError(
            f"{directory}: keys cannot be written there ({error.strerror}). Give a directory that "
            "may be made."
        ) from error
    return sorted(directory.iterdir())


def _read_key(file: Path) -> tuple[bytes, bytes | None]:
    if not file.is_file():
        raise UsageError(f"{file}: there is no such key. {_HOW}")
    try:
        public, secret = load_certificate(file)
        for key in (public, secret):
            if key is not None and len(zmq.utils.z85.decode(key)) != 32:
                raise ValueError("not 32 bytes")
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UsageError(f"{file}: cannot be read as a key ({error}). {_HOW}") from error
    return public, secret


def _refuse_readable_secret(file: Path) -> None:
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise UsageError(
            f"{file}: a secret key that others may read (mode {mode:04o}) keeps nobody out. "
            f"`chmod 600 {file}`; if other people had access to the machine, make new keys."
        )
