"""Fixtures of the tests of fleets."""

import pytest
from fleet_runs import Cluster, contents, write_adapters

collect_ignore = ["plugin"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    pytest.importorskip("distributed")
    made = Cluster(tmp_path_factory.mktemp("cluster"), 2)
    yield made
    made.close()


@pytest.fixture
def adapters(tmp_path):
    return write_adapters(tmp_path / "adapters", 6)


@pytest.fixture
def singles(tmp_path, adapters):
    """Return what single runs of squeeze write of the adapters, at the place of the fleet's."""
    import loratools as lt

    def make(sources=adapters, rank=2, name="singles"):
        folder = tmp_path / name
        folder.mkdir()
        for source in sources:
            lt.squeeze(source, rank=rank, output=folder / source.name)
        return contents(folder)

    return make
