"""The report on compiled kernels: the SASS parser on a short listing, occupancy, and the derived numbers."""

import importlib
import json
import re
import sys
import types
from collections import Counter

import pytest
import torch
from tool_runs import BENCHMARKS, call, load_tool, refuse, run

pytest.importorskip('triton')

from swinv2_mm.ops.triton.launch import Launch

TOOL = BENCHMARKS / 'kernel_report.py'
kernel_report = load_tool(TOOL)
sass, aot_compile = sys.modules['sass'], sys.modules['aot_compile']

# Two nested loops, the inner one with a barrier before its product, and a subroutine after the end.
LISTING = """
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/              @!P0 EXIT ;                                /* 0x000000000000794d */
        /*0020*/                   MOV R2, RZ ;                          /* 0x000000ff00027202 */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0040*/              @!P1 BRA 0x30 ;                            /* 0xfffffffc00f89947 */
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], !UPT ;
        /*0060*/                   MUFU.EX2 R4, R4 ;                     /* 0x0000000400047308 */
        /*0070*/              @!P2 BRA.U 0x30 ;                          /* 0xfffffffc00bc9947 */
        /*0080*/                   IADD3 R2, R2, 0x1, RZ ;               /* 0x0000000102027810 */
        /*0090*/               @P3 BRA 0x20 ;                            /* 0xfffffffc00603947 */
        /*00a0*/                   EXIT ;                                /* 0x000000000000794d */
        /*00b0*/                   BRA 0xb0 ;                            /* 0xfffffffc00fc7947 */
"""


def test_parse_ends_with_the_kernel_and_drops_predicates():
    code = sass.parse(LISTING)
    assert [instruction.address for instruction in code] == [16 * i for i in range(11)]
    assert code[1].text == 'EXIT'
    assert code[4].text == 'BRA 0x30'
    assert code[5].opcode == 'HGMMA.64x32x16.F32.BF16'


def test_loops_are_backward_branches():
    assert sass.loops(sass.parse(LISTING)) == [range(3, 5), range(3, 8), range(2, 10)]


def test_split_main_is_the_innermost_loop_with_products():
    once, around, main = ([code.opcode for code in part] for part in sass.split(sass.parse(LISTING)))
    assert once == ['LDC', 'EXIT', 'EXIT']
    assert around == ['MOV', 'IADD3', 'BRA']
    assert main[0].startswith('SYNCS')
    assert main[1:] == ['BRA', 'HGMMA.64x32x16.F32.BF16', 'MUFU.EX2', 'BRA.U']


def test_split_leaves_other_products_to_the_outer_loop():
    more = LISTING.replace('MOV R2, RZ', 'HMMA.16816.F32.BF16 R4, R8, R12, R4').replace('IADD3', 'HMMA.16816.F32.BF16')
    _, around, main = sass.split(sass.parse(more))
    assert (len(around), len(main)) == (3, 5)


def test_split_counts_exponentials_without_matrix_products():
    listing = LISTING.replace('HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], !UPT', 'FFMA R5, R6, R7, R5')
    assert len(sass.split(sass.parse(listing))[2]) == 5


def test_split_without_a_loop():
    once, around, main = sass.split(sass.parse(LISTING.replace('BRA', 'NOP')))
    assert (len(once), around, main) == (11, [], [])


