"""Counted memory compared with counts by hand and with the memory of the process; fake tensors compared with real."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from swinv2_mm.cli.memory import (
    MemoryTracker,
    SkippedProducts,
    cuda_casts,
    make_fake,
    make_gradients,
    measure_backbone,
)
from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2

NANO = dict(embed_dims=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8))
# attention backend, stages with activation checkpointing, and with sequential attention
TECHNIQUES = [
    ('reference', False, ()),
    ('reference', True, ()),
    ('reference', False, (0, 1)),
    ('reference', True, (0, 1)),
    ('reference', (1,), (0,)),
    ('auto', False, ()),
    ('auto', True, ()),
]


# ---------------------------------------------------------------- the tracker


def test_memory_tracker_lifetime_of_a_tensor():
    with MemoryTracker() as tracker:
        a = torch.zeros(256)
        assert (tracker.live, tracker.peak) == (1024, 1024)
        b = a + 1
        assert tracker.live == 2048
        del a
        assert (tracker.live, tracker.peak) == (1024, 2048)
        tracker.reset_peak()
        assert tracker.peak == 1024
        c = b.double()
        assert (tracker.live, tracker.peak) == (3072, 3072)
    del b, c
    assert tracker.live == 0


def test_memory_tracker_views_and_in_place_operations():
    with MemoryTracker() as tracker:
        a = torch.zeros(16, 16)
        view = a.t()[3:5].reshape(-1, 1)[1:].expand(-1, 7)
        a.add_(1)
        assert tracker.live == 16 * 16 * 4 + 2 * 16 * 4  # reshape copies a transposed slice
        del a
        assert tracker.live == 2 * 16 * 4
        kept = torch.zeros(100)[:1]
        assert tracker.live == 2 * 16 * 4 + 400
    del view, kept
    assert tracker.live == 0


def test_memory_tracker_watch():
    before = torch.zeros(64)
    with MemoryTracker() as tracker:
        before.mul_(2)
        views = before.t(), before[3:]
        assert tracker.live == 0
    with MemoryTracker() as tracker:
        tracker.watch([before, before[:3]])
        assert tracker.live == 256
        after = before + 1
    del before, views
    assert (tracker.live, tracker.peak) == (256, 512)
    del after
    assert tracker.live == 0


def test_memory_tracker_ignores_meta_tensors():
    with MemoryTracker() as tracker:
        torch.empty(100, device='meta').add(1)
        assert tracker.peak == 0


def test_memory_tracker_resized_storage():
    with MemoryTracker() as tracker:
        for _ in range(50):
            x = torch.zeros(1000)
            assert tracker.live == 4000
            del x
        assert (tracker.live, tracker.peak) == (0, 4000)


def test_memory_tracker_saved_tensors_of_autograd():
    x, weight = torch.rand(100, 8), torch.rand(8, 8, requires_grad=True)
    with MemoryTracker() as tracker:
        loss = (x @ weight).tanh().sum()
        assert tracker.live == 3200 + 4  # the output of tanh; the matrix product has been freed
        tracker.reset_peak()
        loss.backward()
        # added in the backward of tanh: the gradient of the loss, and that of tanh; the gradient of the sum is a view
        assert tracker.peak == 3200 + 4 + 4 + 3200
        del loss
        assert tracker.live == 8 * 8 * 4  # the gradient of the weight
        weight.grad = None
        assert tracker.live == 0


@pytest.mark.slow
def test_memory_tracker_peak_is_that_of_the_process():
    """Large tensors determine the peak of a process. It runs in its own process, because peaks do not fall."""
    script = r"""
        import re, torch
        from pathlib import Path
        from swinv2_mm.cli.memory import MemoryTracker, make_gradients
        from swinv2_mm.models import SwinTransformerV2
        torch.set_num_threads(1)
        arch = dict(embed_dims=32, depths=(1, 1), num_heads=(1, 2))
        model = SwinTransformerV2(arch, window_size=16, out_indices=(0, 1))
        make_gradients(model)
        def step(size):
            x = torch.rand(1, 3, size, size)
            sum(out.mean() for out in model(x)).backward()
        # not getrusage, which includes the peak of the parent
        rss = lambda: 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])
        step(128)  # allocations of libraries
        before = rss()
        step(1024)
        grown = rss() - before
        with MemoryTracker() as tracker:
            step(1024)
        print(tracker.peak, grown)
    """
    command = [sys.executable, '-c', textwrap.dedent(script)]
    # small blocks too go back to the system at once, instead of into holes that later ones do not fit
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_='65536')
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    tracked, grown = map(int, output.split()[-2:])
    assert tracked > 200e6
    assert tracked == pytest.approx(grown, rel=0.1)


# ---------------------------------------------------------------- fake tensors and real ones


def backbone(axes, attention_backend, with_cp, sequential_stages):
    kind = {2: SwinTransformerV2, 3: SwinTransformer3DV2}[axes]
    window = {2: 4, 3: (2, 4, 4)}[axes]
    return kind(
        NANO,
        window_size=window,
        attention_backend=attention_backend,
        with_cp=with_cp,
        sequential_stages=sequential_stages,
        out_indices=(0, 2),
        drop_path_rate=0.5,
        frozen_stages=0,
    ).train()


@pytest.mark.parametrize(
    ('axes', 'techniques', 'bfloat16'),
    [
        (3, TECHNIQUES[0], False),
        (3, TECHNIQUES[1], True),
        (2, TECHNIQUES[2], False),
        (2, TECHNIQUES[3], True),
        (2, TECHNIQUES[4], False),
        (2, TECHNIQUES[5], False),
        (3, TECHNIQUES[6], True),
    ],
)
def test_measure_backbone_of_fake_and_real_tensors(axes, techniques, bfloat16):
    shape = (1, 3, *{2: (40, 24), 3: (6, 24, 20)}[axes])  # not divisible by the window
    for _ in range(2):  # the first call creates the cached window indices
        real = measure_backbone(backbone(axes, *techniques), torch.rand(shape), bfloat16)
    with torch.device('meta'):
        model = backbone(axes, *techniques)
    with FakeTensorMode():
        fake = measure_backbone(make_fake(model), torch.empty(shape), bfloat16)
    assert fake.kept == real.kept
    assert fake.forward_peak == real.forward_peak
    assert fake.backward_peak == real.backward_peak
    assert [(x.shape, x.dtype) for x in fake.outputs] == [(x.shape, x.dtype) for x in real.outputs]
    assert len(fake.kept) == 1 + 3  # the patch embedding, and the stages up to the last output


def test_measure_backbone_is_a_plain_training_step():
    """The same step, written out without `measure_backbone`."""
    model, x = backbone(2, 'reference', False, ()), torch.rand(2, 3, 64, 64)
    memory = measure_backbone(model, x)
    model.train()  # clears the cached position biases
    with MemoryTracker() as tracker:
        tracker.watch([x])
        outputs = model(x)
        assert tracker.live == sum(memory.kept)
        assert tracker.peak == memory.forward_peak
        tracker.reset_peak()
        gradients = [torch.rand_like(out) for out in outputs]
        torch.autograd.backward(outputs, gradients)
    # here, outputs and gradients live until the end
    kept = sum(x.nbytes for x in (*outputs, *gradients))
    assert memory.backward_peak <= tracker.peak <= memory.backward_peak + kept
    assert kept < 0.05 * tracker.peak


def test_measure_backbone_each_technique_saves_memory():
    def measured(*techniques):
        return measure_backbone(backbone(2, *techniques), torch.rand(2, 3, 128, 128))

    none, checkpointing, sequential, both, _, sdpa, sdpa_checkpointing = (measured(*t) for t in TECHNIQUES)
    assert sum(checkpointing.kept) < sum(none.kept) / 5
    assert sum(sequential.kept) < sum(none.kept)
    assert both.backward_peak < checkpointing.backward_peak < none.backward_peak
    assert sum(sdpa.kept) < sum(sequential.kept)
    assert sdpa_checkpointing.backward_peak < both.backward_peak


# ---------------------------------------------------------------- precision


def dtypes():
    x = torch.rand(4, 8)
    with torch.autocast('cpu', torch.bfloat16):
        y = nn.Linear(8, 8)(x)
        norm, group = nn.LayerNorm(8)(y), nn.GroupNorm(2, 8)(y)
        loss = F.cross_entropy(y, torch.zeros(4, dtype=torch.long))
        mask = F.binary_cross_entropy_with_logits(y, torch.zeros_like(y), reduction='none')
        return [t.dtype for t in (y, norm, group, y.softmax(-1), y.log_softmax(-1), loss, mask, F.gelu(y))]


def test_cuda_casts_of_autocast():
    """The float32 operations are those of PyTorch's documentation of autocast for CUDA."""
    half, full = torch.bfloat16, torch.float32
    before = dtypes()
    with cuda_casts():
        assert dtypes() == [half, full, full, full, full, full, full, half]
    assert dtypes() == before
    assert before[1] == half


def test_cuda_casts_keep_the_gradient():
    x = torch.rand(4, 8, requires_grad=True)
    with cuda_casts(), torch.autocast('cpu', torch.bfloat16):
        (x.bfloat16().softmax(-1)[:, 0]).sum().backward()
    expected = torch.autograd.grad(x.bfloat16().float().softmax(-1)[:, 0].sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- SkippedProducts


def test_skipped_products_take_the_same_memory():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 2, 2), nn.Flatten(), nn.Linear(64, 5)
    )
    make_gradients(model)

    def peak():
        with MemoryTracker() as tracker:
            out = model(torch.rand(2, 3, 8, 8))
            out.square().sum().backward()
        return tracker.peak, out

    real, out = peak()
    with SkippedProducts():
        skipped, zeros = peak()
    assert skipped == real
    assert out.abs().max() > 0
    assert zeros.abs().max() == 0
