"""The position bias against the formula of the paper, and its cache after changes of the weights."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook

from swinv2_mm.models import log_cpb
from swinv2_mm.models.log_cpb import LogCPB
from swinv2_mm.ops.coordinates import log_spaced_coords


def formula(offset: int, pretrained: int) -> float:
    scaled = 8 * offset / (pretrained - 1)
    return math.copysign(math.log2(1 + abs(scaled)) / 3, scaled)


@pytest.mark.parametrize(('window', 'pretrained'), [((8, 8), (8, 8)), ((24, 12), (12, 6)), ((3, 4, 5), (8, 4, 5))])
def test_log_spaced_coords_follow_the_formula_along_each_axis(window, pretrained):
    coords = log_spaced_coords(window, torch.tensor(pretrained)).view(*(2 * w - 1 for w in window), len(window))
    for axis, (w, p) in enumerate(zip(window, pretrained, strict=True)):
        values = coords.movedim(axis, 0).flatten(1, -2)[:, 0, axis]
        assert values.tolist() == pytest.approx([formula(d, p) for d in range(1 - w, w)], abs=1e-6)


@pytest.mark.parametrize(
    ('pretrained', 'window', 'maximum'),
    [(8, 8, 1.057), (8, 16, 1.394), (8, 32, 1.729), (12, 24, 1.383), (12, 48, 1.712), (6, 32, 1.887)],
)
def test_log_spaced_coords_extrapolate_for_larger_windows(pretrained, window, maximum):
    assert float(log_spaced_coords((window, window), torch.tensor([pretrained, pretrained])).max()) == pytest.approx(
        maximum, abs=1e-3
    )


def test_log_spaced_coords_of_one_token_are_zero():
    assert log_spaced_coords((1, 2), torch.tensor([1, 2]))[:, 0].eq(0).all()


def test_log_cpb_of_an_offset_does_not_depend_on_the_window():
    """Window transfer: the same weights give the same bias for the same offset in a larger window."""
    small, large = LogCPB((4, 4), (4, 4), 2), LogCPB((8, 8), (4, 4), 2)
    large.load_state_dict(small.state_dict())
    middle = large().view(2, 15, 15)[:, 4:11, 4:11]
    torch.testing.assert_close(small().view(2, 7, 7), middle, rtol=1e-6, atol=1e-6)


def test_log_cpb_is_between_0_and_16_in_float32_under_autocast():
    mlp = LogCPB((4, 4), (4, 4), 2)
    with torch.no_grad():
        mlp[2].weight.mul_(1e4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        bias = mlp()
    assert bias.dtype == torch.float32
    assert bias.min() >= 0
    assert bias.max() <= 16


# --- cache ------------------------------------------------------------------------------------------------------------


def random_cpb() -> LogCPB:
    torch.manual_seed(0)
    return LogCPB((4, 5), (4, 3), 2)


def plain_bias(mlp: LogCPB) -> torch.Tensor:
    """The formula, differentiated by autograd."""
    weight1, bias1, weight2 = mlp.parameters()
    coords = log_spaced_coords(mlp.window_size, mlp.pretrained_window_size).to(weight1)
    return (16 * torch.sigmoid(torch.relu(coords @ weight1.T + bias1) @ weight2.T)).T


def gradients(mlp: LogCPB, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(bias.shape, dtype=bias.dtype, generator=generator)
    return torch.autograd.grad((bias * weights).sum(), tuple(mlp.parameters()))


def assert_up_to_date(mlp: LogCPB) -> None:
    """Bias and gradients are those of the current weights."""
    torch.testing.assert_close(mlp(), plain_bias(mlp), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(mlp, mlp()), gradients(mlp, plain_bias(mlp)), rtol=1e-4, atol=1e-5)


def test_log_cpb_gradients_equal_autograd():
    mlp = random_cpb().double()
    expected = gradients(mlp, plain_bias(mlp))
    assert all(grad.abs().max() > 0 for grad in expected)
    for _ in range(2):  # computed, and taken from the cache
        torch.testing.assert_close(gradients(mlp, mlp()), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def computations(monkeypatch):
    """Number of computations of the bias, without gradients (False) and with gradients (True)."""
    calls = Counter()

    def counted(*args):
        calls[torch.is_grad_enabled()] += 1
        return log_spaced_coords(*args)

    monkeypatch.setattr(log_cpb, 'log_spaced_coords', counted)
    return calls


@torch.no_grad()
def test_log_cpb_does_not_cache_for_tensors_that_are_no_parameters():
    """Such as views of FSDP, whose changes increment no version counter."""
    mlp = random_cpb().eval()
    weight = mlp[2].weight.detach().clone()
    before = torch.func.functional_call(mlp, {'2.weight': weight}, ()).clone()
    weight.data.mul_(2)
    found = torch.func.functional_call(mlp, {'2.weight': weight}, ())
    torch.testing.assert_close(found, 16 * torch.sigmoid(2 * torch.logit(before / 16)), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_log_cpb_cache_is_not_confused_by_a_reused_address():
    """The allocator reuses addresses, and weights of `functional_call` live for one call."""
    mlp, others = random_cpb().eval(), []
    first = torch.nn.Parameter(mlp[2].weight * 1)
    address = first.untyped_storage()._cdata
    before = torch.func.functional_call(mlp, {'2.weight': first}, ()).clone()
    del first
    for _ in range(1000):
        second = torch.nn.Parameter(mlp[2].weight * 2)
        if second.untyped_storage()._cdata == address:
            break
        others.append(second)
    found = torch.func.functional_call(mlp, {'2.weight': second}, ())
    expected = 16 * torch.sigmoid(2 * torch.logit(before / 16))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_log_cpb_is_computed_once_in_eval_mode(computations):
    mlp = random_cpb().eval()
    with torch.no_grad():
        for _ in range(5):
            mlp()
    with torch.inference_mode():
        mlp()
    assert computations == {False: 1}


class WritesThroughData(torch.optim.Optimizer):
    """Changes parameters like sharded optimizers, without incrementing their version counters."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group['params']:
                parameter.data.sub_(parameter.grad)


