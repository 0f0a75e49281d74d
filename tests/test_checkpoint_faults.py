"""Folding a checkpoint while things go wrong: typed errors, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fxlora
from fxlora import ExportError
from fxlora.disk.checkpoint import pieces, stream
from fxlora.disk.checkpoint import work as work_folder

from .checkpoints import pair, read, write_adapter, write_sharded

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a checkpoint in two files and an adapter; a few rows are a piece."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pieces, "ROWS", 2**10)
    shards = (
        {"a.weight": torch.randn(40, 30), "b.weight": torch.randn(50, 20), "x": torch.randn(999)},
        {"c.weight": torch.randn(33, 44).to(torch.bfloat16), "y": torch.arange(77)},
    )
    write_sharded(Path("base"), *shards)
    tensors = pair("a", 40, 30) | pair("c", 33, 44)
    write_adapter(Path("adapter"), tensors)
    save_file(shards[0], "base.safetensors")
    write_adapter(Path("small"), pair("a", 40, 30))


def fold() -> fxlora.CheckpointReport:
    return fxlora.fold_checkpoint("base", "adapter", "out")


# ---- kills --------------------------------------------------------------------------------------


def killed(count: int, seed: int) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(Path.cwd()), str(count), str(seed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert sum(sequence["kills"] for sequence in found) >= count
    for sequence in found:
        assert sequence["same"] and not sequence["half"] and not sequence["left"], sequence


def test_a_killed_fold_is_continued() -> None:
    killed(5, seed=0)


@pytest.mark.slow
def test_kills_at_sixty_points() -> None:
    killed(60, seed=1)


def test_what_is_written_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt keeps what is there; the next call begins with the second file."""
    write, count = os.write, [0]

    def interrupted(descriptor: int, content: memoryview) -> int:
        count[0] += len(content)
        if count[0] > 40 * 30 * 4 + 33 * 44:
            raise KeyboardInterrupt
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fold()
    assert not Path("out").exists()
    assert Path(".out.fxlora").is_dir()
    sizes: list[int] = []
    monkeypatch.setattr(os, "write", lambda d, c: sizes.append(len(c)) or write(d, c))
    report = fold()
    assert report.resumed
    assert 0 < sum(sizes) <= 33 * 44 * 2
    assert [tensor.survives is None for tensor in report.folded] == [False, False]
    fxlora.verify_checkpoint("base", "adapter", "out")
    assert not Path(".out.fxlora").exists()


def change_base() -> None:
    (first, *_) = Path("base").glob("*.safetensors")
    content = first.read_bytes()
    with first.open("r+b") as file:  # in place: the inode stays
        file.seek(len(content) - 1)
        file.write(bytes([content[-1] ^ 1]))


def change_adapter() -> None:
    write_adapter(Path("adapter"), pair("a", 40, 30) | pair("c", 33, 44))


def change_configuration() -> None:
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))


def change_nothing() -> None:
    """Only an option: see the test."""


CHANGES = (change_base, change_adapter, change_configuration, change_nothing)


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_begin_anew(
    change: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if they have the size and the time of those before; and with other options."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work_folder.Work, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            fold()
    times = {path: path.stat() for path in Path().glob("*/*.*")}
    change()
    for path, before in times.items():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    odd = change is change_nothing
    assert not fxlora.fold_checkpoint("base", "adapter", "out", allow_nonfinite=odd).resumed
    fxlora.verify_checkpoint("base", "adapter", "out")


# ---- faults of the disk -------------------------------------------------------------------------


def assert_nothing_written(call: Callable[[], object], said: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match=said):
        call()
    after = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    assert before == after
    assert not Path(".out.fxlora").exists()


@pytest.mark.parametrize("after", range(0, 8, 2))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails(monkeypatch: pytest.MonkeyPatch, after: int, number: int) -> None:
    write, count = os.write, [0]

    def fails(descriptor: int, content: memoryview) -> int:
        count[0] += 1
        if count[0] > after:
            raise OSError(number, os.strerror(number))
        return write(descriptor, content[: 1 + len(content) // 2])  # also: a short write

    monkeypatch.setattr(os, "write", fails)
    assert_nothing_written(fold, f"cannot write out: {os.strerror(number)}")


def test_a_file_that_may_not_grow() -> None:
    """As on a full disk, by the system's own limit: the old file stays as it is."""
    Path("out.safetensors").write_text("precious")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(ExportError, match="File too large"):
            fxlora.fold_checkpoint("base.safetensors", "small", "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Path("out.safetensors").read_text() == "precious"
    assert not Path(".out.safetensors.fxlora").exists()


@pytest.mark.parametrize("limit", [6000, 12_000])
def test_a_file_of_a_folder_that_may_not_grow(limit: int) -> None:
    """A shard, or the index, which is copied last."""
    index = Path("base/model.safetensors.index.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), "note": "x" * 20_000}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert_nothing_written(fold, "cannot write out: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000})())
    assert_nothing_written(fold, r"needs \d+\.\d KiB, and the disk has 1,000 B left")


@pytest.mark.parametrize("target", ["missing/out", "adapter/adapter_config.json/out", "base/out"])
def test_a_place_that_cannot_be_written(target: str) -> None:
    assert_nothing_written(
        lambda: fxlora.fold_checkpoint("base", "adapter", target), f"cannot write {target}"
    )


def test_a_read_only_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuses)
    assert_nothing_written(fold, "cannot write out: Read-only file system")


@pytest.mark.parametrize("target", ["base", "base.safetensors", "adapter", "."])
def test_inputs_are_not_overwritten(target: str) -> None:
    source = "base.safetensors" if target.endswith("s") else "base"
    adapter = "small" if target.endswith("s") else "adapter"
    assert_nothing_written(
        lambda: fxlora.fold_checkpoint(source, adapter, target), f"cannot write {target}"
    )


def test_a_link_to_the_base_is_the_base() -> None:
    os.link("base.safetensors", "out.safetensors")
    with pytest.raises(ExportError, match=r"base\.safetensors is read for it"):
        fxlora.fold_checkpoint("base.safetensors", "small", "out.safetensors")


def test_a_folder_with_something_else_stays() -> None:
    Path("out").mkdir()
    Path("out/precious").write_text("x")
    assert_nothing_written(fold, "holds something else already")
    Path("out/precious").unlink()
    fold()
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    fold()  # the same result is there already
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}


