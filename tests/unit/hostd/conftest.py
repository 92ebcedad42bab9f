# Fixtures of hostd's unit tests: a running hostd, and a host with open flows.
from __future__ import annotations

import pytest

from tests.unit.hostd.agent_rig import Rig
from tests.unit.hostd.revoke_rig import Host


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def host() -> Host:
    return Host()