def step_of_adamw(mlp):
    mlp().sum().backward()
    torch.optim.AdamW(mlp.parameters(), lr=0.1).step()


def step_that_writes_through_data(mlp):
    mlp().sum().backward()
    versions = [p._version for p in mlp.parameters()]
    WritesThroughData(mlp.parameters()).step()
    assert versions == [p._version for p in mlp.parameters()]


def load_other_weights(mlp):
    mlp.load_state_dict({name: 2 * value for name, value in mlp.state_dict().items()})


def assign_other_weights(mlp):
    mlp.load_state_dict({name: 2 * value for name, value in mlp.state_dict().items()}, assign=True)


def replace_data(mlp):
    mlp[0].weight.data = mlp[0].weight.detach() + 1


def replace_a_parameter(mlp):
    mlp[2].weight = torch.nn.Parameter(mlp[2].weight.detach() + 1)


def change_in_place(mlp):
    with torch.no_grad():
        mlp[0].bias.add_(1)


def change_the_pretrained_window(mlp):
    mlp.pretrained_window_size.fill_(8)


@pytest.mark.parametrize(
    'change',
    [
        step_of_adamw,
        step_that_writes_through_data,
        load_other_weights,
        assign_other_weights,
        replace_data,
        replace_a_parameter,
        change_in_place,
        change_the_pretrained_window,
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_log_cpb_follows_changes_of_the_weights(change, training):
    mlp = random_cpb().train(training)
    before = mlp().detach().clone()
    change(mlp)
    assert (plain_bias(mlp) - before).abs().max() > 1e-2, 'the change has no effect'
    assert_up_to_date(mlp)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_log_cpb_follows_the_dtype_of_the_weights(dtype, tolerance):
    mlp = random_cpb()
    mlp()
    torch.testing.assert_close(mlp.to(dtype)(), plain_bias(mlp), rtol=tolerance, atol=tolerance)
    assert mlp().dtype == dtype


def test_log_cpb_uses_the_averaged_weights_while_emahook_validates():
    """The hook swaps `weight.data` just before `eval` and `train`."""
    mlp, hook = random_cpb(), EMAHook()
    runner = SimpleNamespace(model=mlp)
    hook.before_run(runner)
    averaged = mlp().detach().clone()
    step_of_adamw(mlp)
    trained = mlp().detach().clone()
    assert (trained - averaged).abs().max() > 1e-2
    hook.before_val_epoch(runner)
    assert torch.equal(mlp.eval()(), averaged)
    assert_up_to_date(mlp)
    hook.after_val_epoch(runner)
    assert torch.equal(mlp.train()(), trained)
    assert_up_to_date(mlp)


def test_log_cpb_cached_in_inference_mode_can_be_trained():
    mlp = random_cpb()
    with torch.inference_mode():
        torch.testing.assert_close(mlp(), plain_bias(mlp), rtol=1e-5, atol=1e-5)
    found = gradients(mlp, mlp().square())  # square saves the bias for the backward pass, like attention
    torch.testing.assert_close(found, gradients(mlp, plain_bias(mlp).square()), rtol=1e-4, atol=1e-4)


def test_log_cpb_and_its_gradients_are_in_float32_under_autocast():
    mlp = random_cpb()
    expected = gradients(mlp, plain_bias(mlp))
    with torch.autocast('cpu', torch.bfloat16):
        bias = mlp()
    assert bias.dtype == torch.float32
    torch.testing.assert_close(gradients(mlp, bias), expected, rtol=1e-4, atol=1e-5)
    assert_up_to_date(mlp)  # without autocast, from the same cache


def test_log_cpb_compiled_uses_the_current_weights():
    """A compiled model neither fills nor reads the cache."""
    mlp = random_cpb()
    compiled = torch.compile(mlp, fullgraph=True, backend='eager')
    for _ in range(2):
        torch.testing.assert_close(compiled(), plain_bias(mlp), rtol=1e-4, atol=1e-5)
        mlp[2].weight.data.mul_(-1)
    assert mlp._cache is None
    torch._dynamo.reset()


def test_log_cpb_copy_is_independent():
    mlp = random_cpb()
    before = mlp().detach().clone()
    twin = copy.deepcopy(mlp)
    assert torch.equal(twin(), before)
    change_in_place(twin)
    assert_up_to_date(twin)
    assert (twin() - before).abs().max() > 1e-2
    assert torch.equal(mlp(), before)
    change_in_place(mlp)
    assert torch.equal(mlp(), twin())
