"""What benchmark_backbone.py and benchmark_attention.py share: contenders on equal terms, measured in turns.

No contender gets a time before its results have been compared with those of this package's reference backend in
float64, with the same weights. Contenders of a family (ours, timm, ...) share their parameters, so that all of them fit
into memory at once and can take turns: a machine that slows down slows all of them.
"""

import argparse
import contextlib
import copy
import ctypes
import fnmatch
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn

from swinv2_mm.cli.errors import check_outputs
from swinv2_mm.cli.memory import resident
from swinv2_mm.models.sizes import ARCHS
from swinv2_mm.ops.files import write_whole

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
MIB = 2**20
MODES = ('inference', 'forward_backward', 'step')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
# Largest error of features, relative to the largest one, that rounding may explain; mistakes in windows or masks are
# larger. Gradients have crossed all blocks twice: that of a bias MLP which autocast runs in bfloat16, as in the peers,
# is off by a quarter in SwinV2-T.
LIMITS = {torch.float32: 3e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
GRADIENTS = 8  # times the limit
DENSE_PEAKS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}  # FLOP/s in half precision, by part of the GPU's name
GEMM = 2048  # rows and columns of the product that tells the peak of any other device
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3), in bytes
PROFILED = 12  # operators of a profile that get a line
WARM_UP = 2  # steps before the timed ones, beside the one that is checked


class NotPossibleError(Exception):
    """A contender cannot do what is asked; its row gives the reason."""


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    """A backbone and the input that it gets.

    Attributes:
        arch: As `swinv2_mm.models.SwinTransformerV2` takes it, as a dict.
        size: Pixels of the input along each axis, with the frames first.
        window: Tokens of a window along each axis.
        patch: Pixels of a patch along each axis.
    """

    arch: dict
    size: tuple[int, ...]
    window: tuple[int, ...]
    patch: tuple[int, ...] = (4, 4)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(self.arch['depths'])

    def dim(self, stage: int) -> int:
        """Channels of a stage."""
        return self.arch['embed_dims'] * 2**stage

    def map_size(self, stage: int) -> tuple[int, ...]:
        """Tokens of a stage along each axis; height and width are merged, time is not."""
        tokens = [-(-pixels // p) for pixels, p in zip(self.size, self.patch, strict=True)]
        return *tokens[:-2], *(-(-t // 2**stage) for t in tokens[-2:])

    def window_of(self, stage: int) -> tuple[int, ...]:
        """Window in effect in a stage: no larger than its map."""
        return tuple(min(pair) for pair in zip(self.map_size(stage), self.window, strict=True))

    def is_padded(self) -> bool:
        """Whether patches or windows do not divide their map somewhere."""
        pairs = [(self.size, self.patch)]
        pairs += [(self.map_size(i), self.window_of(i)) for i in range(len(self.depths))]
        return any(size % part for sizes, parts in pairs for size, part in zip(sizes, parts, strict=True))

    def logits(self, stage: int) -> int:
        """Attention logits of one block of a stage, for one image: windows x heads x N x N."""
        window = self.window_of(stage)
        windows = math.prod(-(-s // w) for s, w in zip(self.map_size(stage), window, strict=True))
        return windows * self.arch['num_heads'][stage] * math.prod(window) ** 2

    def attention_flops(self, stage: int) -> int:
        """FLOP of the attention half of a block, forward, two for each multiply-add; padding does not count."""
        tokens, dim = math.prod(self.map_size(stage)), self.dim(stage)
        return 2 * tokens * (4 * dim**2 + 2 * math.prod(self.window_of(stage)) * dim)

    def flops(self) -> int:
        """FLOP of the whole forward pass, without the small MLP of the position bias."""
        total = 2 * math.prod(self.map_size(0)) * self.dim(0) * 3 * math.prod(self.patch)
        for stage, depth in enumerate(self.depths):
            tokens, dim = math.prod(self.map_size(stage)), self.dim(stage)
            total += depth * (self.attention_flops(stage) + 2 * tokens * 8 * dim**2)
            if stage:
                total += 2 * tokens * 2 * dim * dim  # merging: 4 of half the channels each -> 1
        return total


def _square(arch: str, window: int, size: int) -> Shape:
    return Shape(ARCHS[arch], (size, size), (window, window))


SHAPES = {
    'nano': Shape(dict(embed_dims=32, depths=(2, 1), num_heads=(1, 2)), (64, 64), (8, 8)),  # to try the tools out
    't_w8_256': _square('tiny', 8, 256),
    'b_w8_256': _square('base', 8, 256),
    'b_w16_256': _square('base', 16, 256),
    'b_w24_384': _square('base', 24, 384),
    'l_w24_384': _square('large', 24, 384),
    'b_w32_1024': _square('base', 32, 1024),
    'b_w32_800x1333': Shape(ARCHS['base'], (800, 1333), (32, 32)),
    'video_t_224x224x8': Shape(ARCHS['tiny'], (8, 224, 224), (8, 7, 7), (1, 4, 4)),
    'video_t_320x320x8': Shape(ARCHS['tiny'], (8, 320, 320), (8, 20, 20), (1, 4, 4)),
    # one block of the first stage of SwinV2-G; its eager attention takes 29 GB in float32
    'g_block_1536_w32': Shape(dict(embed_dims=512, depths=(1,), num_heads=(16,)), (1536, 1536), (32, 32)),
}
BY_DEFAULT = [name for name in SHAPES if name != 'nano' and (DEVICE == 'cuda' or name != 'g_block_1536_w32')]


def default_batch(shape: Shape, device: str = DEVICE) -> int:
    """Images of a step."""
    side = max(shape.size)
    if device == 'cuda':
        return 32 if side <= 256 else 16 if side <= 384 and len(shape.size) == 2 else 1
    return 4 if side <= 256 else 2 if side <= 384 and len(shape.size) == 2 else 1


# ---------------------------------------------------------------- contenders


class Trunk(nn.Module):
    """A model, and how to get features (B, ..., C) from it.

    Args:
        model: Any model.
        features: Calls it.
    """

    def __init__(self, model: nn.Module, features: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """Input -> (B, ..., C)."""
        return self.features(self.model, x)


@dataclass(frozen=True)
class Family:
    """Contenders with the same weights.

    Attributes:
        build: Makes the model, on the CPU, with weights that are not trivial; may raise `NotPossibleError`.
        features: Calls the model: (model, input) -> (B, ..., C).
        reference: Makes the model of ours, on the reference backend and in float64, with the weights of a model.
        reference_features: Calls that.
        qkv: Names of the weights of query, key and value in the first block.
        cpb: Name of the first weight of the position bias there.
    """

    build: Callable[[], nn.Module]
    features: Callable[[nn.Module, Tensor], Tensor]
    reference: Callable[[nn.Module], nn.Module]
    reference_features: Callable[[nn.Module, Tensor], Tensor]
    qkv: tuple[str, ...] = ('layers.0.blocks.0.attn.qkv.weight',)
    cpb: str = 'layers.0.blocks.0.attn.cpb_mlp.0.weight'


@dataclass(frozen=True)
class Contender:
    """A way to compute the model of a family.

    Attributes:
        name: Name in tables.
        family: Key of its family.
        prepare: Turns a copy of the family's model into this contender; may raise `NotPossibleError`.
        compiled: Whether it goes through torch.compile.
        dense: Whether the N x N logits of all windows of a block are in memory, in inference and in training.
    """

    name: str
    family: str
    prepare: Callable[[nn.Module], None] = lambda model: None
    compiled: bool = False
    dense: tuple[bool, bool] = (True, True)

    def eager_and_compiled(self) -> Iterator['Contender']:
        """This contender as it is, and compiled."""
        for compiled in (False, True):
            name = f'{self.name} {"compiled" if compiled else "eager"}'
            yield Contender(name, self.family, self.prepare, compiled, self.dense)


def choose(contenders: Sequence[Contender], patterns: Sequence[str]) -> list[Contender]:
    """Keep those whose names fit one of some shell patterns.

    Raises:
        ValueError: None fits a pattern.
    """
    for pattern in patterns:
        if not fnmatch.filter([c.name for c in contenders], pattern):
            names = ', '.join(c.name for c in contenders)
            raise ValueError(f'no contender fits --contenders {pattern!r}; there are: {names}')
    return [c for c in contenders if any(fnmatch.fnmatch(c.name, pattern) for pattern in patterns)]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw what initialisation makes trivial, under the names of all peers: norms, position biases, scales."""
    generator = torch.Generator().manual_seed(seed)
    ranges = (
        (r'norm.*weight$', 0.5, 1.0),
        (r'norm.*bias$', -0.1, 0.1),
        (r'logit_scale$', math.log(5), math.log(30)),
        (r'(cpb_mlp|position_bias_mlp)', -0.3, 0.3),
        (r'(q_bias|v_bias|qkv\.bias|query\.bias|value\.bias)$', -0.1, 0.1),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for pattern, low, high in ranges:
                if re.search(pattern, name):
                    parameter.uniform_(low, high, generator=generator)
                    break
    return model


# ---------------------------------------------------------------- memory


def peak_memory(step: Callable[[], object]) -> int:
    """Bytes that a step takes at most, on top of what is in memory before it.

    On a GPU those of tensors; on a CPU pages of the process, which Linux counts.
    """
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL('libc.so.6').malloc_trim(0)  # else the step would take from what was freed but not given back
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts anew (proc(5))
    before = resident('VmRSS')
    step()
    return resident('VmHWM') - before


@contextlib.contextmanager
def leaving_no_heap() -> Iterator[None]:
    """Let the C library give back at once what is freed inside.

    From a large heap that the reference leaves behind, the steps to be measured would be served without the page faults
    that they cost in a process of their own. Afterwards the limits are those at which the library's own adaptation to a
    program of large blocks ends (mallopt(3)).
    """
    if DEVICE == 'cuda':
        yield
        return
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(M_MMAP_THRESHOLD, 2**22)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def available_memory() -> int:
    """Bytes that can still be taken, on the GPU if there is one."""
    if DEVICE == 'cuda':
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 1024 * int(Path('/proc/meminfo').read_text().split('MemAvailable:')[1].split()[0])


def dense_bytes(logits: Sequence[int], training: bool) -> int:
    """Estimate what the N x N matrices of a step take, from the number of logits of each block.

    Three matrices in float32 while one block is computed; in training each block keeps two for the backward pass.
    """
    return 12 * max(logits) + (8 * sum(logits) if training else 0)


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class Case:
    """What all contenders compute.

    Attributes:
        name: Name in tables.
        input_shape: Shape of the input, with the batch.
        flops: FLOP of a forward pass of one image.
        logits: Attention logits of each block, of the whole batch.
        families: Families by name.
        contenders: Who takes part.
        input_grad: Whether training needs the gradient of the input.
    """

    name: str
    input_shape: tuple[int, ...]
    flops: int
    logits: tuple[int, ...]
    families: dict[str, Family]
    contenders: Sequence[Contender]
    input_grad: bool = False


@dataclass
class Row:
    """What came out for a contender: seconds, bytes and errors relative to the largest value; None if unknown."""

    case: str
    mode: str
    contender: str
    batch: int
    dtype: str
    note: str = ''
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    images_per_second: float | None = None
    relative: float | None = None
    peak_bytes: int | None = None
    share_of_peak: float | None = None
    compile_seconds: float | None = None
    operators: dict[str, float] = field(default_factory=dict)


@dataclass
class Runner:
    """A contender that is ready to take steps."""

    contender: Contender
    trunk: Trunk
    call: Callable[[Tensor], Tensor]
    compile_seconds: dict[bool, float] = field(default_factory=dict)  # by whether it trains

    def step(
        self, mode: str, x: Tensor, gradient: Tensor, dtype: torch.dtype, optimizer: torch.optim.Optimizer | None
    ) -> Tensor:
        """One step, given the gradient of the features; returns the features."""
        with (
            torch.inference_mode(mode == 'inference'),
            torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32),
        ):
            features = self.call(x)
        if mode != 'inference':
            features.backward(gradient.to(features.dtype).view(features.shape))
        if mode == 'step':
            optimizer.step()
        return features.detach()

    def clear(self, x: Tensor) -> None:
        """Drop gradients."""
        x.grad = None
        self.trunk.zero_grad(set_to_none=True)


class Bench:
    """The contenders of a case in memory, with what they are checked against.

    Args:
        case: What they compute.
        dtype: Autocast's type, or float32 for none.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.input_shape, generator=generator).to(DEVICE)
        self.checked = sorted({0, len(self.x) - 1})  # images that are checked; their gradient alone is not 0 then
        self.models: dict[str, nn.Module] = {}
        self.runners: dict[str, Runner] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.expected: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self.gradient: Tensor | None = None

    def runner(self, contender: Contender) -> Runner:
        """Make a contender, once."""
        if contender.name not in self.runners:
            family = self.case.families[contender.family]
            if contender.family not in self.models:
                torch.manual_seed(0)
                self.models[contender.family] = family.build().to(DEVICE)
            model = share_weights(self.models[contender.family])
            contender.prepare(model)
            trunk = Trunk(model, family.features)
            self.runners[contender.name] = Runner(
                contender, trunk, torch.compile(trunk) if contender.compiled else trunk
            )
        return self.runners[contender.name]

    @leaving_no_heap()
    def expect(self, name: str, training: bool) -> dict[str, Tensor]:
        """Features of the checked images, and gradients, of a family's weights on the reference in float64."""
        if (name, training) not in self.expected:
            family = self.case.families[name]
            trunk = Trunk(family.reference(self.models[name]).to(DEVICE).train(training), family.reference_features)
            x = self.x[self.checked].double().requires_grad_(self.case.input_grad and training)
            with torch.set_grad_enabled(training):
                features = trunk(x)
            if self.gradient is None:
                generator = torch.Generator().manual_seed(1)
                shape = len(self.x), *features.flatten(1, -2).shape[1:]
                self.gradient = torch.randn(shape, generator=generator).to(DEVICE)
            if training:
                features.backward(self.gradient[self.checked].double().view(features.shape))
            self.expected[name, training] = self.results(features, trunk.model, Family.qkv, Family.cpb, training)
        return self.expected[name, training]

    def results(
        self, features: Tensor, model: nn.Module, qkv: Sequence[str], cpb: str, training: bool
    ) -> dict[str, Tensor]:
        """What is compared, in float64: features (checked images, tokens, C) and two gradients."""
        found = dict(features=features.detach().flatten(1, -2).double())
        if training:
            found['qkv grad'] = torch.cat([_weight(model, name).grad for name in qkv]).double()
            found['cpb grad'] = _weight(model, cpb).grad.double()
        return found

    def step(self, runner: Runner, mode: str, gradient: Tensor) -> Tensor:
        """One step without gradients left over from another."""
        runner.clear(self.x)
        return runner.step(mode, self.x, gradient, self.dtype, self.optimizers.get(runner.contender.family))

    def ready(self, contender: Contender, mode: str) -> Runner:
        """Put a contender into a mode."""
        runner = self.runner(contender)
        runner.trunk.train(mode != 'inference')
        self.x.requires_grad_(self.case.input_grad and mode != 'inference')
        if mode == 'step' and contender.family not in self.optimizers:
            parameters = self.models[contender.family].parameters()
            # the rate of 0 saves no work, and keeps the weights those that were checked
            self.optimizers[contender.family] = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        return runner

    def check(self, contender: Contender, mode: str) -> dict[str, float]:
        """Take the first step and give its largest errors, relative to the largest expected value.

        Raises:
            NotPossibleError: It cannot take it.
        """
        training = mode != 'inference'
        needed = dense_bytes(self.case.logits, training)
        if contender.dense[training] and needed > 0.9 * available_memory():
            available = available_memory() / 1e9
            raise NotPossibleError(
                f'does not fit: N x N matrices of {needed / 1e9:.1f} GB, of {available:.1f} GB available'
            )
        runner = self.ready(contender, mode)
        family = self.case.families[contender.family]
        expected = self.expect(contender.family, training)
        gradient = torch.zeros_like(self.gradient)
        gradient[self.checked] = self.gradient[self.checked]
        start = now()
        features = self.step(runner, mode, gradient)
        if contender.compiled:
            runner.compile_seconds.setdefault(training, now() - start)
        found = self.results(features[self.checked], runner.trunk.model, family.qkv, family.cpb, training)
        return {
            key: float((found[key] - value).abs().max() / value.abs().max().clamp(min=1e-30))
            for key, value in expected.items()
        }


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a model, or of the attention that is the model."""
    parameters = dict(model.named_parameters())
    return parameters[name] if name in parameters else parameters[name.split('.attn.')[-1]]


def share_weights(model: nn.Module) -> nn.Module:
    """Copy a model, but not its parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


# ---------------------------------------------------------------- measuring


def now() -> float:
    """Seconds, when all work that was given to the device is done."""
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(steps: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each step in each round; in each round every step is taken once."""
    seconds = [[] for _ in steps]
    for _ in range(rounds):
        for taken, step in zip(seconds, steps, strict=True):
            start = now()
            step()
            taken.append(now() - start)
    return seconds


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product."""
    a = torch.randn(GEMM, GEMM, device=DEVICE, dtype=dtype)
    seconds = take_turns([lambda: a @ a], 10)[0]
    return 2 * GEMM**3 / statistics.median(seconds[3:])


def device_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the device: by the data sheet for a known GPU in half precision, else of a large product.

    For a CPU it is that of float32.
    """
    if DEVICE == 'cpu':
        return gemm_rate(torch.float32)
    known = [peak for part, peak in DENSE_PEAKS.items() if part in torch.cuda.get_device_name()]
    return known[0] if known and dtype != torch.float32 else gemm_rate(dtype)


def operators(step: Callable[[], object]) -> dict[str, float]:
    """Seconds that a step spends in each of PyTorch's operators, or in each kernel of a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        now()
    attribute = 'self_device_time_total' if DEVICE == 'cuda' else 'self_cpu_time_total'
    seconds = {event.key: 1e-6 * getattr(event, attribute) for event in profile.key_averages()}
    return {name: value for name, value in sorted(seconds.items(), key=lambda item: -item[1]) if value}


def measure(
    case: Case, modes: Sequence[str], dtype: torch.dtype, rounds: int, peak: float, profile: bool = False
) -> Iterator[list[Row]]:
    """Measure the contenders of a case, print a table for each mode, and free them; gives the rows of each mode."""
    torch._dynamo.reset()  # it holds on to the models of the case before
    gc.collect()
    if DEVICE == 'cuda':
        torch.cuda.empty_cache()
    bench = Bench(case, dtype)
    for mode in modes:
        group = [Row(case.name, mode, c.name, len(bench.x), str(dtype).removeprefix('torch.')) for c in case.contenders]
        for contender, row in zip(case.contenders, group, strict=True):
            _check(bench, contender, row, LIMITS[dtype])
        good = [(bench.runners[row.contender], row) for row in group if not row.note]
        steps = [lambda runner=runner, mode=mode: bench.step(runner, mode, bench.gradient) for runner, _ in good]
        take_turns(steps, WARM_UP)
        for (runner, row), step, seconds in zip(good, steps, take_turns(steps, rounds), strict=True):
            _fill(row, seconds, case.flops, peak)
            if runner.compile_seconds:
                row.compile_seconds = max(0.0, runner.compile_seconds[mode != 'inference'] - row.seconds)
            runner.clear(bench.x)
            row.peak_bytes = peak_memory(step)
            row.operators = operators(step) if profile else {}
        _compare(group)
        print_table(group)
        if profile:
            print_profile(group)
        yield group


def _check(bench: Bench, contender: Contender, row: Row, limit: float) -> None:
    """Note the errors of a contender, and why it gets no times if it does not."""
    try:
        row.errors = bench.check(contender, row.mode)
    except NotPossibleError as error:
        row.note = str(error)
    except torch.OutOfMemoryError:
        row.note = 'does not fit'
    except Exception as error:  # a contender that breaks is a result too
        row.note = f'failed: {type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'
    else:
        limits = {key: limit * (GRADIENTS if 'grad' in key else 1) for key in row.errors}
        if not all(value <= limits[key] for key, value in row.errors.items()):  # NaN is no small error
            row.note = 'WRONG'


def _fill(row: Row, seconds: list[float], flops: int, peak: float) -> None:
    row.seconds = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    row.quartiles = quartiles[0], quartiles[2]
    row.images_per_second = row.batch / row.seconds
    passes = 1 if row.mode == 'inference' else 3
    row.share_of_peak = passes * flops * row.batch / row.seconds / peak


def _compare(group: list[Row]) -> None:
    """Relate the rows to eager timm, or to the first row where there is none."""
    timed = [row for row in group if row.seconds]
    base = next((row for row in timed if row.contender == 'timm eager'), timed[0] if timed else None)
    for row in timed:
        row.relative = base.seconds / row.seconds


# ---------------------------------------------------------------- results


def print_table(group: list[Row]) -> None:
    """Print the rows of a case and mode in Markdown."""
    first = group[0]
    base = next((row.contender for row in group if row.relative == 1.0), 'none')
    print(f'\n{first.case}, {first.mode}, batch {first.batch}, {first.dtype}, {DEVICE}\n')
    names = ('contender', 'ms', 'IQR', 'img/s', f'x {base}', 'peak MiB', '% of peak', 'compile s')
    names += tuple(f'{key} error' for key in next((row.errors for row in group if row.errors), {}))
    width = max(len(row.contender) for row in group)
    print('|', ' | '.join([f'{names[0]:<{width}}', *(f'{name:>9}' for name in names[1:])]), '|')
    print('|', ' | '.join(['-' * width, *('-' * max(9, len(name)) for name in names[1:])]), '|')
    for row in group:
        cells = [f'{cell:>{max(9, len(name))}}' for cell, name in zip(_cells(row), names[1:], strict=False)]
        print('|', ' | '.join([f'{row.contender:<{width}}', *cells]), '|', flush=True)


def _cells(row: Row) -> list[str]:
    errors = [f'{value:.1e}' for value in row.errors.values()]
    if row.note:
        return [row.note, *['-'] * 6, *errors]
    low, high = row.quartiles
    return [
        f'{1000 * row.seconds:.2f}',
        f'{1000 * (high - low):.2f}',
        f'{row.images_per_second:.2f}',
        f'{row.relative:.2f}',
        f'{row.peak_bytes / MIB:.0f}',
        f'{100 * row.share_of_peak:.1f}',
        '-' if row.compile_seconds is None else f'{row.compile_seconds:.1f}',
        *errors,
    ]


def print_profile(group: list[Row]) -> None:
    """Print where the time of each row goes, by the largest operators of all."""
    rows = [row for row in group if row.operators]
    largest = {name: max(row.operators.get(name, 0) for row in rows) for row in rows for name in row.operators}
    names = sorted(largest, key=largest.get, reverse=True)[:PROFILED]
    print(f'\n{group[0].case}, {group[0].mode}: ms in operators\n')
    print('| operator |', ' | '.join(row.contender for row in rows), '|')
    print('| --- |', ' | '.join('---' for _ in rows), '|')
    for name in names:
        print(f'| `{name}` |', ' | '.join(f'{1000 * row.operators.get(name, 0):.1f}' for row in rows), '|')
    rest = [sum(value for name, value in row.operators.items() if name not in names) for row in rows]
    print('| all others |', ' | '.join(f'{1000 * value:.1f}' for value in rest), '|', flush=True)


def machine() -> dict:
    """What the figures depend on."""
    versions = dict(python=platform.python_version())
    for package in ('torch', 'triton', 'timm', 'transformers', 'torchvision'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    cpu = platform.processor()
    if sys.platform == 'linux':
        cpu = next(re.finditer(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()), [None, cpu])[1]
    gpu = torch.cuda.get_device_name() if DEVICE == 'cuda' else None
    if gpu:
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        versions['driver'] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split('\n')[0]
    return dict(cpu=cpu, gpu=gpu, cores=os.cpu_count(), threads=torch.get_num_threads(), versions=versions)


def write_json(rows: list[Row], peak: float, path: str | Path) -> None:
    """Write all rows, with the machine and the command line."""
    content = dict(
        machine=machine() | dict(peak_flops=peak),
        command=shlex.join(sys.argv),
        rows=[asdict(row) for row in rows],
    )
    write_whole(path, json.dumps(content, indent=1) + '\n')


def plot(rows: list[Row], path: str) -> None:
    """Draw images per second as the tables relate them: a panel for each mode, a group of bars for each case."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(row.mode for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    figure, axes = plt.subplots(
        len(modes), figsize=(4.5 + 1.6 * len(cases), 1 + 3 * len(modes)), layout='constrained', squeeze=False
    )
    width = 0.85 / len(names)
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        for place, name in enumerate(names):
            found = {row.case: row.relative or 0 for row in rows if (row.mode, row.contender) == (mode, name)}
            left = [i + (place - (len(names) - 1) / 2) * width for i in range(len(cases))]
            axis.bar(left, [found.get(case, 0) for case in cases], width, label=name, color=f'C{place}')
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_xticks(range(len(cases)), cases)
        axis.set_ylabel('relative img/s')
        axis.set_title(mode)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', fontsize='small', ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both tools have."""
    gpu = DEVICE == 'cuda'
    parser.add_argument('--shapes', nargs='+', default=BY_DEFAULT, help=f'any of {", ".join(SHAPES)}')
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES), help='default: all')
    parser.add_argument(
        '--contenders', metavar='GLOB', nargs='+', default=['*'], help="such as '*eager' (default: all)"
    )
    parser.add_argument('--batch', type=int, help='images of a step (default: by shape and device)')
    parser.add_argument('--repeats', type=int, default=50 if gpu else 5, help='timed rounds (default: %(default)s)')
    parser.add_argument(
        '--dtype', choices=DTYPES, default='bfloat16' if gpu else 'float32', help='of autocast (default: %(default)s)'
    )
    parser.add_argument('--threads', type=int, help='CPU threads (default: as torch chooses)')
    parser.add_argument('--profile', action='store_true', help='print the time in operators too')
    parser.add_argument('--json', metavar='OUT', help='write all rows to this file, in seconds and bytes')
    parser.add_argument(
        '--resume',
        type=Path,
        metavar='DIR',
        help='write a file for each case and mode into this folder, skip those that it has, and let caches of compiled '
        'code serve, so that a run that was stopped goes on',
    )
    parser.add_argument('--plot', metavar='OUT', help='draw images per second relative to eager timm into this file')


def check_arguments(args: argparse.Namespace) -> None:
    """Find what would fail later.

    Raises:
        OSError: Results cannot be written.
        ValueError: An argument cannot be.
    """
    unknown = [name for name in args.shapes if name not in SHAPES]
    if unknown:
        raise ValueError(f'--shapes {", ".join(unknown)} is not known; there are: {", ".join(SHAPES)}')
    for name in ('batch', 'repeats', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f'--{name} must be at least 1, got {value}')
    if DEVICE == 'cpu' and sys.platform != 'linux':
        raise ValueError('without a GPU, peak memory is read from /proc, which Linux alone has')
    if args.resume and not args.resume.is_dir():
        raise FileNotFoundError(f'there is no folder {args.resume} for the results of --resume')
    check_outputs(args.json, args.plot, args.resume and args.resume / 'x.json')


def run(args: argparse.Namespace, cases: Iterable[Callable[[], Case]]) -> None:
    """Measure all cases and write what was asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.resume:  # a kernel from an earlier run would make compiling look fast
        torch._inductor.config.force_disable_caches = True
    # a limit that is hit would turn compiling off unseen
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.backends.cudnn.allow_tf32 = False  # as torch has it for products; float32 means float32 here
    dtype = DTYPES[args.dtype]
    peak = device_peak(dtype)
    rows = []
    for case in (make() for make in cases):
        modes = [mode for mode in args.modes if not (args.resume and result_file(args.resume, case, mode).exists())]
        for group in measure(case, modes, dtype, args.repeats, peak, args.profile):
            rows += group
            if args.resume:
                write_json(group, peak, result_file(args.resume, case, group[0].mode))
            if args.json:  # after each mode: a run of hours that is stopped keeps what it has
                write_json(rows, peak, args.json)
            if args.plot:
                plot(rows, args.plot)


def result_file(folder: Path, case: Case, mode: str) -> Path:
    """File with the rows of a case and a mode."""
    return folder / f'{case.name.replace(" ", "_")}-{mode}.json'
