"""Names of releases, their addresses, and downloads from a local server in place of the public ones."""

import hashlib
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import oracles
import pytest
import torch
from mmengine.runner import load_checkpoint
from processes import run_processes

from swinv2_mm.checkpoints import CheckpointError, load_swinv2_state_dict, loaders
from swinv2_mm.models import SwinTransformerV2

ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
# as listed by Microsoft
OFFICIAL_FILES = {
    'tiny_window8_256': 'swinv2_tiny_patch4_window8_256',
    'small_window8_256': 'swinv2_small_patch4_window8_256',
    'base_window8_256': 'swinv2_base_patch4_window8_256',
    'tiny_window16_256': 'swinv2_tiny_patch4_window16_256',
    'small_window16_256': 'swinv2_small_patch4_window16_256',
    'base_window16_256': 'swinv2_base_patch4_window16_256',
    'base_window12_192_22k': 'swinv2_base_patch4_window12_192_22k',
    'base_window12to16_192to256_22kto1k': 'swinv2_base_patch4_window12to16_192to256_22kto1k_ft',
    'base_window12to24_192to384_22kto1k': 'swinv2_base_patch4_window12to24_192to384_22kto1k_ft',
    'large_window12_192_22k': 'swinv2_large_patch4_window12_192_22k',
    'large_window12to16_192to256_22kto1k': 'swinv2_large_patch4_window12to16_192to256_22kto1k_ft',
    'large_window12to24_192to384_22kto1k': 'swinv2_large_patch4_window12to24_192to384_22kto1k_ft',
}


@pytest.mark.parametrize(('name', 'stem'), OFFICIAL_FILES.items())
def test_find_release_official_files(name, stem):
    base = 'https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
    assert loaders.find_release(f'swinv2://{name}').url == f'{base}{stem}.pth'


@pytest.mark.parametrize(
    ('name', 'url'),
    [
        ('torchvision_tiny', 'https://download.pytorch.org/models/swin_v2_t-b137f0e2.pth'),
        ('torchvision_base', 'https://download.pytorch.org/models/swin_v2_b-781e5279.pth'),
        (
            'simmim_giant_22k_500k',
            'https://huggingface.co/zdaxie/SimMIM/resolve/main/simmim_swinv2_pretrain_models/swinv2_giant_22k_500k.pth',
        ),
        (
            'simmim_small_1kper10_125k_ft',
            'https://huggingface.co/zdaxie/SimMIM/resolve/main/simmim_swinv2_finetune_models/'
            'finetune_swinv2_small_1kper10_125k.pth',
        ),
    ],
)
def test_find_release_other_addresses(name, url):
    assert loaders.find_release(name).url == url


def test_number_of_releases():
    """12 of Microsoft, 3 of torchvision, 63 pre-trained and 63 fine-tuned by SimMIM."""
    assert len(loaders.RELEASES) == 12 + 3 + 63 + 63
    assert len({release.url for release in loaders.RELEASES.values()}) == len(loaders.RELEASES)


