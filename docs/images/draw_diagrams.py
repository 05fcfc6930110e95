"""Draws the diagrams of the manual as SVG files, with nothing but Python.

python docs/images/draw_diagrams.py
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
INK, GREY, PALE = '#263238', '#78909c', '#eceff1'
BLUE, ORANGE, GREEN, RED = '#bbdefb', '#ffe0b2', '#c8e6c9', '#ffcdd2'
REGIONS = ('#90caf9', '#ffcc80', '#a5d6a7', '#ce93d8')  # a window and those that are cut by the edge


def text(x: float, y: float, line: str, size: int = 13, anchor: str = 'middle', **style: str) -> str:
    """One line of text; `x` is its middle, its start or its end."""
    extra = ''.join(f' {key.replace("_", "-")}="{value}"' for key, value in {'fill': INK, **style}.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{extra}>{escape(line)}</text>'


def rect(
    x: float, y: float, width: float, height: float, fill: str = 'none', stroke: str = INK, line: float = 1
) -> str:
    """A rectangle by its upper left corner."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{2 if fill == "none" else 4}" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="{line:g}"/>'
    )


def path(points: Sequence[tuple[float, float]], stroke: str = INK, line: float = 1.5, arrow: bool = False) -> str:
    """A line through some points, with a head at its end if asked for."""
    d = 'M' + ' L'.join(f'{x:.1f} {y:.1f}' for x, y in points)
    end = ' marker-end="url(#head)"' if arrow else ''
    return f'<path d="{d}" fill="none" stroke="{stroke}" stroke-width="{line:g}"{end}/>'


def box(x: float, y: float, width: float, height: float, lines: Sequence[str], fill: str = BLUE) -> str:
    """A box with lines of text in its middle; the first is larger than the others."""
    step = 17
    top = y + height / 2 - (len(lines) - 1) * step / 2 + 4
    words = [text(x + width / 2, top + i * step, line, 14 if i == 0 else 12) for i, line in enumerate(lines)]
    return rect(x, y, width, height, fill, GREY) + ''.join(words)