@pytest.mark.parametrize(
    ('text', 'kind', 'pipe', 'cycles'),
    [
        ('IADD3 R2, P1, R4, 0x10, RZ', 'integer', 'alu', 2),
        ('LOP3.LUT R2, R3, 0xf, RZ, 0xc0, !PT', 'integer', 'alu', 2),
        ('ISETP.GE.AND P0, PT, R5, 0x240, PT', 'integer', 'alu', 2),
        ('IMAD R2, R3, 0x2f, R4', 'integer', 'imad', 2),
        ('IMAD.WIDE R2, R3, 0x4, R4', 'integer', 'imad', 4),
        ('IMAD.MOV.U32 R2, RZ, RZ, R3', 'other', 'imad', 2),
        ('ULEA UR4, UR5, UR6, 0x2', 'integer', None, 0),
        ('FFMA R2, R3, R4, R5', 'fp32', 'fma', 1),
        ('FMNMX R2, R3, R4, !PT', 'fp32', 'alu', 2),
        ('F2FP.BF16.F32.PACK_AB R2, R3, R4', 'fp32', 'alu', 2),
        ('HFMA2.MMA R2, -RZ, RZ, 0, 0', 'other', 'fma', 1),
        ('MUFU.EX2 R2, R3', 'exp', 'mufu', 8),
        ('MUFU.RSQ R2, R3', 'exp', 'mufu', 8),
        ('LDG.E R2, desc[UR4][R2.64]', 'load/store', 'lsu', 4),
        ('LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]', 'load/store', 'lsu', 16),
        ('STS.64 [R2], R4', 'load/store', 'lsu', 8),
        ('LDSM.16.MT88.4 R4, [R2]', 'load/store', 'lsu', 16),
        ('STL [R1], R4', 'load/store', 'lsu', 4),
        ('SHFL.BFLY PT, R2, R3, 0x1, 0x1f', 'other', 'lsu', 4),
        # 1024 FLOP per cycle: of a warp, and of a quarter of the four warps of an HGMMA
        ('HMMA.16816.F32.BF16 R4, R8, R12, R4', 'mma', 'tensor', 2 * 16 * 8 * 16 / 1024),
        ('HMMA.1688.F32.TF32 R4, R8, R12, R4', 'mma', 'tensor', 2 * 2 * 16 * 8 * 8 / 1024),
        ('HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]', 'mma', 'tensor', 2 * 64 * 128 * 16 / 4 / 1024),
        ('UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12]', 'mma', 'tensor', 0),
        ('LDTM.x16 R4, tmem[UR4]', 'load/store', None, 0),
        ('BAR.SYNC.DEFER_BLOCKING 0x0', 'other', None, 0),
        ('BRA 0x30', 'other', None, 0),
    ],
)
def test_count_knows_kinds_and_pipes(text, kind, pipe, cycles):
    found = sass.count([sass.Instruction(0, text)])
    expected = Counter({kind: 1, 'issue': 1, 'ex2': int('EX2' in text)}) + Counter({pipe: cycles} if pipe else {})
    assert {key: value for key, value in found.items() if value and key != 'bytes'} == expected


def test_count_adds_up_bytes_of_global_memory():
    texts = (
        'LDG.E.U16 R2, [R4]',
        'LDG.E R2, [R4]',
        'STG.E.64 [R4], R2',
        'LDGSTS.E.BYPASS.128 [R2], [R4]',
        'LDS R2, [R4]',
    )
    assert sass.count(sass.Instruction(0, text) for text in texts)['bytes'] == 32 * (2 + 4 + 8 + 16)


def test_fma_cycles_has_imad_on_one_half_of_the_pipe():
    assert sass.fma_cycles(Counter(fma=10)) == 10
    assert sass.fma_cycles(Counter(imad=10)) == 10
    assert sass.fma_cycles(Counter(imad=10, fma=5)) == 10
    assert sass.fma_cycles(Counter(imad=10, fma=20)) == 25


# ---------------------------------------------------------------- occupancy


@pytest.mark.parametrize(
    ('arch', 'registers', 'shared', 'warps', 'programs'),
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy": 65,536 registers and 2048 threads
        ('sm_80', 37, 0, 4, 12),
        ('sm_90', 37, 0, 10, 4),
        ('sm_90', 32, 0, 32, 2),
        ('sm_90', 33, 0, 32, 1),
        # tuning guides: the most shared memory of a block is 163, 99 and 227 KB, 1 KB less than an SM has
        ('sm_80', 32, 163 * 1024, 4, 1),
        ('sm_80', 32, 163 * 1024 + 1, 4, 0),
        ('sm_89', 32, 99 * 1024, 4, 1),
        ('sm_90', 32, 227 * 1024, 4, 1),
        ('sm_90', 32, 227 * 1024 + 1, 4, 0),
        # and 32 blocks, 24 on sm_89, which has 1536 threads
        ('sm_90', 16, 0, 1, 32),
        ('sm_89', 16, 0, 1, 24),
        ('sm_89', 16, 0, 32, 1),
        ('sm_90', 255, 0, 4, 2),
    ],
)
def test_programs_per_sm(arch, registers, shared, warps, programs):
    assert aot_compile.programs_per_sm(arch, registers, shared, warps) == programs


# ---------------------------------------------------------------- launches


