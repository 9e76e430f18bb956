"""The processes that run a program against its tests, for `python_tests.py`. This file is the script that they run.

launcher     takes the request, and leaves the machine's files, processes and network where that is permitted
supervisor   its child, the first process of the new process namespace: holds the tests and judges
runner       its children, one per test: a fresh interpreter with limits and without privileges, which runs the program,
             then the test. Nothing that the program must not see is in its memory before the program has run.

The launcher lives until its standard input ends, also when the trainer is killed; until then, what a program leaves behind
is among its descendants. It imports little, to start fast.
"""

import contextlib
import marshal
import os
import resource
import signal
import sys
from typing import Any


MIB = 1024**2
PROCESSES = 8
"""Limit on the processes and threads of a program."""
FILES = 64 * MIB
"""Limit in bytes on the files of a program."""
_SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/usr", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (1 << n for n in (17, 27, 28, 29, 30))
_MS_NOSUID, _MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 1, 1 << 12, 1 << 14, 1 << 18
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 36, 38
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE, _READ_ONLY_NOSUID = -100, 0x8000, 1 | 2

# What the runner executes. The builtins that it needs are local, since the program may replace them. It sends the nonce
# when the program has ended; only then does the supervisor send the test and the token of its success.
_RUNNER = """
def run_program(inbox, outbox):
    import builtins, marshal, os, sys
    read, write, leave, loads, run, to_code = os.read, os.write, os._exit, marshal.loads, exec, compile
    untrace, unprofile, size_of, number = sys.settrace, sys.setprofile, len, int.from_bytes
    failure = bytes(16)
    names = vars(builtins)
    original = dict(names)
    del sys.orig_argv, sys.argv[1:]

    def receive():
        size, data = number(read(inbox, 8), "big"), b""
        while size_of(data) < size:
            data += read(inbox, size - size_of(data)) or leave(1)
        return loads(data)

    try:
        program, nonce = receive()
        module = sys.modules["program"] = type(sys)("program")
        run(to_code(program, "program.py", "exec"), vars(module))
        write(outbox, nonce)
        test, token = receive()
        untrace(None)
        unprofile(None)
        names.clear()
        names.update(original)
        run(to_code(test, "test.py", "exec"), vars(module))
        write(outbox, token)
    finally:
        write(outbox, failure)  # neither of the two: children of the program may keep the pipe open
        leave(0)

import sys
run_program(int(sys.argv[1]), int(sys.argv[2]))
"""


# ---- Launcher ----
def main() -> None:
    """Read a request from the standard input; write one byte, whether the program is isolated, and one per test."""
    request = marshal.load(sys.stdin.buffer)
    isolated = sys.platform == "linux" and _isolate(request["folder"])
    if isolated:
        request["folder"] = "/tmp"
    request["user"] = 2**30 + os.getpid()
    if os.getuid() == 0:
        os.chmod(request["folder"], 0o711)
    if sys.platform == "linux":
        _prctl(_PR_SET_DUMPABLE, 0)  # a program of the same user must not read the tests from the supervisor's memory
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.fork()
    if supervisor == 0:
        try:
            os.write(1, bytes([isolated]) + bytes(Supervisor(request).judge()))
        finally:
            os._exit(0)
    os.close(1)
    while os.read(0, 1):
        pass
    with contextlib.suppress(OSError):
        os.kill(supervisor, signal.SIGKILL)
        while True:
            os.wait()


