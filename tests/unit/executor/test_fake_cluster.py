"""The fake keeps the same promises as Ray."""

from __future__ import annotations

import pytest

from tests.unit.executor.cluster_suite import ClusterSuite
from tests.unit.executor.fake_cluster import NODE, FakeCluster

pytestmark = pytest.mark.unit


class TestFakeCluster(ClusterSuite):
    @pytest.fixture
    def cluster(self) -> FakeCluster:
        return FakeCluster()

    @pytest.fixture
    def node_id(self) -> str:
        return NODE