@pytest.mark.parametrize(
    ('path', 'windows'),
    [
        ('swinv2_tiny_patch4_window8_256.pth', (8, 8, 8, 8)),
        ('swinv2_base_patch4_window16_256.pth', (16, 16, 16, 8)),
        ('x/swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth', (12, 12, 12, 6)),
        ('finetune_swinv2_huge_22k_500k.pth', (12, 12, 12, 6)),
        ('swin_v2_s-637d8ceb.pth', (8, 8, 8, 8)),
        ('swinv2_small_window16_256.ms_in1k.safetensors', (16, 16, 16, 8)),
        ('swinv2_base_window12to16_192to256.ms_in22k_ft_in1k/model.safetensors', (12, 12, 12, 6)),
        ('hub/models--timm--swinv2_large_window12_192.ms_in22k/snapshots/0a1b/pytorch_model.bin', (12, 12, 12, 6)),
        ('microsoft/swinv2-tiny-patch4-window16-256/model.safetensors', (16, 16, 16, 8)),
        ('microsoft/swinv2-base-patch4-window12-192-22k/resolve/main/pytorch_model.bin', (12, 12, 12, 6)),
        ('swinv2_small_patch4_window16_256.pth', (16, 16, 16, 8)),
        ('swinv2_base_patch4_window12_192_22k.pth', (12, 12, 12, 6)),
        ('swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth', (12, 12, 12, 6)),
        ('swinv2_base_window8_256.ms_in1k.pth', (8, 8, 8, 8)),
        ('swinv2_tiny_window16_256.ms_in1k.safetensors', (16, 16, 16, 8)),
        ('swinv2_large_window12_192.ms_in22k.safetensors', (12, 12, 12, 6)),
        ('swinv2_base_window12to16_192to256.ms_in22k_ft_in1k.safetensors', (12, 12, 12, 6)),
        ('swinv2_base_window12to24_192to384.ms_in22k_ft_in1k.pth', (12, 12, 12, 6)),
        ('swinv2-tiny-patch4-window16-256.safetensors', (16, 16, 16, 8)),
        ('swinv2-large-patch4-window12to24-192to384-22kto1k-ft.bin', (12, 12, 12, 6)),
        ('my_swinv2.pth', None),
        ('best_window8.pth', None),
        ('swinv2_tiny_patch4_window7_224.pth', None),
        ('swinv2_tiny_patch4_window8_256/epoch_12.pth', None),
        ('swinv2_tiny_patch4_window8_256_mine.pth', None),
        ('a/b/c/model.safetensors', None),
    ],
)
def test_find_named_windows(path, windows):
    assert loaders.find_named_windows(path) == windows


# ---------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of a folder; yields the folder, the address, and the list of events (requests and barriers)."""
    events = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            events.append(self.path)

    folder = tmp_path / 'public'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}', events
    server.shutdown()
    server.server_close()


def publish(path: Path, window: int = 8) -> SwinTransformerV2:
    backbone = oracles.randomize(SwinTransformerV2(ARCH, window_size=window))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'model': dict(backbone.named_parameters())}, path)
    return backbone


def is_loaded(target: SwinTransformerV2, source: SwinTransformerV2) -> bool:
    return all(torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True))


def test_download_once_with_pretrained_windows(server, monkeypatch, capfd):
    folder, address, events = server
    source = publish(folder / 'swinv2_tiny_patch4_window8_256.pth')
    url = f'{address}/swinv2_tiny_patch4_window8_256.pth'
    monkeypatch.setitem(loaders.RELEASES, 'tiny_window8_256', loaders.Release(url, (8, 8, 8, 8)))
    for _ in range(2):
        init_cfg = dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256')
        target = SwinTransformerV2(ARCH, window_size=16, init_cfg=init_cfg)
        target.init_weights()
        assert is_loaded(target, source)
        assert target.layers[3].blocks[1].attn.cpb_mlp.pretrained_window_size.tolist() == [8, 8]
    assert events == ['/swinv2_tiny_patch4_window8_256.pth']
    assert re.search(r'100(\.0)?%', capfd.readouterr().err)  # the progress bar


@pytest.mark.parametrize('is_intact', [True, False])
def test_download_verifies_the_digest_in_a_file_name(server, is_intact):
    folder, address, _ = server
    source = publish(folder / 'a.pth')
    digest = hashlib.sha256((folder / 'a.pth').read_bytes()).hexdigest()[:8]
    if not is_intact:
        digest = f'{int(digest, 16) ^ 1:08x}'
    name = f'swin_v2_x-{digest}.pth'
    (folder / 'a.pth').rename(folder / name)
    target = SwinTransformerV2(ARCH, window_size=8, pretrained_window_sizes=8)
    if is_intact:
        load_checkpoint(target, f'{address}/{name}')
        assert is_loaded(target, source)
    else:
        with pytest.raises(CheckpointError, match=f'invalid hash value.*{digest}'):
            load_checkpoint(target, f'{address}/{name}')
        assert not list(Path(torch.hub.get_dir()).rglob('*.pth'))


def test_published_digest_is_not_a_date():
    assert loaders.published_digest('https://example.com/swin_v2_t-20231120.pth') is None
    assert loaders.published_digest('https://example.com/swin_v2_t-b137f0e2.pth') == 'b137f0e2'


