"""Compiling and caching the CPU kernels, with failing compilers, damaged caches and concurrent processes.

Most tests use a fake compiler, which copies the library that the other tests use.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from models.backends.cpp import build


@pytest.fixture(scope="module")
def built():
    """Path of the real library, found before a test sets another cache."""
    return build.library()._name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(build.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def compiler(built, tmp_path, monkeypatch):
    """Set CXX to a script that runs `instead` (default: copy a library) for the kernels' source. Returns its log."""
    log = tmp_path / "log"

    def install(instead=f'cp {built} "$out"', path=tmp_path / "fake compiler"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"""#!/bin/sh
for word; do out=$word; done
case "$*" in *store_and_recall.cpp*) echo "$0" >> "{log}"; {instead};; esac
""")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", f"'{path}' -m64")
        return log

    return install


def library():
    return build.library.__wrapped__()


def start():
    """Build the library in another process, without PyTorch."""
    command = [sys.executable, "-c", "import build; build.library()"]
    variables = os.environ | {"PYTHONPATH": str(build.FOLDER)}
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_processes_that_start_at_once_compile_once(cache, compiler, built):
    log = compiler(f'sleep 1; cp {built} "$out"')
    errors = [process.communicate(timeout=60)[1] for process in [start() for _ in range(3)]]
    assert log.read_text().count("\n") == 1
    assert sorted(error.split(" ")[0] for error in errors) == ["compiling", "waiting", "waiting"]


def test_another_source_flag_compiler_or_processor_gives_another_library(tmp_path, monkeypatch):
    """The flags are in build.py, so changing this file changes them."""
    folder = shutil.copytree(build.FOLDER, tmp_path / "cpp")
    for name, path in {"FOLDER": folder, "SOURCE": folder / build.SOURCE.name, "__file__": str(folder / "build.py")}.items():
        monkeypatch.setattr(build, name, path)
    keys = [build._key([["g++"]]), build._key([["g++", "-march=haswell"]])]
    for path in [*folder.glob("*.[hc]*"), folder / "build.py"]:
        path.write_text(path.read_text() + "// changed\n")
        keys.append(build._key([["g++"]]))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    keys.append(build._key([["g++"]]))
    assert len(set(keys)) == len(keys) > 10


def test_the_next_compilation_removes_the_files_of_a_killed_one(cache, compiler, built, tmp_path):
    hang = tmp_path / "hang"
    hang.touch()
    log = compiler(f'if [ -e {hang} ]; then sleep 60; fi; cp {built} "$out"')
    process = start()
    while not log.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("*/build-*"))
    hang.unlink()
    library()
    assert log.read_text().count("\n") == 2
    assert not list(cache.glob("*/build-*"))


def test_a_process_waits_for_a_stopped_compilation_then_compiles(cache, compiler, monkeypatch, capsys):
    log = compiler()
    path = Path(library()._name)
    path.unlink()
    monkeypatch.setattr(build, "WAIT", 0.3)
    with open(path.parent / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        library()
    assert 0.3 <= time.monotonic() - began < 20
    assert "waiting for another process" in capsys.readouterr().err
    assert log.read_text().count("\n") == 2


def test_a_damaged_library_is_compiled_again(cache, compiler):
    log = compiler()
    path = Path(library()._name)
    whole = path.read_bytes()
    path.unlink()  # this process has it mapped
    path.write_bytes(whole[:-1] + b"x")
    assert Path(library()._name) == path and path.read_bytes() == whole
    assert log.read_text().count("\n") == 2


def test_a_library_that_others_can_write_to_is_refused(cache, compiler, monkeypatch):
    compiler()
    path = Path(library()._name)
    for place in (path, path.parent, cache):
        place.chmod(0o777)
        with pytest.raises(build.BuildError, match=f"others can write to {place}; chmod go-w it"):
            library()
        place.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    if path.stat().st_uid:
        with pytest.raises(build.BuildError, match="belongs to another user"):
            library()


def test_without_a_home_the_library_goes_to_the_temporary_folder(compiler, monkeypatch, tmp_path):
    compiler()
    monkeypatch.delenv(build.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Path(library()._name).is_relative_to(tmp_path / f"memorizing_associations-{os.getuid()}")
    monkeypatch.setenv(build.CACHE_VARIABLE, "/dev/null/cache")
    with pytest.raises(build.BuildError, match=r"no folder for the compiled kernels .*Not a directory"):
        library()


def test_the_first_working_compiler_is_used(cache, compiler, monkeypatch, tmp_path):
    bin = tmp_path / "bin"
    compiler("echo warning; printf 'source.cpp:1: error: a \\351 is unknown\\n' >&2; exit 1", bin / "c++")
    log = compiler(path=bin / "g++")
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    for unset in ("", " "):
        monkeypatch.setenv("CXX", unset)
        library()
    assert log.read_text() == f"{bin}/c++\n{bin}/g++\n"
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(build.BuildError, match=r"compiled \(c\+\+: source.cpp:1: error: a \ufffd is unknown\); set CXX"):
        library()


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        ("kill -9 $$", r"compiled \(.*: signal 9\)"),
        ("exit 3", r"compiled \(.*: status 3\)"),
        ("echo 'ld: final link failed: No space left on device' >&2; exit 1", "cannot be written .*no space left"),
        ('echo nonsense > "$out"', "cannot be loaded .*file too short"),
        ({"CXX": "no-such -O3"}, "CXX is set to 'no-such -O3', and 'no-such' is no program"),
        ({"CXX": "'"}, "CXX is no command of a shell"),
        ({"CXX": "", "PATH": ""}, r"no C\+\+ compiler found"),
    ],
)
def test_a_failed_build_names_its_cause_in_one_line(cache, compiler, monkeypatch, instead, message):
    """`instead` is the fake compiler's command, or the environment to set."""
    if isinstance(instead, str):
        compiler(instead)
    else:
        for name, value in instead.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(build.BuildError, match=message) as caught:
        library()
    assert "\n" not in str(caught.value)
