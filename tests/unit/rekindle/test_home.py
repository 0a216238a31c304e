# SPDX-License-Identifier: Apache-2.0
"""What a killed command leaves is removed; what a living one uses is not."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rekindle import journal as journals
from rekindle.errors import FormatError, RekindleError, RestoreError, SpaceError, UsageError
from rekindle.home import Home
from rekindle.journal import CUDA_JOURNAL


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def leave(home: Home, name: str) -> Path:
    """A work directory as a killed command leaves it."""
    directory = home.run / name
    (directory / "deep").mkdir(parents=True)
    (directory / "deep/file").write_bytes(b"x")
    return directory


def test_a_home_is_private(home: Home) -> None:
    for directory in (home.root, home.store, home.dumps, home.run, home.tools, home.logs):
        assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o1777, 0o755, 0o700], ids=oct)
@pytest.mark.parametrize("name", ["file", "bin", ".bashrc", "of them"])
def test_a_directory_for_something_else_is_refused_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, name: str
) -> None:
    place = tmp_path / "place"
    for directory in (place, place / name, place / "run", place / "run" / "daemon"):
        directory.mkdir()
    place.chmod(mode)
    monkeypatch.setenv("REKINDLE_HOME", str(place))
    with pytest.raises(UsageError, match="place") as caught:
        Home.from_environment()
    assert name in caught.value.cause
    assert place.stat().st_mode & 0o7777 == mode
    assert {path.name for path in place.rglob("*")} == {name, "run", "daemon"}


def test_a_directory_for_temporary_files_is_refused_even_if_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/")
    with pytest.raises(UsageError, match="cannot use") as caught:
        Home(tmp_path)
    assert "temporary files" in caught.value.cause
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=oct)
@pytest.mark.parametrize("names", [[], ["lost+found"], ["policy.toml", "config.toml"], ["store"]])
def test_an_empty_directory_becomes_a_home(tmp_path: Path, names: list[str], mode: int) -> None:
    """Also a volume that all may write, as Kubernetes and tmpfs make them, and one that is half made."""
    for name in names:
        (tmp_path / name).mkdir()
    tmp_path.chmod(mode)
    assert Home(tmp_path).root.stat().st_mode & 0o7777 == 0o700


def test_a_home_may_hold_files_of_its_owner(home: Home) -> None:
    (home.root / "notes").touch()
    home.root.chmod(0o755)
    assert Home(home.root).root.stat().st_mode & 0o777 == 0o700


def test_a_home_is_opened_again(home: Home) -> None:
    (home.store / "file").touch()
    assert (Home(home.root).store / "file").exists()


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"REKINDLE_HOME": "{}/mine", "XDG_DATA_HOME": "{}/data"}, "mine"),
        ({"REKINDLE_HOME": "", "XDG_DATA_HOME": "{}/data"}, "data/rekindle"),
        ({"XDG_DATA_HOME": "", "HOME": "{}"}, ".local/share/rekindle"),
        ({"REKINDLE_HOME": "here"}, "here"),
    ],
)
def test_the_environment_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], root: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("REKINDLE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert Home.from_environment().root == tmp_path / root


def test_a_home_that_cannot_be_made_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="file") as caught:
        Home.from_environment()
    assert "REKINDLE_HOME" in caught.value.hint


def test_a_user_without_a_home_may_set_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path))
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as in a container with a user of its own choice
    assert Home.from_environment().root == tmp_path


def test_a_work_directory_is_private_and_goes_with_its_command(home: Home) -> None:
    with home.work("restore") as directory:
        assert directory.parent == home.run
        assert directory.name.startswith(f"restore-{os.getpid()}-")
        assert directory.stat().st_mode & 0o777 == 0o700
        (directory / "sub").mkdir()
        (directory / "sub/file").touch()
    assert not list(home.run.iterdir())


@pytest.mark.parametrize("error", [FormatError("x"), ValueError("x"), KeyboardInterrupt()])
def test_a_work_directory_goes_with_a_failed_command(home: Home, error: BaseException) -> None:
    with pytest.raises(type(error)), home.work("restore"):
        raise error
    assert not list(home.run.iterdir())


def test_commands_have_directories_of_their_own(home: Home) -> None:
    with home.work("restore") as one, home.work("restore") as two:
        assert one != two


def test_what_a_killed_command_left_is_removed(home: Home) -> None:
    one, two = leave(home, "restore-1-a"), leave(home, "bench-2-b")
    assert sorted(home.sweep()) == sorted([one, two])
    assert not list(home.run.iterdir())
    assert home.sweep() == []


def test_what_a_living_command_uses_stays(home: Home) -> None:
    dead = leave(home, "restore-1-a")
    with home.work("restore") as directory:
        assert home.sweep() == [dead]
        assert Home(home.root).sweep() == []
        assert directory.exists()


def test_another_living_process_keeps_its_directory(home: Home) -> None:
    program = (
        "import sys, time, pathlib; from rekindle.home import Home\n"
        "with Home(pathlib.Path(sys.argv[1])).work('restore') as d:\n print(d, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(home.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        directory = Path(process.stdout.readline().strip())
        assert home.sweep() == []
        assert directory.exists()
        process.kill()
        process.wait()
    assert home.sweep() == [directory]
    assert not directory.exists()


def journal(directory: Path, pid: int) -> Path:
    """The journal of a command that was killed while it was at this process."""
    from rekindle.cuda.backend import State

    path = directory / CUDA_JOURNAL
    start = journals.start_ticks(pid)
    assert start
    journals.write(path, [journals.FoundProcess(pid=pid, start_ticks=start, state=State.RUNNING)])
    return path


def test_a_journal_that_is_needed_stays_and_all_else_goes(home: Home) -> None:
    directory = leave(home, "snapshot-1-a")
    (directory / "link").symlink_to(home.root)
    with subprocess.Popen(["sleep", "1000"]) as server:
        path = journal(directory, server.pid)
        assert home.sweep() == []
        assert list(directory.iterdir()) == [path]
        assert home.sweep() == []
        server.kill()
    assert home.sweep() == [directory]
    assert not directory.exists()
    assert home.store.exists()


def test_a_journal_that_is_needed_outlives_the_command_that_wrote_it(home: Home) -> None:
    with home.work("snapshot") as directory:
        (directory / "dump").mkdir()
        (directory / "dump/pages-1.img").touch()
        path = journal(directory, os.getpid())
    assert list(directory.iterdir()) == [path]


def test_a_journal_that_is_none_goes(home: Home) -> None:
    directory = leave(home, "snapshot-1-a")
    (directory / CUDA_JOURNAL).write_text("{")
    assert home.sweep() == [directory]
    assert not directory.exists()


def test_a_stray_file_among_the_work_directories_does_no_harm(home: Home) -> None:
    (home.run / ".DS_Store").touch()
    home.sweep()


def test_sweeping_while_commands_end_does_no_harm(home: Home) -> None:
    failures: list[BaseException] = []
    over = threading.Event()

    def sweep() -> None:
        while not over.is_set():
            try:
                Home(home.root).sweep()
            except BaseException as error:
                failures.append(error)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for _ in range(20):
            with home.work("restore") as directory:
                for number in range(20):
                    (directory / str(number)).touch()
    finally:
        over.set()
        sweeper.join()
    assert failures == []
    assert not list(home.run.iterdir())


def test_what_a_killed_writer_staged_goes_after_an_hour(home: Home) -> None:
    for name, age in ((".probes.json.0a1b", 7200), (".probes.json.2c3d", 0), ("probes.json", 7200)):
        (home.tools / name).touch()
        os.utime(home.tools / name, (time.time() - age,) * 2)
    home.sweep()
    assert {path.name for path in home.tools.iterdir()} == {".probes.json.2c3d", "probes.json"}


def fail_with_log(home: Home, content: str) -> RekindleError:
    try:
        with home.work("restore") as directory:
            (directory / "restore.log").write_text(content)
            raise RestoreError("it failed", log=directory / "restore.log")
    except RestoreError as error:
        return error


def test_the_log_of_a_failure_is_kept(home: Home) -> None:
    error = fail_with_log(home, "why")
    assert error.log
    assert error.log.parent == home.logs
    assert error.log.read_text() == "why"
    assert error.log.name.endswith("-restore.log")
    assert not list(home.run.iterdir())


def test_a_log_elsewhere_is_left_there(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "elsewhere.log"
    with pytest.raises(RestoreError) as caught, home.work("restore"):
        raise RestoreError("it failed", log=log)
    assert caught.value.log == log
    assert not list(home.logs.iterdir())


def test_a_log_that_is_not_there_is_not_named(home: Home) -> None:
    with pytest.raises(RestoreError) as caught, home.work("restore") as directory:
        raise RestoreError("it failed", log=directory / "never-written.log")
    assert caught.value.log is None


def test_no_log_is_made_without_one(home: Home) -> None:
    with pytest.raises(RestoreError), home.work("restore"):
        raise RestoreError("it failed")
    assert not list(home.logs.iterdir())


def test_twenty_logs_are_kept_and_these_are_the_newest(home: Home) -> None:
    kept = []
    for number in range(25):
        error = fail_with_log(home, str(number))
        assert error.log
        os.utime(error.log, (number, number))  # a clock's tick may be longer than a failure
        kept.append(error.log)
    fresh = fail_with_log(home, "last").log
    assert set(home.logs.iterdir()) == {*kept[-19:], fresh}


def test_a_full_disk_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(SpaceError, match=str(home.root)), home.work("restore"):
        pytest.fail("there is no directory")


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UsageError, match="another user"):
        Home(tmp_path)


def test_a_user_without_a_home_is_told_to_set_rekindle_home(
    homeless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REKINDLE_HOME", raising=False)
    with pytest.raises(UsageError, match="as REKINDLE_HOME") as caught:
        Home.from_environment()
    assert "set REKINDLE_HOME" in caught.value.hint
