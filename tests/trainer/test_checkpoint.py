"""The checkpoint store: bit-exact, complete or absent, and honest about damage and full disks."""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer import checkpoint
from trainer.checkpoint import (
    CheckpointDamaged,
    CheckpointStore,
    CheckpointWriteError,
    load_state,
    load_tensors,
    resolve,
    verify,
)
from trainer.export import export_safetensors

NUM_SHARDS = 3


def make_shards(seed: int, size: int = 5) -> list[dict[str, torch.Tensor]]:
    """Return what three ranks save: parameters and both moments, each on one rank only."""
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_SHARDS)]
    for rank, shard in enumerate(shards):
        for kind in ("model", "exp_avg", "exp_avg_sq"):
            shard[f"{kind}/layers.{rank}.weight"] = torch.randn(size, 3, generator=generator)
            shard[f"{kind}/layers.{rank}.bias"] = torch.randn(size, generator=generator)
    return shards


def save(store: CheckpointStore, step: int, size: int = 5) -> Path:
    """Save a whole checkpoint as the ranks of a run would."""
    store.begin(step)
    for rank, tensors in enumerate(make_shards(step, size)):
        store.write_shard(step, rank, tensors)
    return store.commit(step, {"step": step, "consumed_samples": 8 * step}, num_shards=NUM_SHARDS)


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def assert_holds(path: Path, step: int, size: int = 5) -> None:
    """Check state and every bit of the tensors of a checkpoint that `save` wrote."""
    assert load_state(path) == {"step": step, "consumed_samples": 8 * step}
    expected = {name: tensor for shard in make_shards(step, size) for name, tensor in shard.items()}
    tensors = load_tensors(path)
    assert tensors.keys() == set(tensors) == expected.keys()
    for name in tensors:
        assert to_bytes(tensors.get(name)) == to_bytes(expected[name])
        assert tensors.shapes[name] == expected[name].shape


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)


def test_checkpoint_comes_back_bit_for_bit(store: CheckpointStore) -> None:
    path = save(store, 100)
    assert path == store.folder / "step_00000100"
    verify(path)
    assert_holds(path, 100)
    with pytest.raises(ValueError, match="'model/absent'"):
        load_tensors(path).get("model/absent")
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        *(f"shard_{rank:05d}.safetensors" for rank in range(NUM_SHARDS)),
        "state.json",
    ]
    assert all(
        file.stat().st_mode & 0o777 == path.stat().st_mode & 0o666 for file in path.iterdir()
    )


def test_special_values_views_and_empty_shards_come_back(store: CheckpointStore) -> None:
    flat = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0, 4.0])
    tensors = {
        "model/view": flat[:2],
        "model/transposed": flat[2:].view(2, 2).t(),
        "model/scalar": torch.tensor(2.5),
        "model/count": torch.arange(3),
        "model/trained": torch.nn.Parameter(torch.ones(2)),
    }
    store.begin(1)
    store.write_shard(1, 0, tensors)
    store.write_shard(1, 1, {})
    loaded = load_tensors(store.commit(1, {}))
    for name, tensor in tensors.items():
        assert to_bytes(loaded.get(name)) == to_bytes(tensor)
        assert loaded.shapes[name] == tensor.shape


def test_last_keep_checkpoints_stay(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4, 123456789):
        save(store, step)
    assert store.steps() == [3, 4, 123456789]
    assert store.latest() == store.folder / "step_123456789"
    assert len(list(store.folder.iterdir())) == 3
    for step in (1, 2, 5, 6, 7):  # A run that was resumed from further back.
        save(store, step)
    assert store.steps() == [5, 6, 7, 123456789]