def save(name: str, width: int, height: int, title: str, parts: Sequence[str]) -> None:
    """Write a picture with a white ground."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    )
    body = '\n'.join((head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts))
    (FOLDER / name).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Roboto, Helvetica, Arial, sans-serif">\n<title>{escape(title)}</title>\n{body}\n</svg>\n'
    )


def grid(x: float, y: float, cell: float, colours: Sequence[Sequence[str]], cuts: Sequence[int]) -> list[str]:
    """Square tokens with their colours; thick lines before the rows and columns `cuts`."""
    size = cell * len(colours)
    parts = [
        rect(x + cell * column, y + cell * row, cell, cell, colour, 'white')
        for row, line in enumerate(colours)
        for column, colour in enumerate(line)
    ]
    for cut in cuts:
        at = cell * cut
        parts += [path([(x + at, y), (x + at, y + size)], line=2.5), path([(x, y + at), (x + size, y + at)], line=2.5)]
    return parts


def draw_window_shift() -> None:
    """Windows of 4x4 tokens on a feature map of 8x8, shifted by half a window."""
    tokens, window, cell, top = 8, 4, 26, 60
    shift = window // 2
    side = tokens * cell
    kind = [0 if shift <= i < tokens - shift else 1 for i in range(tokens)]  # 1: in a window that the edge cuts

    def colour(row: int, column: int) -> str:
        return REGIONS[2 * kind[row] + kind[column]]

    plain = [[BLUE] * tokens for _ in range(tokens)]
    cut = [[colour(row, column) for column in range(tokens)] for row in range(tokens)]
    rolled = [
        [cut[(row + shift) % tokens][(column + shift) % tokens] for column in range(tokens)] for row in range(tokens)
    ]
    panels = [
        ('Even blocks', 'four windows of 4x4 tokens', plain, (0, 4, 8)),
        ('Odd blocks', 'windows shifted by 2 tokens', cut, (0, 2, 6, 8)),
        ('After a cyclic shift by 2', 'again four windows', rolled, (0, 4, 8)),
    ]
    parts = []
    for number, (title, line, colours, cuts) in enumerate(panels):
        x = 20 + number * (side + 36)
        parts += [text(x + side / 2, 24, title, 15, font_weight='bold'), text(x + side / 2, 44, line)]
        parts += grid(x, top, cell, colours, cuts)
    # borders of the parts that were not neighbours, in the last panel
    x, at = 20 + 2 * (side + 36), cell * (tokens - shift)
    parts += [
        path([(x + at, top), (x + at, top + side)], '#c62828', 2.5),
        path([(x, top + at), (x + side, top + at)], '#c62828', 2.5),
    ]
    width = 40 + 3 * side + 72
    parts += [
        text(
            width / 2,
            top + side + 28,
            'Tokens on both sides of a red line come from opposite edges of the feature map.',
        ),
        text(
            width / 2, top + side + 48, 'They share a window and must not attend to each other: their logits get -100.'
        ),
    ]
    save('window_shift.svg', width, top + side + 66, 'Shifted windows', parts)


def log_coord(offset: float, pretrained: int) -> float:
    """Relative coordinate in log space (Eq. 4, with the scale of the official code)."""
    return math.log2(1 + 8 * offset / (pretrained - 1)) / 3


def draw_log_cpb() -> None:
    """The path from coordinates to logits, and how far both kinds of coordinates extrapolate."""
    steps = [
        (['relative offset of two tokens', '(dy, dx), in tokens'], PALE),
        (['log-spaced coordinates', 'scaled by the pre-training window'], BLUE),
        (['MLP: cpb_mlp', '2 -> 512 -> heads'], BLUE),
        (['16 * sigmoid', ''], BLUE),
        (['bias table', '(heads, (2W-1) * (2W-1))'], PALE),
        (['added to the logits', 'by relative position'], PALE),
    ]
    parts = []
    for number, (lines, fill) in enumerate(steps):
        y = 20 + number * 62
        parts.append(box(20, y, 240, 46, [line for line in lines if line], fill))
        if number:
            parts.append(path([(140, y - 16), (140, y)], arrow=True))
    x0, y0, dx, dy = 350, 340, 24, 120  # origin; pixels for a token, and for 1 of the largest coordinate in training
    before, after = 8, 16
    end = x0 + dx * (after - 1)
    parts.append(rect(x0, y0 - dy, dx * (before - 1), dy, GREEN, 'none'))
    parts += [path([(x0, y0), (end + 20, y0)], arrow=True), path([(x0, y0), (x0, y0 - 2.3 * dy)], arrow=True)]
    for offset in range(0, after, 5):
        parts.append(text(x0 + dx * offset, y0 + 18, str(offset), 12))
    for value in (1, 2):
        parts.append(text(x0 - 10, y0 - dy * value + 4, str(value), 12, 'end'))
        parts.append(path([(x0 - 4, y0 - dy * value), (x0 + 4, y0 - dy * value)]))
    offsets = [i / 10 for i in range(10 * (after - 1) + 1)]
    largest = log_coord(before - 1, before)
    curves = [
        ('linear', '#ef6c00', [offset / (before - 1) for offset in offsets]),
        ('log', '#1565c0', [log_coord(offset, before) / largest for offset in offsets]),
    ]
    for name, colour, values in curves:
        parts.append(path([(x0 + dx * o, y0 - dy * v) for o, v in zip(offsets, values, strict=True)], colour, 2.5))
        parts.append(text(end + 8, y0 - dy * values[-1] + 4, f'{name}: {values[-1]:.2f}', 13, 'start', fill=colour))
    parts += [
        text(x0 + dx * 3.5, y0 - 10, 'pre-training, window 8', 12),
        text(x0 + dx * 7.5, y0 + 38, 'offset in tokens, window 16', 13),
        text(x0 + 10, y0 - 2.3 * dy + 4, 'coordinate / largest one of pre-training', 13, 'start'),
    ]
    save('log_cpb.svg', 800, 396, 'Log-spaced continuous position bias', parts)


def draw_block(x: float, title: str, branches: Sequence[tuple[str, ...]], end: str = '') -> list[str]:
    """A column of residual branches: each is a list of layers from below to above."""
    parts = [text(x + 110, 28, title, 15, font_weight='bold')]
    main, branch, height = x + 30, x + 150, 34
    y = 420
    parts.append(text(main, y + 18, 'x'))
    for layers in branches:
        start = y
        parts.append(path([(main, y - 8), (branch, y - 8), (branch, y - 26)], arrow=True))
        y -= 18
        for layer in layers:
            y -= height
            parts.append(box(x + 80, y, 140, height - 8, [layer], ORANGE if 'norm' in layer else BLUE))
            parts.append(path([(branch, y), (branch, y - 8)]))
        y -= 22
        parts.append(path([(branch, y + 14), (branch, y), (main + 12, y)], arrow=True))
        parts.append(path([(main, start), (main, y + 10)], arrow=True))
        parts.append(f'<circle cx="{main}" cy="{y}" r="10" fill="white" stroke="{INK}"/>' + text(main, y + 5, '+', 15))
        y -= 10
    if end:
        parts.append(path([(main, y), (main, y - 12)], arrow=True))
        parts.append(box(main - 50, y - 44, 100, 32, [end], ORANGE))
        y -= 44
    parts.append(path([(main, y), (main, y - 18)], arrow=True))
    return parts


def draw_res_post_norm() -> None:
    """Blocks of V1, of V2, and of every sixth one of H and G."""
    v1 = [('norm1', 'attn (dot product)', 'drop path'), ('norm2', 'mlp', 'drop path')]
    v2 = [('attn (cosine)', 'norm1', 'drop path'), ('mlp', 'norm2', 'drop path')]
    parts = draw_block(20, 'Swin V1: pre-norm', v1) + draw_block(280, 'Swin V2: res-post-norm', v2)
    parts += draw_block(540, 'H and G, every 6th block', v2, end='enorm')
    save('res_post_norm.svg', 790, 450, 'Where the norms of a block are', parts)


def draw_loading() -> None:
    """What happens between a file and the weights of a backbone."""
    steps = [
        (['Read the file as data', 'weights_only=True; safetensors; memory-mapped'], 'code in the file, damage'),
        (
            ['Find the backbone and its layout', 'official, timm, transformers, torchvision, mmpretrain, SimMIM'],
            'no Swin V2, or several',
        ),
        (['Rename to the official names', 'join q, k, v; move patch merging'], 'two names for one parameter'),
        (
            ['Fit the patch embedding', 'channels, patch size; inflate image weights for video'],
            'channels other than RGB',
        ),
        (
            ['Resolve the pre-training window', 'config, stored entry, stored table, name of the release'],
            'unknown, or contradictory',
        ),
        (['Check names and shapes', 'strict, before anything is changed'], 'missing, unexpected, other shape'),
        (['Copy the weights', 'one line of the log for each stage'], ''),
    ]
    parts = [
        text(230, 24, 'Step', 14, font_weight='bold'),
        text(590, 24, 'Error that stops it', 14, font_weight='bold'),
    ]
    for number, (lines, error) in enumerate(steps):
        y = 40 + number * 66
        parts.append(box(20, y, 420, 48, lines, GREEN if not error else BLUE))
        if number:
            parts.append(path([(230, y - 18), (230, y)], arrow=True))
        if error:
            parts += [path([(440, y + 24), (480, y + 24)], arrow=True), box(480, y + 6, 220, 36, [error], RED)]
    save('loading.svg', 720, 40 + len(steps) * 66, 'Loading a checkpoint', parts)


def draw_packages() -> None:
    """Which package of swinv2_mm imports which."""
    layers = [
        ('tools/', 'train.py, test.py, analysis', PALE),
        ('swinv2_mm.cli', 'checks before the start, memory model', BLUE),
        ('swinv2_mm.parallel', 'ZeRO, FSDP, DeepSpeed', BLUE),
        ('swinv2_mm.models', 'backbones and necks', BLUE),
        ('swinv2_mm.checkpoints', 'layouts, pre-training windows, safe loading', BLUE),
        ('swinv2_mm.ops', 'window_attention and its backends', GREEN),
    ]
    parts = []
    for number, (name, what, fill) in enumerate(layers):
        y = 20 + number * 64
        parts.append(box(20, y, 320, 48, [name, what], fill))
        if number:
            parts.append(path([(180, y - 16), (180, y)], arrow=True))
    parts += [
        box(400, 20, 300, 48, ['configs/', 'name classes of all packages'], PALE),
        box(400, 212, 300, 48, ['swinv2_mm.engine', 'hooks, optimizer constructors'], BLUE),
        box(400, 276, 300, 48, ['swinv2_mm.datasets', 'what the toolboxes lack'], BLUE),
        text(400, 356, 'A package imports only what is below it.', 13, 'start'),
        text(400, 374, 'engine and datasets import none of these.', 13, 'start'),
        text(400, 392, 'ops imports only torch.', 13, 'start'),
    ]
    save('packages.svg', 720, 424, 'Packages of swinv2_mm', parts)


if __name__ == '__main__':
    draw_window_shift()
    draw_log_cpb()
    draw_res_post_norm()
    draw_loading()
    draw_packages()
