"""Shared by the tests of the configs."""

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture
def mmpretrain_scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield
