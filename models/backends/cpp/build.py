"""Compiles the kernels on first use, and keeps the library for this source, compiler and processor."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "store_and_recall.cpp"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
ARM = platform.machine() in ("arm64", "aarch64")
# Of each group, the first flag that the compiler knows. If CXX names a processor, the first group is left out.
OPTIONAL_FLAGS = (
    ("-mcpu=native", "-march=native") if ARM else ("-march=native",),
    ("-fno-tree-loop-distribute-patterns", "-mprefer-vector-width=512"),  # g++; clang++ on x86
    ("-ffp-contract=fast",),
)
CACHE_VARIABLE = "MEMORIZING_ASSOCIATIONS_CACHE"
NAME = "memorizing_associations"
WAIT = 120.0  # s, for another process that compiles
ANOTHER_FOLDER = f"set {CACHE_VARIABLE} to another folder"


class BuildError(Exception):
    """The library cannot be built or loaded; the message says why in one line, with the remedy."""


def structure(name: str) -> type[ctypes.Structure]:
    """A struct of `arguments.h`, which alone describes the arguments of the kernels."""
    (body,) = re.findall(rf"struct {name} {{\n(.*?)\n}};", (FOLDER / "arguments.h").read_text(), re.DOTALL)
    kinds, fields = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}, []
    for declaration in re.sub("//.*", "", body).split(";")[:-1]:
        ((kind, names),) = re.findall(r"^\s*(?:const )?(\w+) (.*)$", declaration)
        for field in names.split(", "):
            fields.append((field.lstrip("*"), ctypes.c_void_p if field.startswith("*") else kinds[kind]))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Options, Tensors = structure("Options"), structure("Tensors")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels: from the cache, or compiled now.

    Raises:
        BuildError: the kernels cannot be compiled, kept or loaded.
    """
    compilers = _compilers()
    try:
        folder = _own_folder(_cache() / _key(compilers))
        path = _kept(folder)
        if path is None:
            with _building(folder) as alone:
                path = _kept(folder) or _build(compilers, folder, alone)
    except OSError as failure:
        reason = f"{failure.strerror}: {failure.filename or folder}"
        raise BuildError(f"the compiled kernels cannot be kept ({reason}); {ANOTHER_FOLDER}") from None
    return _load(path)


def _compilers() -> list[list[str]]:
    """Commands to try, in this order."""
    chosen = os.environ.get("CXX", "")
    try:
        command = shlex.split(chosen)
    except ValueError as error:
        raise BuildError(f"CXX is no command of a shell ({error}): {chosen}") from None
    if command:
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX is set to {chosen!r}, and {command[0]!r} is no program; correct or unset it")
        return [command]
    found = [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if not found:
        raise BuildError("no C++ compiler found (c++, g++, clang++); install g++ or clang++, or set CXX")
    return found


def _key(compilers: list[list[str]]) -> str:
    """A digest of the source, the compilers and the processor, on which a library depends."""
    key = hashlib.sha256()
    for path in sorted([SOURCE, *FOLDER.glob("*.h"), Path(__file__)]):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    programs = [program for command in compilers for word in command if (program := shutil.which(word))]
    files = [(program, os.stat(program).st_size, os.stat(program).st_mtime_ns) for program in programs]
    key.update(repr((compilers, files, _processor())).encode())
    return key.hexdigest()[:16]


def _processor() -> str:
    """Machines that share a home folder get separate libraries."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return repr(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


# ------------------------------------------------------------------------------------------------------------ the cache


def _cache() -> Path:
    try:
        if chosen := os.environ.get(CACHE_VARIABLE):
            return _own_folder(Path(chosen).expanduser())
        with contextlib.suppress(OSError, RuntimeError):  # no home folder, or a read-only one
            return _own_folder(Path.home() / ".cache" / NAME)
        return _own_folder(Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}")
    except (OSError, RuntimeError) as failure:
        raise BuildError(f"no folder for the compiled kernels ({failure}); {ANOTHER_FOLDER}") from None


def _own_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    _refuse_foreign(folder)
    return folder


def _refuse_foreign(path: Path) -> None:
    """Raises BuildError for a file that other users could have modified: a loaded library has our rights."""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise BuildError(f"{path} belongs to another user (id {found.st_uid}); {ANOTHER_FOLDER}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"others can write to {path}; chmod go-w it, or {ANOTHER_FOLDER}")


def _kept(folder: Path) -> Path | None:
    """The library whose name is the digest of its contents. A damaged library is ignored."""
    for path in folder.glob("*.so"):
        _refuse_foreign(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:
            return path
    return None


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[bool]:
    """One process builds at a time, where the file system has locks; yields whether this one is alone.

    The lock ends with its process. After WAIT seconds, a waiting process builds without the lock.
    """
    import fcntl

    with open(folder / "lock", "a") as lock:
        deadline = None
        alone = False
        while not alone:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                if deadline is None:
                    deadline = time.monotonic() + WAIT
                    _say(f"waiting for another process to compile the CPU kernels (at most {WAIT:.0f} s) ...")
                if time.monotonic() >= deadline or _kept(folder):
                    break
                time.sleep(0.1)
            except OSError:  # no locks here
                break
        yield alone


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- the compilation


def _build(compilers: list[list[str]], folder: Path, alone: bool) -> Path:
    """Compile into a folder. A library under its final name, its digest, is always whole."""
    if alone:
        for left in folder.glob("build-*"):  # left by killed processes
            shutil.rmtree(left, ignore_errors=True)
        for damaged in folder.glob("*.so"):
            damaged.unlink()
    _say("compiling the CPU kernels, once for this machine (some seconds) ...")
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as temporary:
        built = _first_that_compiles(compilers, Path(temporary))
        path = folder / f"{hashlib.sha256(built.read_bytes()).hexdigest()}.so"
        built.chmod(0o755)
        built.replace(path)
    return path


def _first_that_compiles(compilers: list[list[str]], folder: Path) -> Path:
    failures = []
    for compiler in compilers:
        output = folder / "store_and_recall.so"
        flags = [*FLAGS, *_known_flags(compiler, folder)]
        done = _run([*compiler, *flags, str(SOURCE), "-o", str(output)], folder)
        if done.returncode == 0 and output.exists():
            return output
        if b"No space left" in done.stderr or b"Disk quota" in done.stderr:
            raise BuildError(f"the compiled kernels cannot be written to {folder.parent} (no space left); {ANOTHER_FOLDER}")
        failures.append(f"{shlex.join(compiler)}: {_last_words(done)}")
    raise BuildError(f"its kernels cannot be compiled ({'; '.join(failures)}); set CXX to another C++17 compiler")


def _known_flags(compiler: list[str], folder: Path) -> list[str]:
    known = []
    for spellings in OPTIONAL_FLAGS:
        if spellings[-1] == "-march=native" and any(word.startswith(("-march=", "-mcpu=")) for word in compiler):
            continue
        for flag in spellings:
            empty = [*compiler, "-Werror", flag, "-x", "c++", "-c", os.devnull, "-o", str(folder / "empty.o")]
            if _run(empty, folder).returncode == 0:
                known.append(flag)
                break
    return known


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}
    try:
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as failure:  # not an executable program
        return subprocess.CompletedProcess(command, 127, b"", str(failure.strerror).encode())


def _last_words(done: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in (done.stdout + done.stderr).decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search("error|cannot|failed|not found", line)]
    status = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return (telling[0] if telling else lines[-1] if lines else status)[:300]


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as failure:
        remedy = f"{ANOTHER_FOLDER}, from which programs may run"
        if "not found" in str(failure) or "undefined symbol" in str(failure):  # the C++ library is not that of the compiler
            remedy = "set CXX to the compiler of this Python's environment or of the system"
        raise BuildError(f"the compiled kernels cannot be loaded ({failure}); {remedy}") from None
