"""Models that come as installed packages."""

from importlib import util
from pathlib import Path

import pytest


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"package {name} is not installed")
    return Path(spec.submodule_search_locations[0])
