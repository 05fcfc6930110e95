"""A check of the checkpoint that a test loads: mmengine only logs weights that are missing or of another shape."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from swinv2_mm.checkpoints import CheckpointError
from swinv2_mm.checkpoints.backbone import unwrap
from swinv2_mm.checkpoints.layouts import CLASSIFIER_PREFIX


class TestedWeightsHook(Hook):
    """Refuse to test a model whose neck and heads have random weights; the backbone checks its own weights.

    Some weights may be missing, such as those of an auxiliary head, which only training uses.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Compare the checkpoint with the model.

        Raises:
            CheckpointError: It has no weights for any neck or head, or one of another shape.
        """
        weights = {
            name.removeprefix('module.').replace(f'backbone.{CLASSIFIER_PREFIX}', CLASSIFIER_PREFIX): value
            for name, value in unwrap(checkpoint).items()
        }
        model = runner.model
        while is_model_wrapper(model) or hasattr(model, 'merge_preds'):  # in a model for test-time augmentation
            model = model.module
        check_heads(model, weights, runner._load_from)


def check_heads(model: nn.Module, weights: dict, path: str) -> None:
    """See `TestedWeightsHook`.

    Raises:
        CheckpointError: See there.
    """
    heads = {name: p.shape for name, p in model.named_parameters() if not name.startswith('backbone.')}
    if heads and not heads.keys() & weights.keys():
        parts = ', '.join(dict.fromkeys(name.split('.')[0] for name in heads))
        raise CheckpointError(
            f'checkpoint {path} cannot be tested: it has no weights for {parts}, which would stay random. Test the '
            'checkpoint of a whole model'
        )
    for name, shape in heads.items():
        if name in weights and weights[name].shape != shape:
            raise CheckpointError(
                f'checkpoint {path} cannot be tested: {name} has the shape {tuple(weights[name].shape)}, and '
                f'{tuple(shape)} in the model. If the classes differ, set num_classes in the config to the number of '
                'classes of the checkpoint'
            )