def _isolate(folder: str) -> bool:
    """Give this process a file system with nothing but Python and an empty /tmp, no network, and its child its own process
    and user numbers. False where the system does not permit it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: Any) -> None:
        if getattr(libc, name)(*(a.encode() if isinstance(a, str) else a for a in args)):
            raise OSError(ctypes.get_errno(), name)

    def mount_empty(path: str, options: str) -> None:
        call("mount", "tmpfs", path, "tmpfs", ctypes.c_ulong(_MS_NOSUID), options)

    uid, gid = os.getuid(), os.getgid()
    try:
        namespaces = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
        call("unshare", namespaces | (_CLONE_NEWUSER if uid else 0))
        if uid:
            for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(line)
        call("mount", None, "/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
        mount_empty(folder, "size=1m,mode=755")
        for path in {*_SYSTEM, sys.base_prefix, os.path.dirname(sys.executable)}:
            if os.path.exists(path):
                _make_place(folder + path, os.path.isdir(path))
                call("mount", path, folder + path, None, ctypes.c_ulong(_MS_BIND | _MS_REC), None)
        os.mkdir(f"{folder}/tmp")
        attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID, 0, 0, 0)
        call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, folder, _AT_RECURSIVE, attributes, ctypes.c_size_t(32))
        mount_empty(f"{folder}/tmp", f"size={FILES},nr_inodes=4096,mode=711")
        os.chroot(folder)
    except OSError:
        return False
    return True


def _make_place(path: str, is_folder: bool) -> None:
    os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
    if not is_folder:
        # Behind a place that was made before, this is the machine's own file, which must not be emptied.
        with contextlib.suppress(FileExistsError):
            open(path, "x").close()


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# ---- Supervisor ----
class Supervisor:
    """Runs the program once per test, one after another, in the time that the request allows for all."""

    def __init__(self, request: dict[str, Any]):
        self.request = request
        self.is_isolated = os.getpid() == 1
        self.runner = 0
        self.runs = 0

    def judge(self) -> list[bool]:
        """Return which tests the program passes; none if it passes a test that nothing can pass."""
        signal.signal(signal.SIGALRM, lambda *_: self._kill_runner())
        tests = self.request["tests"]
        passed = []
        start = _now()
        for index, test in enumerate(tests):
            left = self.request["timeout"] - (_now() - start)
            # An even share of what is left, so that a test that hangs does not take the others with it.
            passed.append(left > 0 and self._passes(test, left / (len(tests) - index)))
        if any(passed) and self._passes(f"{tests[passed.index(True)]}\nassert False\n", self.request["timeout"]):
            return [False] * len(tests)
        return passed

    def _passes(self, test: str, seconds: float) -> bool:
        self.runs += 1
        (read_in, inbox), (outbox, write_out) = os.pipe(), os.pipe()
        self.runner = os.fork()
        if self.runner == 0:
            try:
                self._become_runner(read_in, write_out)
            finally:
                os._exit(127)
        os.close(read_in)
        os.close(write_out)
        signal.setitimer(
            signal.ITIMER_REAL, seconds, 0.1
        )  # repeatedly: a process may be forked while others are killed
        try:
            nonce, token = os.urandom(16), os.urandom(16)
            _send(inbox, (self.request["program"], nonce))
            if os.read(outbox, 16) != nonce:
                return False
            _send(inbox, (test, token))
            return os.read(outbox, 16) == token
        except OSError:
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.close(inbox)
            os.close(outbox)
            self._kill_runner()
            self._reap()

    def _kill_runner(self) -> None:
        with contextlib.suppress(OSError):
            if self.is_isolated:
                os.kill(-1, signal.SIGKILL)  # all of this namespace but the supervisor
            else:
                os.kill(self.runner, signal.SIGKILL)
                os.killpg(self.runner, signal.SIGKILL)

    def _reap(self) -> None:
        with contextlib.suppress(OSError):
            os.waitpid(self.runner, 0)
            while self.is_isolated:
                os.wait()

    def _become_runner(self, inbox: int, outbox: int) -> None:
        """Become the runner."""
        os.setsid()
        folder = f"{self.request['folder']}/{self.runs}"
        os.mkdir(folder)
        os.chdir(folder)
        os.dup2(2, 0)  # the launcher's standard error is /dev/null
        os.dup2(2, 1)
        os.set_inheritable(inbox, True)
        os.set_inheritable(outbox, True)
        _limit(self.request["timeout"], self.request["memory_limit"])
        others = 0  # of the processes that a limit counts are not the program's
        if os.getuid() == 0:
            _become(self.request["user"], folder)
        elif sys.platform == "linux":
            others = 2 if self.is_isolated else _tasks_of_user()  # a namespace counts launcher and supervisor only
        if sys.platform == "linux":
            _prctl(_PR_SET_NO_NEW_PRIVS, 1)
            _set_limit(resource.RLIMIT_NPROC, others + PROCESSES)
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder}
        python = [sys.executable, "-I", "-S", "-c", _RUNNER, str(inbox), str(outbox)]
        os.execve(sys.executable, python, environment)


def _become(user: int, folder: str) -> None:
    """Become a user that nobody else is, or "nobody" if the system has fewer users."""
    os.setgroups([])
    for uid in (user, 65534):
        with contextlib.suppress(OSError):
            os.chown(folder, uid, uid)
            os.setgid(uid)
            os.setuid(uid)
            return
    raise OSError("no user to run programs as")


def _limit(timeout: float, memory_limit: int) -> None:
    _set_limit(resource.RLIMIT_CPU, int(timeout) + 1)
    _set_limit(resource.RLIMIT_FSIZE, FILES // 4)
    _set_limit(resource.RLIMIT_NOFILE, 64)
    _set_limit(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(ValueError, OSError):  # macOS has the limit's name only
        _set_limit(resource.RLIMIT_AS, memory_limit)


def _set_limit(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _tasks_of_user() -> int:
    """Count the processes and threads of this user: without a namespace, the limit covers them all."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{process}/task"))
    return count


def _send(fd: int, message: Any) -> None:
    data = marshal.dumps(message)
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(fd, data) :]


def _now() -> float:
    from time import monotonic

    return monotonic()


if __name__ == "__main__":
    main()
