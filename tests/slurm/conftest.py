"""One Slurm for all the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import cluster


@pytest.fixture(scope="package", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cluster(tmp_path_factory.mktemp("slurm")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield
