"""Memory and time of loading a checkpoint with this package, compared with plain torch.

python benchmarks/benchmark_loading.py --arch huge

For each file format it writes a file with random weights (2.4 GiB for `huge`) and loads it in new processes, into a
model whose memory is already allocated:

ours: mmengine's `load_checkpoint` with the loader of this package, into the backbone of a detector;
stock: `torch.load`, or safetensors' `load_file`, and `load_state_dict(strict=False)`, into a model whose parameters are
    named as in the file.

All memory is that of the load, without what is allocated before it. `needs` is the peak of anonymous memory, which the
system cannot reclaim. `mapped` is the peak of mapped file pages, which the system can drop and read again. `total` is
the kernel's own peak of both. All are in GiB and, in brackets, as multiples of the file size. The file has just been
written: times are those of a file in the page cache.

Linux only: memory is read from /proc.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
from mmengine.runner import load_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swinv2_mm.cli import launch
from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.models.sizes import ARCHS

FORMATS = {'pth': '.pth', 'legacy': '.legacy.pth', 'safetensors': '.safetensors'}
LOADERS = ('ours', 'stock')
WINDOW = 8
LIMIT = 1.2
GIB = 2**30
CLAIM_FROM = 2 * GIB  # for smaller files a loader's fixed overhead dominates
SAMPLE_EVERY = 0.002  # seconds

# ---------------------------------------------------------------- file layouts


def official_tensors(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters under the names of the official code; its last norm has no number."""
    last = f'norm{len(backbone.layers) - 1}.'
    for name, value in backbone.named_parameters():
        yield name.replace(last, 'norm.') if name.startswith(last) else name, value


HF_NAMES = (
    ('patch_embed.proj.', 'embeddings.patch_embeddings.projection.'),
    ('patch_embed.norm.', 'embeddings.norm.'),
    ('layers.', 'encoder.layers.'),
    ('attn.proj.', 'attention.output.dense.'),
    ('attn.cpb_mlp.', 'attention.self.continuous_position_bias_mlp.'),
    ('attn.q_bias', 'attention.self.query.bias'),
    ('attn.v_bias', 'attention.self.value.bias'),
    ('attn.', 'attention.self.'),
    ('.norm1.', '.layernorm_before.'),
    ('.norm2.', '.layernorm_after.'),
    ('mlp.fc1.', 'intermediate.dense.'),
    ('mlp.fc2.', 'output.dense.'),
)


def hf_tensors(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters under the names of transformers, with separate queries, keys and values."""
    for official, value in official_tensors(backbone):
        name = official
        for old, new in HF_NAMES:
            name = name.replace(old, new)
        name = f'swinv2.layernorm.{name[5:]}' if name.startswith('norm.') else f'swinv2.{name}'
        if name.endswith('.qkv.weight'):
            for part, chunk in zip(('query', 'key', 'value'), value.chunk(3), strict=True):
                yield name.replace('qkv', part), chunk
        else:
            yield name, value


LAYOUTS: dict[str, Callable[[nn.Module], Iterator[tuple[str, Tensor]]]] = {
    'official': official_tensors,
    'hf': hf_tensors,
}


def backbone_on_meta(arch: str) -> nn.Module:
    """The backbone on the meta device, with the output norm and without the extra norms, as in the files."""
    with torch.device('meta'):
        return SwinTransformerV2(
            dict(ARCHS[arch], extra_norm_every_n_blocks=0),
            window_size=WINDOW,
            pretrained_window_sizes=WINDOW,  # not in the files
            out_indices=(len(ARCHS[arch]['depths']) - 1,),
        )


def write_file(path: Path, arch: str, layout: str, file_format: str) -> None:
    """Write a file with random weights of a backbone."""
    weights = {
        name: torch.empty(value.shape).uniform_(-0.02, 0.02) for name, value in LAYOUTS[layout](backbone_on_meta(arch))
    }
    if file_format == 'safetensors':
        save_file(weights, path, metadata={'format': 'pt'})
    else:
        content = {'model': weights} if layout == 'official' else weights
        torch.save(content, path, _use_new_zipfile_serialization=file_format != 'legacy')
    with path.open('rb') as file:
        os.fsync(file)  # the first loader should not wait for the disk


# ---------------------------------------------------------------- loading, in a new process


class Job(Protocol):
    """Work for a new process; only the memory and time of `run` are measured."""

    def prepare(self) -> None:
        """Set up what is not measured."""

    def run(self) -> None:
        """Do the work that is measured."""

    def check(self) -> None:
        """Raise an error if the result is wrong."""


@dataclass
class Load:
    """Load a file into a backbone."""

    path: Path
    arch: str
    layout: str
    loader: str

    def prepare(self) -> None:
        """Build the model and fill it with NaN, so that all its memory is allocated."""
        backbone = backbone_on_meta(self.arch)
        if self.loader == 'ours':
            self.model = nn.ModuleDict(dict(backbone=backbone.to_empty(device='cpu')))
            for buffer in backbone.buffers():  # the pre-training windows, lost on the meta device
                buffer.fill_(WINDOW)
        else:
            self.model = module_of(LAYOUTS[self.layout](backbone))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float('nan'))

    def run(self) -> None:
        """Load the file."""
        if self.loader == 'ours':
            load_checkpoint(self.model, str(self.path), map_location='cpu')
        else:
            self.model.load_state_dict(read_stock(self.path), strict=False)

    def check(self) -> None:
        """Check that every tensor was loaded.

        Raises:
            RuntimeError: Some are still NaN.
        """
        arrived = [not parameter.isnan().any() for parameter in self.model.parameters()]
        if not all(arrived):
            raise RuntimeError(f'it loaded {sum(arrived)} of {len(arrived)} tensors')


def module_of(tensors: Iterator[tuple[str, Tensor]]) -> nn.Module:
    """A plain module with parameters of these names and shapes."""
    root = nn.Module()
    for name, value in tensors:
        *path, leaf = name.split('.')
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(value.shape)))
    return root


def read_stock(path: Path) -> dict[str, Tensor]:
    """Read a file without this package."""
    if path.suffix == '.safetensors':
        return load_file(path)
    content = torch.load(path, map_location='cpu')
    return content.get('model', content)


# ---------------------------------------------------------------- measuring


@dataclass
class Memory:
    """Memory of a process in bytes."""

    anonymous: int
    mapped: int  # pages of files, also of those in a RAM disk
    peak: int  # of both together, from the start of the process or the last reset

    @classmethod
    def of(cls, pid: int | str) -> 'Memory':
        """Memory of a process from /proc; zero for one that has just died."""
        try:
            status = Path(f'/proc/{pid}/status').read_text()
        except (FileNotFoundError, ProcessLookupError):  # already reaped
            status = ''
        lines = (line.split() for line in status.splitlines())
        size = {line[0]: 1024 * int(line[1]) for line in lines if line[-1] == 'kB'}
        anonymous, file, shared, peak = (size.get(f'{key}:', 0) for key in ('RssAnon', 'RssFile', 'RssShmem', 'VmHWM'))
        return cls(anonymous, file + shared, peak)


@dataclass
class Usage:
    """Time and memory of a job, without the memory of its process before it."""

    seconds: float
    anonymous: int
    mapped: int
    total: int


def measure(job: Job) -> Usage:
    """Run a job in a new process and sample its memory from this one, where the work does not delay the sampling.

    Raises:
        RuntimeError: The job failed, or its process died.
    """
    context = multiprocessing.get_context('spawn')
    pipe, child_pipe = context.Pipe()
    process = context.Process(target=_work, args=(job, child_pipe), daemon=True)
    process.start()
    child_pipe.close()
    try:
        _receive(pipe)  # prepared
        before = Memory.of(process.pid)
        anonymous = mapped = 0
        pipe.send('go')
        while not pipe.poll(SAMPLE_EVERY):
            now = Memory.of(process.pid)
            anonymous = max(anonymous, now.anonymous - before.anonymous)
            mapped = max(mapped, now.mapped - before.mapped)
        seconds, peak = _receive(pipe)
        _receive(pipe)  # checked
        total = max(peak - before.anonymous - before.mapped, anonymous, mapped)
        return Usage(seconds, anonymous, mapped, total)
    except EOFError as error:
        process.join()
        raise RuntimeError(f'the process died with exit code {process.exitcode}') from error
    finally:
        process.kill()
        process.join()


def _receive(pipe: Connection):
    message = pipe.recv()
    if isinstance(message, Exception):
        raise message
    return message


def _work(job: Job, pipe: Connection) -> None:
    """Body of the new process: prepare, wait, run, report, check."""
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115  logs would break the table
    try:
        job.prepare()
        # 5 resets the peak (proc(5)), which may be that of the preparation
        Path('/proc/self/clear_refs').write_text('5')
        pipe.send('prepared')
        pipe.recv()
        start = time.perf_counter()
        job.run()
        pipe.send((time.perf_counter() - start, Memory.of('self').peak))
        job.check()
        pipe.send('checked')
    except Exception as error:
        # only the message: not every exception can be pickled
        pipe.send(RuntimeError(f'{type(error).__name__}: {error}'))


# ---------------------------------------------------------------- table


COLUMNS = (
    ('file', 20),
    ('loader', 6),
    ('size, GiB', 9),
    ('seconds', 7),
    ('needs', 11),
    ('mapped', 11),
    ('total', 11),
    (f'needs <= {LIMIT}', 12),
    (f'total <= {LIMIT}', 12),
)


def print_row(*cells: str) -> None:
    """Print a row of the table, in Markdown."""
    print('|', ' | '.join(f'{cell:<{width}}' for cell, (_, width) in zip(cells, COLUMNS, strict=True)), '|', flush=True)


def usage_cells(usage: Usage, size: int) -> list[str]:
    """Cells for the usage of a loader on a file of this size."""
    amounts = (usage.anonymous, usage.mapped, usage.total)
    verdicts = ['yes' if amount <= LIMIT * size else 'NO' for amount in (usage.anonymous, usage.total)]
    return [f'{usage.seconds:.2f}', *(f'{amount / GIB:.2f} ({amount / size:.2f})' for amount in amounts), *verdicts]


def benchmark(arch: str, layout: str, file_format: str, folder: Path) -> bool:
    """Write a file, measure each loader on it, print the rows, delete it. Returns whether all loaders loaded it."""
    path = folder / f'{layout}{FORMATS[file_format]}'
    loaded = True
    try:
        write_file(path, arch, layout, file_format)
        size = path.stat().st_size
        for loader in LOADERS:
            try:
                cells = usage_cells(measure(Load(path, arch, layout, loader)), size)
            except RuntimeError as error:
                loaded = False
                cells = ['failed', *['-'] * 5]
                print(f'{layout} {file_format}, {loader}: {error}', file=sys.stderr, flush=True)
            print_row(f'{layout} {file_format}', loader, f'{size / GIB:.2f}', *cells)
    finally:
        path.unlink(missing_ok=True)
    return loaded


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', choices=ARCHS, default='huge', help='size of the backbone (default: %(default)s)')
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=list(LAYOUTS), help='names of the tensors')
    parser.add_argument('--formats', nargs='+', choices=FORMATS, default=list(FORMATS), help='file formats')
    parser.add_argument('--dir', help='folder for the files, on a disk (default: the temporary folder)')
    return parser.parse_args(argv)


def check(args: argparse.Namespace, folder: Path) -> None:
    """Check disk space and memory before the run.

    Raises:
        ValueError: The machine cannot run the benchmark.
    """
    size = 4 * sum(parameter.numel() for parameter in backbone_on_meta(args.arch).parameters())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise ValueError(f'{folder} has {free / GIB:.1f} GiB free, a file takes {size / GIB:.1f}; choose another --dir')
    available = 1024 * int(Path('/proc/meminfo').read_text().split('MemAvailable:')[1].split()[0])
    if available < 3 * size:  # the model, the loaded tensors, and a copy of them
        raise ValueError(
            f'{available / GIB:.1f} GiB of memory are available, --arch {args.arch} takes up to {3 * size / GIB:.1f}'
        )
    if size < CLAIM_FROM:
        print(f'Files of --arch {args.arch} are below 2 GiB: the fixed overhead of the loaders shows in these numbers.')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ValueError):
        if sys.platform != 'linux':
            raise ValueError('this benchmark reads /proc, which only Linux has')
        if args.dir is not None and not Path(args.dir).is_dir():
            raise FileNotFoundError(f'--dir {args.dir} is no folder')
        check(args, Path(args.dir or tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        print_row(*(name for name, _ in COLUMNS))
        print_row(*('-' * width for _, width in COLUMNS))
        results = [
            benchmark(args.arch, layout, file_format, Path(folder))
            for layout in args.layouts
            for file_format in args.formats
        ]
    sys.exit(not all(results))


if __name__ == '__main__':
    main()