@pytest.mark.parametrize('is_intact', [True, False])
def test_download_verifies_the_digest_of_a_model_repository(server, is_intact):
    folder, address, _ = server
    publish(folder / 'owner/repo/resolve/main/model.bin')
    digest = hashlib.sha256((folder / 'owner/repo/resolve/main/model.bin').read_bytes()).hexdigest()
    pointer = folder / 'owner/repo/raw/main/model.bin'
    pointer.parent.mkdir(parents=True)
    pointer.write_text(
        f'version https://git-lfs.github.com/spec/v1\noid sha256:{digest if is_intact else "0" * 64}\nsize 1\n'
    )
    url = f'{address}/owner/repo/resolve/main/model.bin'
    if is_intact:
        assert load_swinv2_state_dict(url)
    else:
        with pytest.raises(CheckpointError, match='invalid hash value'):
            load_swinv2_state_dict(url)


def test_cached_path_differs_for_two_addresses(server):
    folder, address, _ = server
    first, second = publish(folder / 'a/epoch_1.pth'), publish(folder / 'b/epoch_1.pth')
    with torch.no_grad():
        second.patch_embed.proj.bias.add_(1)
    torch.save({'model': dict(second.named_parameters())}, folder / 'b/epoch_1.pth')
    for name, source in (('a', first), ('b', second)):
        target = SwinTransformerV2(ARCH, window_size=8, pretrained_window_sizes=8)
        load_checkpoint(target, f'{address}/{name}/epoch_1.pth')
        assert is_loaded(target, source)


def test_download_error_names_the_file_and_its_cached_path(server, monkeypatch):
    folder, address, _ = server
    url = f'{address}/swinv2_tiny_patch4_window8_256.pth'
    monkeypatch.setitem(loaders.RELEASES, 'tiny_window8_256', loaders.Release(url, (8, 8, 8, 8)))
    with pytest.raises(CheckpointError, match='put it at (.*)$') as caught:
        load_swinv2_state_dict('swinv2://tiny_window8_256')
    message = str(caught.value)
    assert url in message
    # and doing so helps
    publish(Path(message.rsplit('put it at ', 1)[1]))
    assert load_swinv2_state_dict('swinv2://tiny_window8_256')


def test_find_release_unknown_name_lists_the_releases():
    with pytest.raises(CheckpointError, match=r"no Swin V2 release 'tiny'.*tiny_window8_256.*simmim_base_1k_500k"):
        load_swinv2_state_dict('swinv2://tiny')


@pytest.mark.parametrize(('rank', 'shares_the_disk'), [(0, True), (1, True), (1, False)])
def test_download_by_the_first_process_first(server, monkeypatch, rank, shares_the_disk):
    """The other processes wait, and download only if they do not see its file."""
    folder, address, events = server
    publish(folder / 'a.pth')
    url = f'{address}/a.pth'

    def other_process_arrives():
        events.append('barrier')
        if rank == 1 and shares_the_disk:
            publish(loaders.cached_path(url))

    monkeypatch.setattr(loaders, 'get_dist_info', lambda: (rank, 2))
    monkeypatch.setattr(loaders, 'barrier', other_process_arrives)
    assert loaders.download(url).is_file()
    downloads_later = [] if shares_the_disk else ['/a.pth']
    assert events == (['/a.pth', 'barrier'] if rank == 0 else ['barrier', *downloads_later])


@pytest.mark.parametrize('rank', [0, 1])
def test_download_error_after_the_barrier(server, monkeypatch, rank):
    _, address, events = server
    monkeypatch.setattr(loaders, 'get_dist_info', lambda: (rank, 2))
    monkeypatch.setattr(loaders, 'barrier', lambda: events.append('barrier'))
    with pytest.raises(CheckpointError, match='put it at'):
        loaders.download(f'{address}/a.pth')
    assert 'barrier' in events


def download_or_say_why(url: str) -> None:
    """Runs in each process."""
    try:
        print('OK', loaders.download(url).stat().st_size)
    except CheckpointError as error:
        print('ERROR', error)


@pytest.mark.slow
@pytest.mark.parametrize('is_there', [True, False])
def test_download_in_several_processes(server, tmp_path, is_there):
    folder, address, events = server
    if is_there:
        publish(folder / 'a.pth')
    printed = run_processes(download_or_say_why, f'{address}/a.pth', folder=tmp_path)
    assert printed.count('OK' if is_there else 'put it at') == 2
    if is_there:
        assert events == ['/a.pth']
