"""What pages have in common."""

from pathlib import Path

import pytest
from made_files import MadeFiles

from moe_lightning.demo.random_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeFiles:
    """What commands made that depend on nothing, for all pages."""
    return MadeFiles(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a reader's own: a random one of a million parameters."""
    return make_checkpoint(tmp_path_factory.mktemp("own") / "mixtral", family="mixtral")
