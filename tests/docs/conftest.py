"""What pages have in common."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_files import MadeFiles


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeFiles:
    """What commands made that depend on nothing, for all pages."""
    return MadeFiles(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Socket of a Python that forks for each command."""
    path = tmp_path_factory.mktemp("warm") / "socket"
    script = Path(__file__).with_name("warm_python.py")
    process = subprocess.Popen([sys.executable, str(script), str(path)])
    yield path
    process.kill()
    process.wait()
