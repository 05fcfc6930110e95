"""A hook for trainings that a test kills: a config imports it by `custom_imports`."""

import os
import time
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class StallInSecondEpoch(Hook):
    """Wait for ever at the first step of the second epoch, after a sign: a file in the folder of the run."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.epoch == 1:
            Path(f'stalled_{os.environ["RANK"]}').touch()
            time.sleep(3600)