def test_specialize_as_triton_does():
    impl = importlib.import_module('triton._C.libtriton')
    if not hasattr(impl, 'native_specialize_impl'):
        pytest.skip('of triton 3.6')
    from triton.backends.compiler import BaseBackend

    numbers = (0, 1, 15, 16, -16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**40 + 1, 1.0, True)
    tensor = torch.empty(64, dtype=torch.bfloat16)
    for value in (*numbers, tensor, tensor[1:], tensor[8:].to('meta'), (1, 96, 97)):
        types, known = impl.native_specialize_impl(BaseBackend, value, False, True, True)
        keys = dict(enumerate(known)) if isinstance(value, tuple) else {(): known}
        keys = {(place,) if isinstance(place, int) else place: key for place, key in keys.items()}
        found, constants, attributes = aot_compile.specialize(value)
        assert found == types
        assert constants == {place: key for place, key in keys.items() if isinstance(key, int)}
        assert attributes == {place: (('tt.divisibility', 16),) for place, key in keys.items() if key == 'D'}


def test_uses_has_the_launches_of_all_blocks():
    shape = kernel_report.SHAPES['nano']  # 16x16 and 8x8 tokens, windows of 8x8, two blocks and one
    found = kernel_report.uses('nano', shape, torch.float16)
    assert {(use.stage, use.shifted) for use in found} == {(0, False), (0, True), (1, False)}
    for kernel in ('window_forward', 'window_backward'):
        of_kernel = [use for use in found if use.launch.kernel.__name__ == kernel]
        assert {use.is_backward for use in of_kernel} == {kernel == 'window_backward'}
        logits = sum(use.per_image * kernel_report.windows_of(use.launch) * use.tokens**2 for use in of_kernel)
        assert logits == sum(depth * shape.logits(i) for i, depth in enumerate(shape.depths))


def launch_of(programs=1, names=(), args=(), **constants):
    return Launch(types.SimpleNamespace(arg_names=(*names, *constants)), programs, args, constants)


def use_of(launch, tokens=50, per_image=0.5):
    return kernel_report.Use('nano', torch.float16, 0, False, False, launch, per_image, tokens)


@pytest.mark.parametrize(
    ('programs', 'numbers', 'constants', 'logits', 'windows', 'tiles'),
    [
        (18, {}, dict(KEYS=96, BLOCK_M=32, BLOCK_N=16), 512, 6, 18 * 6),
        (12, {}, dict(KEYS=96, BLOCK_M=64, BLOCK_N=32), 2048, 6, 12 * 3),  # the last tile of a window is half empty
        (5, dict(windows=6, heads=3), dict(BLOCK_M=64), 4096, 18, 18),
        (5, dict(windows=6, heads=3, pairs=range(16)), dict(BLOCK_M=16), 256, 18, 18 * 16),
    ],
)
def test_tiles_follow_from_the_launch(programs, numbers, constants, logits, windows, tiles):
    launch = launch_of(programs, tuple(numbers), tuple(numbers.values()), **constants)
    assert kernel_report.logits_per_iteration(launch) == logits
    assert kernel_report.windows_of(launch) == windows
    assert kernel_report.tiles_of(launch) == tiles


def test_executed_counts_programs_and_tiles():
    """12 programs of two warps, and 48 tiles."""
    use = use_of(launch_of(12, KEYS=64, BLOCK_M=32, BLOCK_N=16))
    once, loop = Counter(integer=3, issue=7), Counter(integer=5, issue=20)
    found = kernel_report.executed(use, aot_compile.Kernel(32, 0, 0, 2, True, once, Counter(), loop))
    assert found == Counter(integer=0.5 * 2 * (12 * 3 + 48 * 5), issue=0.5 * 2 * (12 * 7 + 48 * 20))


def test_floors_of_one_block():
    """SwinV2-G's first block at 1536: 144 windows of 1024 tokens, 16 heads of 32."""
    logits, tokens = 144 * 16 * 1024**2, 384**2
    found = kernel_report.floors(kernel_report.SHAPES['g_block_1536_w32'], torch.bfloat16)
    assert found['exp'] == pytest.approx((1e6 * logits / (16 * 132 * 1.75e9),) * 2)
    peak = 4096 * 132 * 1.75e9  # near the 989 TFLOPS of the data sheet, which are for 1.83 GHz
    assert peak == pytest.approx(989e12 * 1.75 / 1.83, rel=1e-3)
    assert found['tensor'] == pytest.approx([1e6 * n * 2 * 32 * logits / peak for n in (2, 5)])
    assert found['bytes'] == pytest.approx([1e6 * n * 2 * 512 * tokens / 3.35e12 for n in (4, 8)])
    exact = kernel_report.floors(kernel_report.SHAPES['g_block_1536_w32'], torch.float32)
    assert exact['bytes'] == pytest.approx([2 * n for n in found['bytes']])
    assert exact['tensor'] == pytest.approx([16 * n for n in found['tensor']])