def test_stale_folders_are_removed(store: CheckpointStore) -> None:
    for name in (".step_00000001.tmp", ".step_00000002.tmp", ".step_00000003.removed"):
        (store.folder / name).mkdir(parents=True)
        (store.folder / name / "shard_00007.json").write_text("{}")
    assert store.steps() == []
    assert store.latest() is None
    working = store.begin(2)
    assert list(store.folder.iterdir()) == [working]
    assert not list(working.iterdir())
    save(store, 3)
    assert [path.name for path in store.folder.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("written", [(), (0, 1), (1, 2), (0, 2)])
def test_commit_refuses_missing_shards(store: CheckpointStore, written: tuple[int, ...]) -> None:
    store.begin(1)
    for rank in written:
        store.write_shard(1, rank, make_shards(1)[rank])
    with pytest.raises(ValueError, match="shards found, 3 expected; every rank must write"):
        store.commit(1, {}, num_shards=NUM_SHARDS)
    if written != (0, 1):  # Only the number of shards tells that the last one is missing.
        with pytest.raises(ValueError, match="shard"):
            store.commit(1, {})
        assert store.latest() is None


def test_commit_refuses_a_tensor_in_two_shards(store: CheckpointStore) -> None:
    store.begin(1)
    store.write_shard(1, 0, {"model/a": torch.ones(2)})
    store.write_shard(1, 1, {"model/a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'model/a' is also in .*shard_00000"):
        store.commit(1, {})


def test_shard_without_working_folder_is_an_error(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointWriteError, match=r"not visible.*there is no earlier checkpoint"):
        store.write_shard(1, 0, make_shards(1)[0])


@pytest.mark.parametrize(
    "file", ["manifest.json", "state.json", "shard_00000.safetensors", "shard_00002.safetensors"]
)
def test_every_flipped_byte_is_noticed(store: CheckpointStore, file: str) -> None:
    path = save(store, 1)
    content = (path / file).read_bytes()
    for offset in range(0, len(content), 1 if file == "manifest.json" else 7):
        damaged = bytearray(content)
        damaged[offset] ^= 1
        (path / file).write_bytes(damaged)
        with pytest.raises(CheckpointDamaged):
            verify(path)


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def rename_entry(path: Path, name: str) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit_manifest(path, files={name if key == SHARD else key: files[key] for key in files})


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def link_out(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


SHARD = "shard_00001.safetensors"
DAMAGES = {
    "flipped": (lambda p: flip_byte(p / SHARD), f"{SHARD}: checksum"),
    "truncated": (lambda p: os.truncate(p / SHARD, 100), f"{SHARD}: 100 bytes, not"),
    "missing": (lambda p: (p / SHARD).unlink(), f"{SHARD}: missing"),
    "linked": (lambda p: link_out(p / SHARD), f"{SHARD}: no regular file"),
    "folder": (lambda p: ((p / SHARD).unlink(), (p / SHARD).mkdir()), f"{SHARD}: no regular"),
    "state-missing": (lambda p: (p / "state.json").unlink(), "state.json: missing"),
    "no-manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: missing"),
    "manifest-linked": (lambda p: link_out(p / "manifest.json"), "manifest.json: no regular"),
    "manifest-cut": (lambda p: os.truncate(p / "manifest.json", 50), "manifest.json: "),
    "manifest-list": (lambda p: (p / "manifest.json").write_text("[]"), "not a JSON object"),
    "manifest-deep": (lambda p: (p / "manifest.json").write_text("[" * 10**5), "manifest.json: "),
    "files-empty": (lambda p: edit_manifest(p, files={}), "manifest.json: file names missing"),
    "bad-entry": (lambda p: edit_manifest(p, files={"state.json": 3}), "manifest.json: `files`"),
    "version": (lambda p: edit_manifest(p, format_version=99), "unknown format version 99"),
    "step": (lambda p: edit_manifest(p, step=7), "of step 7"),
    "above": (lambda p: rename_entry(p, "../x"), r"manifest.json: .*\['\.\./x', 'shard_00001"),
    "absolute": (lambda p: rename_entry(p, "/etc/hostname"), "manifest.json: .*'/etc/hostname'"),
    "nested": (lambda p: rename_entry(p, "sub/shard_00001.safetensors"), "manifest.json: .*'sub/"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_one_before_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage, message: str
) -> None:
    before, path = save(store, 1), save(store, 2)
    damage(path)
    with pytest.raises(CheckpointDamaged, match=message):
        verify(path)
    with pytest.raises(CheckpointDamaged, match=message):
        resolve(path)
    with caplog.at_level(logging.WARNING):
        assert resolve(store.folder.parent) == store.latest() == before
    assert "step_00000002" in caplog.text
    shutil.rmtree(before)
    message = r"no checkpoint of steps \[2\] in .* is sound.*run\.resume"
    with pytest.raises(ValueError, match=message):
        store.latest()


def test_failing_disk_is_damage_when_reading_and_a_write_error_when_saving(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, path = save(store, 1), save(store, 2)
    digest = checkpoint.hashlib.file_digest

    def fail(file: io.BufferedReader, name: str) -> object:
        if Path(file.name).is_relative_to(before):
            return digest(file, name)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.hashlib, "file_digest", fail)
    with pytest.raises(CheckpointDamaged, match=r"step_00000002/.*: .*Input/output error"):
        verify(path)
    assert store.latest() == before
    with pytest.raises(CheckpointWriteError, match=r"shard_00000.*Input/output error"):
        save(store, 3)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", digest)
    monkeypatch.setattr(os, "rename", lambda *args: os.listdir("/nonexistent"))
    with pytest.raises(CheckpointWriteError, match=r"step_00000002 could not be written"):
        save(store, 2)


def test_file_that_is_not_what_its_name_says_is_named(store: CheckpointStore) -> None:
    path = save(store, 1)
    (path / "state.json").write_text("3")
    with pytest.raises(CheckpointDamaged, match=r"state.json: not a JSON object"):
        load_state(path)
    (path / SHARD).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointDamaged, match=f"{SHARD}: "):
        load_tensors(path)


def test_every_file_is_on_the_disk_before_its_folder_is_renamed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flushed: set[Path] = set()
    renamed: list[Path] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note(descriptor: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        assert {source, *source.iterdir()} <= flushed
        renamed.append(target)
        (rename if target.parent == store.folder else replace)(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    monkeypatch.setattr(os, "replace", check)
    path, out = save(store, 1), tmp_path / "out"
    export_safetensors(path, out, torch.float32, max_shard_bytes=1)
    assert renamed == [path, out]
    assert {store.folder, out.parent} <= flushed


def test_resolve_takes_a_checkpoint_or_a_run(store: CheckpointStore, tmp_path: Path) -> None:
    first, last = save(store, 1), save(store, 2)
    assert resolve(first) == first
    assert resolve(str(store.folder.parent)) == last
    copy = tmp_path / "best"
    shutil.copytree(first, copy)
    assert resolve(copy) == copy
    for path in (tmp_path / "absent", tmp_path, store.folder / "step_00000003"):
        with pytest.raises(ValueError, match=r"holds no checkpoint; set run\.resume"):
            resolve(path)


class Killed(BaseException):
    """Stands for the end of the process at one file system call."""


def limited(call: Callable[..., object], calls_left: Iterator[int]) -> Callable[..., object]:
    def limited_call(*args: object, **kwargs: object) -> object:
        if next(calls_left, None) is None:
            raise Killed
        return call(*args, **kwargs)

    return limited_call


@pytest.mark.parametrize("again", [False, True], ids=["next-step", "same-step"])
def test_no_call_is_a_bad_moment_to_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    calls = [(os, name) for name in ("rename", "mkdir", "unlink", "rmdir", "fsync")]
    for fatal in range(1000):
        store = CheckpointStore(tmp_path / str(fatal), keep=1)
        save(store, 1, size=2)
        step, calls_left, finished = 1 if again else 2, iter(range(fatal)), False
        with monkeypatch.context() as patch:
            for module, name in (*calls, (checkpoint, "save_file")):
                patch.setattr(module, name, limited(getattr(module, name), calls_left))
            with contextlib.suppress(Killed):
                save(store, step, size=4)
                finished = True
        for visible in store.folder.glob("step_*"):
            verify(visible)
        path = store.latest()
        assert path is not None
        size = load_tensors(path).shapes["model/layers.0.bias"][0]
        assert_holds(path, 1 if size == 2 else step, size)
        store.begin(3)
        assert store.latest() is not None
        assert_holds(save(store, 3), 3)
        assert store.steps() == [3]
        assert [path.name for path in store.folder.iterdir()] == ["step_00000003"]
        if finished:
            break
    assert fatal > 20


def save_forever(folder: Path, log: Path, first: int) -> None:
    """Save step after step, and note each one that is committed."""
    store = CheckpointStore(folder, keep=2)
    with log.open("a") as file:
        for step in range(first, 10**6):
            save(store, step, size=20_000)
            file.write(f"{step}\n")
            file.flush()


def test_kill_at_any_moment_leaves_the_last_or_the_one_before(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch"])
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    log.touch()
    store = CheckpointStore(folder, keep=2)
    moments = random.Random(0)
    committed = unfinished = 0
    for _ in range(15):
        args = (folder, log, committed + 1)
        saver = context.Process(target=save_forever, args=args, daemon=True)
        saver.start()
        while len(log.read_text().split()) <= committed and saver.is_alive():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        saver.kill()
        saver.join()
        unfinished += any(path.name.startswith(".") for path in folder.iterdir())
        committed = int(log.read_text().split()[-1])
        path = store.latest()
        assert path in (folder / f"step_{committed + late:08d}" for late in (0, 1))
        assert_holds(path, int(path.name[5:]), size=20_000)
        committed = int(path.name[5:])
        log.write_text("".join(f"{step}\n" for step in range(1, committed + 1)))
    assert unfinished > 0


@pytest.fixture(params=["tmpfs", "size-limit"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder of 1 MiB; or, needing no rights, one in which no file may pass 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "size-limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_the_earlier_checkpoints(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "run" / "checkpoints", keep=3)
    save(store, 1)
    message = r"{}.* could not be written .*needs {} bytes, \d\d+ are free.*intact.*step_00000001"
    store.begin(2)
    store.write_shard(2, 0, make_shards(2)[0])
    with pytest.raises(CheckpointWriteError, match=message.format("shard_00001", 4_000_000)):
        store.write_shard(2, 1, {"model/big": torch.zeros(10**6)})
    assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]
    with pytest.raises(CheckpointWriteError, match="another rank failed"):
        store.write_shard(2, 2, make_shards(2)[2])
    store.begin(2)
    store.write_shard(2, 0, make_shards(2)[0])
    with pytest.raises(CheckpointWriteError, match=message.format("state.json", r"2\d{6}")):
        store.commit(2, {"text": "x" * 2_000_000})
    assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]
    assert_holds(store.latest(), 1)
    save(store, 2)
    assert_holds(store.latest(), 2)


def test_full_disk_leaves_no_half_export(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints", keep=1)
    store.begin(1)
    for rank in range(3):
        store.write_shard(1, rank, {f"model/{rank}": torch.zeros(60_000)})
    path = store.commit(1, {})
    with pytest.raises(CheckpointWriteError, match=r"needs 720000 bytes.*step_00000001 is intact"):
        export_safetensors(path, small_disk / "out", torch.float32)
    assert [path.name for path in small_disk.iterdir()] == ["checkpoints"]
    verify(path)


def test_place_that_takes_no_folder_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointWriteError, match="there is no earlier checkpoint"):
        CheckpointStore(tmp_path / "checkpoints", keep=1).begin(3)


def test_folder_that_resists_is_left_for_the_next_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(store, step)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *args, **kwargs: os.listdir("/nonexistent"))
        assert_holds(save(store, 4), 4)
    assert "the next save tries again" in caplog.text
    assert store.steps() == [2, 3, 4]
    save(store, 5)
    assert len(list(store.folder.iterdir())) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(5 * 10**9, 1), (80, 3), (1, 6)])
def test_export_holds_the_weights_alone(
    store: CheckpointStore, tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int, num_files: int
) -> None:
    max_shard_bytes = max_shard_bytes * dtype.itemsize // 4
    out = tmp_path / "exports" / "model"
    path = save(store, 1)
    assert export_safetensors(path, out, dtype, max_shard_bytes=max_shard_bytes) == out
    files = sorted(out.glob("*.safetensors"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = {name[6:]: t for s in make_shards(1) for name, t in s.items() if "model/" in name}
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype))
    if num_files == 1:
        assert [file.name for file in out.iterdir()] == ["model.safetensors"]
        return
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)
    ]
    for shard in map(load_file, files):
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= max_shard_bytes
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in loaded.values())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}


def test_export_refuses_a_used_folder_and_other_dtypes(
    store: CheckpointStore, tmp_path: Path
) -> None:
    path = save(store, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="out is not empty; name a folder"):
        export_safetensors(path, tmp_path / "out", torch.float32)
    with pytest.raises(ValueError, match=r"torch.float16 cannot be exported; use torch.float32"):
        export_safetensors(path, tmp_path / "other", torch.float16)
    (tmp_path / "out" / "model.safetensors").unlink()
    export_safetensors(path, tmp_path / "out", torch.float32)
