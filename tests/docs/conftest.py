"""What pages have in common."""

import pytest
from made_files import MadeFiles


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeFiles:
    """What commands made that depend on nothing, for all pages."""
    return MadeFiles(tmp_path_factory.mktemp("made"))