# ---------------------------------------------------------------- the command


def compiled_by_name(jobs, processes):
    """Made-up compiled kernels of four warps, with products if they have tiles of logits."""
    once, loop = Counter(issue=100, other=100), Counter(integer=40, exp=18, ex2=16, issue=58, mufu=144)
    elementwise = ('normalize', 'expand_bias', 'fold_bias')
    return {
        job: aot_compile.Kernel(96, 8, 1024, 4, job.kernel not in elementwise, once, Counter(), loop) for job in jobs
    }


def test_main_prints_and_writes_the_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_report, 'compile_all', compiled_by_name)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    file = tmp_path / 'report.json'
    printed = call(tmp_path, TOOL, '--shapes', 'nano', '--dtypes', 'float16', '--archs', 'sm_80', '--json', file)
    found = json.loads(file.read_text())
    first = next(row for row in found['kernels'] if row['instructions'])
    assert (first['arch'], first['dtype'], first['programs_per_sm']) == ('sm_80', 'float16', 5)
    assert first['stages'].split()[0] == '1'
    kinds = first['instructions']
    assert kinds['total'] == pytest.approx(sum(kinds[kind] for kind in sass.KINDS), rel=1e-3)
    assert first['binds'] == max(first['microseconds'], key=first['microseconds'].get)
    [model] = found['models']
    for key, is_backward in (('forward', False), ('backward', True)):
        rows = [r for r in found['kernels'] if r['is_backward'] == is_backward]
        assert model[key]['microseconds'] == pytest.approx(sum(r['microseconds'][r['binds']] for r in rows), rel=1e-2)
        assert model[key]['floors'].keys() == {'exp', 'tensor', 'bytes'}
    lines = printed.splitlines()
    assert len(lines) == 2 + len(found['kernels']) + 1 + 2 + 1
    assert len({line.count('|') for line in lines[: 2 + len(found['kernels'])]}) == 1
    assert lines[-1].startswith('| nano | sm_80 | float16 | ')


@pytest.mark.parametrize(('loaded', 'moved'), [(10000, 6700), (335, 5 * 4 * 335)])
def test_row_of_a_kernel_without_products_is_its_bytes(loaded, moved):
    """Those that five programs of four warps load, at most the size of the tensors; at 3.35 TB/s."""
    launch = Launch(lambda: None, 5, (torch.empty(3350, dtype=torch.float16, device='meta'), 7), {})
    kernel = aot_compile.Kernel(32, 0, 0, 4, False, Counter(bytes=loaded), Counter(), Counter())
    found = kernel_report.row(kernel, 'sm_90', [use_of(launch)] * 2)
    assert found['microseconds'] == {'bytes': pytest.approx(2 * 0.5 * moved / 3.35e6)}
    assert found['binds'] == 'bytes'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('--jobs', '0'), '--jobs must be at least 1, got 0'),
        (('--json', 'none/out.json'), 'there is no folder none for out.json: make it, or name another file'),
        ((), 'TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it'),
    ],
)
def test_check_names_the_mistake(monkeypatch, tmp_path, args, message):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert refuse(tmp_path, TOOL, *args) == f'error: {message}'


@pytest.mark.slow
def test_command_compiles_a_model(tmp_path):
    printed = run(tmp_path, TOOL, '--shapes', 'nano', '--json', 'report.json', TRITON_INTERPRET='0')
    assert re.search(r'^\| nano \| sm_90 \| bfloat16 \| \d', printed, re.M)
    found = json.loads((tmp_path / 'report.json').read_text())
    for row in found['kernels']:
        assert 16 <= row['registers'] <= 255
        assert row['shared'] <= 227 * 1024
    with_products = [row for row in found['kernels'] if row['instructions']]
    assert all(row['instructions']['exp'] >= 1 for row in with_products)  # of each logit, in each kernel
    [model] = found['models']
    for key, is_backward in (('forward', False), ('backward', True)):
        products = sum(r['microseconds']['tensor'] for r in with_products if r['is_backward'] == is_backward)
        # windows of 64 tokens fill their tiles: no product is missed or counted twice, but backward some run again
        assert products >= 0.99 * model[key]['floors']['tensor']
        assert is_backward or products <= 1.01 * model[key]['floors']['tensor']