@pytest.mark.parametrize("link", ["folder", "nowhere"])
def test_a_target_that_is_a_link(link: str) -> None:
    Path("folder").mkdir()
    Path("out").symlink_to(link)
    assert_nothing_written(fold, "it is a link. Name the folder")


def test_a_target_around_the_adapter() -> None:
    Path("out").mkdir()
    Path("adapter").rename("out/adapter")
    with pytest.raises(ExportError, match="is read for it"):
        fxlora.fold_checkpoint("base", "out/adapter", "out")
    assert [path.name for path in Path("out").iterdir()] == ["adapter"]


def test_a_file_that_is_a_link_is_replaced() -> None:
    """The file that it points to stays."""
    Path("precious").write_text("x")
    Path("out.safetensors").symlink_to("precious")
    fxlora.fold_checkpoint("base.safetensors", "small", "out.safetensors")
    assert Path("precious").read_text() == "x" and not Path("out.safetensors").is_symlink()


def test_a_disk_where_case_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target inside of the base is found there, and two files that become one are an error."""
    Path("BASE").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "samefile", lambda a, b: str(a).lower() == str(b).lower())
        with pytest.raises(ExportError, match="is read for it"):
            fxlora.fold_checkpoint("base", "adapter", "BASE/out")
    assert not list(Path("BASE").iterdir())
    Path("base/notes").write_text("x")
    Path("base/Notes").write_text("y")
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: copy(a, Path(b).with_name(b.name.lower())))
    assert_nothing_written(fold, "names of files in base are the same")


@pytest.mark.parametrize("link", [False, True])
def test_what_is_where_it_is_written_first_stays(link: bool) -> None:
    Path("mine" if link else ".out.fxlora").mkdir()
    if link:
        Path(".out.fxlora").symlink_to("mine")
    Path(".out.fxlora/precious").write_text("x")
    with pytest.raises(ExportError, match=r"\.out\.fxlora, where it is written first, holds"):
        fold()
    assert [path.name for path in Path(".out.fxlora").iterdir()] == ["precious"]


# ---- memory, and other processes ----------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    calls = [0]
    honest = stream.folded_weight

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > 3:
            raise error
        return honest(*args, **kwargs)

    monkeypatch.setattr(stream, "folded_weight", fails)
    assert_nothing_written(fold, "not enough memory to fold 'a.weight'")


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (stream._Memory, "take", "DefaultCPUAllocator: can't allocate memory: you tried"),
        (threading.Thread, "start", "can't start new thread"),
    ],
)
def test_memory_and_threads_that_cannot_be_had(
    owner: type, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(owner, name, fails)
    assert_nothing_written(fold, "not enough memory to write out")


def test_a_base_that_shrinks_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *_) = sorted(Path("base").glob("*.safetensors"))
    size = first.stat().st_size
    honest = stream.read_into

    def shrinks(*args: Any) -> Any:
        os.truncate(first, size // 4)
        return honest(*args)

    monkeypatch.setattr(stream, "read_into", shrinks)
    with pytest.raises(fxlora.ConfigError, match="became shorter"):
        fold()
    assert not Path("out").exists() and not Path(".out.fxlora").exists()


def test_a_base_that_changes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = work_folder.Work.record

    def changes(*args: Any) -> None:
        change_base()
        honest(*args)

    monkeypatch.setattr(work_folder.Work, "record", changes)
    with pytest.raises(fxlora.ConfigError, match="changed while it was read"):
        fold()
    assert not Path("out").exists() and not Path(".out.fxlora").exists()


def test_two_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first writes, and the first one's result is whole."""
    began, may_end = threading.Event(), threading.Event()
    honest = stream.folded_weight

    def slow(*args: Any, **kwargs: Any) -> Any:
        began.set()
        assert may_end.wait(30)
        return honest(*args, **kwargs)

    monkeypatch.setattr(stream, "folded_weight", slow)
    first = threading.Thread(target=fold)
    first.start()
    assert began.wait(30)
    with pytest.raises(ExportError, match="another process is writing out"):
        fold()
    may_end.set()
    first.join()
    fxlora.verify_checkpoint("base", "adapter", "out")
    assert set(read(Path("out"))) == {"a.weight", "b.weight", "c.weight", "x", "y"}
