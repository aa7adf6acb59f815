"""Old or new, whole, whatever happens: a kill at every step of publishing, races, leftovers of processes that are all number 1."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import FrameType

import pytest

from headfold.export import files, publishing
from headfold.export.files import exchange, lock_file, rename_without_replacing
from headfold.export.publishing import publish, publish_file, sweep

# Publishes version 2 over version 1, and dies like a killed process before the N-th call that changes the disk.
_DYING = """
import os, sys
from pathlib import Path
from headfold.export import files, publishing
target, step, exchanging = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
calls = 0
def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == step:
            os._exit(137)
        return function(*arguments, **options)
    return call
if not exchanging:
    files._rename = lambda *_: 38  # ENOSYS: a system that can neither exchange nor refuse to replace
files._rename = counted(files._rename)
for name in ("mkdir", "rename", "unlink", "rmdir", "fsync", "open", "close"):
    setattr(os, name, counted(getattr(os, name)))
with publishing.publish(target, replace=lambda old: None) as stage:
    (stage / "a").write_text("2")
    (stage / "b").write_text("2")
"""


def versions(target: Path) -> set[str]:
    return {path.read_text() for path in target.iterdir()}


def first(target: Path) -> None:
    with publish(target) as stage:
        (stage / "a").write_text("1")
        (stage / "b").write_text("1")


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_kill_before_any_step_leaves_the_old_or_the_new_and_the_next_run_succeeds(exchanging, tmp_path) -> None:
    finished = False
    for step in range(1, 60):
        target = tmp_path / str(step) / "bundle"
        target.parent.mkdir()
        first(target)
        command = [sys.executable, "-c", _DYING, target, str(step), str(exchanging)]
        code = subprocess.run([str(part) for part in command], check=False).returncode
        if exchanging:
            assert versions(target) in ({"1"}, {"2"}), step  # at every moment
        publishing.recover(target)
        assert versions(target) in ({"1"}, {"2"}), step
        with publish(target, replace=lambda old: None) as stage:
            (stage / "a").write_text("3")
        assert versions(target) == {"3"}
        assert [path.name for path in target.parent.iterdir()] == ["bundle"], step
        if code == 0:
            finished = True
            break
    assert finished


def test_what_appears_meanwhile_is_not_touched(tmp_path) -> None:
    target = tmp_path / "b"

    def late() -> None:
        with publish(target) as stage:
            (stage / "a").write_text("1")
            target.mkdir()
            (target / "theirs").write_text("x")

    with pytest.raises(FileExistsError):
        late()
    assert (target / "theirs").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_somebody_puts_into_the_old_one_at_the_last_moment_brings_it_back(tmp_path) -> None:
    target = tmp_path / "b"
    first(target)

    def check(old: Path) -> None:
        if (old / "theirs").exists():
            raise PermissionError("not ours")

    def late(old: Path, new: Path) -> None:
        (old / "theirs").write_text("x")

    with pytest.raises(PermissionError), publish(target, replace=check, complete=late) as stage:
        (stage / "a").write_text("2")
    assert versions(target) == {"1", "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_stage_whose_process_lives_stays_and_one_whose_process_died_goes(tmp_path) -> None:
    target = tmp_path / "b"
    with publishing._staging(target) as living:
        abandoned = living.with_name(f"{living.name}1")
        (abandoned / "new").mkdir(parents=True)
        first(target)
        assert not abandoned.exists()
        assert living.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_processes_that_are_all_number_1_do_not_take_each_other_for_dead(tmp_path) -> None:
    inside = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces of process ids here")
    source = "from pathlib import Path; from headfold.export.publishing import publish\n"
    source += f"import os\nwith publish(Path({str(tmp_path / 'b')!r})) as stage:\n    (stage / 'a').write_text('1')\n"
    killed = source + "    assert os.getpid() < 3; os._exit(137)"
    waits = source + "    print(flush=True); input()"
    subprocess.run([*inside, sys.executable, "-c", killed], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    living = subprocess.Popen(
        [*inside, sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert living.stdout is not None
    living.stdout.readline()
    subprocess.run([*inside, sys.executable, "-c", source], check=True)
    assert len(list(tmp_path.iterdir())) == 2
    living.communicate("\n")
    assert living.returncode == 1  # the other was first, and it replaces nothing
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_interrupt_between_two_renames_puts_the_old_one_back(tmp_path, monkeypatch) -> None:
    target = tmp_path / "b"
    first(target)

    def interrupted(source: Path, to: Path) -> None:
        if to == target and source.name == "new":
            raise KeyboardInterrupt
        source.rename(to)

    monkeypatch.setattr(publishing, "exchange", lambda *_: False)
    monkeypatch.setattr(publishing, "rename_without_replacing", interrupted)
    with pytest.raises(KeyboardInterrupt), publish(target, replace=lambda old: None) as stage:
        (stage / "a").write_text("2")
    assert versions(target) == {"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("replaces", [False, True])
def test_an_interrupt_at_any_line_before_the_end_leaves_nothing_but_the_old(replaces, tmp_path) -> None:
    """A person's Ctrl-C comes between any two lines: just after a directory is made, too."""
    target, step, at_work = tmp_path / "b", 0, True
    if replaces:
        first(target)

    def interrupting(lines: Iterator[int]) -> Callable[[FrameType, str, object], object]:
        def trace(frame: FrameType, event: str, _: object) -> object:
            if frame.f_code.co_filename not in (publishing.__file__, files.__file__):
                return None
            if event == "line" and next(lines) == step:
                raise KeyboardInterrupt
            return trace

        return trace

    while at_work:
        step += 1
        before = sys.gettrace()
        with suppress(KeyboardInterrupt):
            sys.settrace(interrupting(count(1)))
            try:
                with publish(target, replace=lambda old: None):
                    sys.settrace(before)
                    at_work = False
                    raise KeyboardInterrupt
            finally:
                sys.settrace(before)
        assert [path.name for path in tmp_path.iterdir()] == ["b"][: int(replaces)], step
    assert step > 10
    assert not replaces or versions(target) == {"1"}


def test_the_only_copy_stays_when_somebody_takes_its_place_between_two_renames(tmp_path, monkeypatch) -> None:
    target = tmp_path / "b"
    first(target)

    def taken(source: Path, to: Path) -> None:
        if to == target and source.name == "new":
            target.write_text("theirs")
        rename_without_replacing(source, to)

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "exchange", lambda *_: False)
        patched.setattr(publishing, "rename_without_replacing", taken)
        with pytest.raises(FileExistsError), publish(target, replace=lambda old: None) as stage:
            (stage / "a").write_text("2")
    publishing.recover(target)
    assert target.read_text() == "theirs"
    target.unlink()
    publishing.recover(target)
    assert versions(target) == {"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def no_locks(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


def windows(monkeypatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")


@pytest.mark.parametrize("system", [no_locks, windows])
def test_without_locks_all_but_the_removal_of_leftovers_works(system, tmp_path, monkeypatch) -> None:
    target, leftover = tmp_path / "b", tmp_path / f"{publishing._STAGING}{publishing._key(tmp_path / 'b')}-1"
    (leftover / "old").mkdir(parents=True)
    (leftover / "old" / "a").write_text("0")
    with monkeypatch.context() as patched:
        system(patched)
        publishing.recover(target)
        assert versions(target) == {"0"}  # the only copy is put back all the same
        (leftover / "new").mkdir()
        for text in "12":
            with publish(target, replace=lambda old: None) as stage:
                (stage / "a").write_text(text)
        publish_file(tmp_path / "f", lambda stage: stage.write_text("1"))
        assert (leftover / "new").exists()  # its process may live
    publishing.recover(target)
    assert versions(target) == {"2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "f"]


def test_what_is_to_be_completed_must_be_there(tmp_path) -> None:
    target = tmp_path / "b"
    first(target)

    def late() -> None:
        with publish(target, complete=lambda old, new: None):
            target.rename(tmp_path / "moved")

    with pytest.raises(FileNotFoundError):
        late()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_killed_removal_leaves_no_half(tmp_path) -> None:
    target = tmp_path / "b"
    first(target)
    code = "import os, pathlib, shutil, sys; from headfold.export.publishing import discard\n"
    code += "shutil.rmtree = lambda *a, **k: os._exit(137); discard(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, target], check=False)
    assert not target.exists()
    publishing.recover(target)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_make_two_that_are_whole_one_after_the_other(tmp_path) -> None:
    target = tmp_path / "b"
    first(target)
    begun = threading.Barrier(2)

    def replace(text: str) -> None:
        with publish(target, replace=lambda old: None) as stage:
            begun.wait()
            (stage / "a").write_text(text)
            (stage / "b").write_text(text)

    threads = [threading.Thread(target=replace, args=(text,)) for text in "23"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions(target) in ({"2"}, {"3"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_link_is_followed_and_long_names_fit(tmp_path) -> None:
    real = tmp_path / "real"
    (tmp_path / "link").symlink_to(real)
    first(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert versions(real) == {"1"}
    first(tmp_path / ("n" * 255))
    with pytest.raises(OSError, match="too long"):
        first(tmp_path / ("n" * 256))


def test_the_umask_is_the_users(tmp_path) -> None:
    old = os.umask(0o027)
    try:
        first(tmp_path / "b")
    finally:
        os.umask(old)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "f"
    path.write_text("1")

    def fail(stage: Path) -> None:
        stage.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish_file(path, fail)
    assert path.read_text() == "1"
    publish_file(path, lambda stage: stage.write_text("2"))
    assert path.read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_the_systems_renames_do_what_they_say(tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    with pytest.raises(FileExistsError):
        rename_without_replacing(tmp_path / "a", tmp_path / "b")
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "is").read_text() == "b"
    rename_without_replacing(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "a").exists()
    with lock_file(tmp_path / "l"), pytest.raises(BlockingIOError), lock_file(tmp_path / "l"):
        pass


def test_leftovers_of_names_that_do_not_come_again_are_swept_and_work_in_progress_is_not(tmp_path, monkeypatch) -> None:
    """A run writes `step-N` once: killed right behind its publication, or in the removal of an old one, nobody would come by again."""
    first(tmp_path / "step-1")
    first(tmp_path / "step-2")
    code = "import os, pathlib, shutil, sys; from headfold.export.publishing import discard\n"
    code += "shutil.rmtree = lambda *a, **k: os._exit(137); discard(pathlib.Path(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "step-1"]).returncode == 137
    monkeypatch.setattr(publishing, "_close", lambda staging: None)  # the last step of a publication was not reached
    first(tmp_path / "step-3")
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".*"))) == 2
    with publish(tmp_path / "step-4") as stage:
        (stage / "a").write_text("4")
        sweep(tmp_path)
        assert len(list(tmp_path.glob(".*"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-3", "step-4"}
