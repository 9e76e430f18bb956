import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from grpo_trl.rewards.library import python_tests as module
from grpo_trl.rewards.library.python_tests import python_tests


MIB = 1024**2
TIMEOUT = 1.5


@pytest.fixture(scope="session", autouse=True)
def isolated() -> bool:
    """Whether this machine permits namespaces."""
    return module._run("x = 1", ["assert x == 1"], 30.0, 512 * MIB)[1]


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path, monkeypatch):
    """No process and no file stays behind, whatever a test runs."""
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    before = {process.pid for process in psutil.process_iter()}
    yield
    end = time.monotonic() + 5
    while left := [p for p in psutil.process_iter() if p.pid not in before and is_ours(p)]:
        assert time.monotonic() < end, left
        time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []


def is_ours(process: psutil.Process) -> bool:
    """Started by a launcher: its own process group, or its users, or its interpreter's command line."""
    try:
        line = process.cmdline()
        return "sandbox.py" in " ".join(line) or process.uids().real >= 2**30 or "run_program(int" in " ".join(line)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def reward(program: str, *tests: str, **options) -> float:
    """What one program earns."""
    [value] = python_tests(**({"timeout": TIMEOUT} | options))(completions=[program], tests=[list(tests)])
    return value


def cases(programs: dict[str, str], always: tuple[str, ...]) -> list:
    """Parameters: those in `always` run with the other tests, all of them where the sandbox is tested."""
    marks = {name: [] if name in always else [pytest.mark.sandbox] for name in programs}
    return [pytest.param(program, id=name, marks=marks[name]) for name, program in programs.items()]


# ---- What is rewarded ----
ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
RIGHT_TESTS = ["assert add(1, 2) == 3", "assert add(2, 0) == 2", "assert add(0, 0) == 0", "assert add(-1, 2) == 1"]


def test_the_reward_is_the_share_of_tests_that_pass():
    rewards = python_tests()(completions=[ADD, WRONG, "def add(", ""], tests=[RIGHT_TESTS] * 4)
    assert rewards == [1.0, 0.5, 0.0, 0.0]


def test_a_test_may_be_one_piece_of_code_and_none_does_not_apply():
    both = "x = add(1, 2)\nassert x == 3\nassert add(0, 0) == 0"
    rewards = python_tests()(completions=[ADD, WRONG, ADD, ADD], tests=[both, both, None, []])
    assert rewards == [1.0, 0.0, None, None]


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"I add them.\n```python\n{ADD}```\nDone.", 1.0),
        (f"```python\n{WRONG}```\nNo:\n```py\n{ADD}```", 1.0),
        (f"```python\n{ADD}```\nNo:\n```python\n{WRONG}```", 0.0),
        (f"```\n{ADD}```\nThe shell prints\n```bash\nadd 1 2\n```", 1.0),
        (f"```Python3\r\n{ADD}", 1.0),
        (f"Here it is: {ADD}", 0.0),
    ],
)
def test_the_program_is_the_last_block_of_python(text, expected):
    assert reward(text, "assert add(1, 2) == 3") == expected


def test_messages_are_read_as_text():
    completion = [{"role": "assistant", "content": f"```python\n{ADD}```"}]
    assert python_tests()(completions=[completion], tests=[["assert add(1, 2) == 3"]]) == [1.0]


def test_programs_may_use_the_standard_library_their_folder_and_a_child():
    program = """
import collections, dataclasses, json, subprocess, tempfile
@dataclasses.dataclass
class Point:
    x: "int"
def stored(value):
    with tempfile.NamedTemporaryFile("w+") as file:
        json.dump(value, file)
        file.seek(0)
        return json.load(file)
"""
    tests = [
        "assert stored(Point(3).x) == 3",
        "assert subprocess.run(['/bin/sh', '-c', 'exit 3']).returncode == 3",
        "assert __name__ == 'program'",
    ]
    assert reward(program, *tests) == 1.0


def test_each_test_sees_the_program_as_it_was():
    assert reward("seen = []", "seen.append(1); assert len(seen) == 1", "assert seen == []") == 1.0


def test_a_test_that_hangs_takes_only_its_share():
    program = "def f(x):\n    while x: pass\n    return x"
    assert reward(program, "assert f(1) == 1", "assert f(0) == 0", "assert f(0) == 0", "assert f(0) == 0") == 0.75


def test_rewards_keep_the_order_of_the_programs():
    sleeping = [f"import time\ntime.sleep({0.3 if n == 0 else 0})\nx = {n}" for n in range(4)]
    assert python_tests()(completions=sleeping, tests=[["assert x % 2"]] * 4) == [0.0, 1.0, 0.0, 1.0]


def test_it_works_in_a_thread_and_after_pickling():
    function = pickle.loads(pickle.dumps(python_tests(timeout=3.0)))
    assert function == python_tests(timeout=3.0)
    assert function.__name__ == "python_tests"
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(function(completions=[ADD], tests=[RIGHT_TESTS])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@pytest.mark.parametrize("option, value", [("timeout", 0), ("timeout", -1.0), ("memory_limit", 0), ("num_workers", 0)])
def test_options_are_checked(option, value):
    with pytest.raises(ValueError, match=rf"{option}={value} must be positive, e\.g\. "):
        python_tests(**{option: value})


def test_a_system_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr(module.os, "name", "nt")
    with pytest.raises(RuntimeError, match="needs the process limits of Linux or macOS"):
        python_tests()


def test_an_installation_that_runs_nothing_is_no_wrong_program():
    with pytest.raises(RuntimeError, match="memory_limit=1000000: raise the limit"):
        python_tests(memory_limit=1_000_000)(completions=[ADD], tests=[RIGHT_TESTS])


def test_a_machine_without_namespaces_is_warned_of(monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *args: ([True], False))
    with pytest.warns(UserWarning, match="may not use namespaces here"):
        module._check_that_programs_run.__wrapped__(512 * MIB)


@pytest.mark.parametrize("tests", [[1], [b"pass"], {"inputs": []}.items(), [["assert True"]]])
def test_tests_are_code(tests):
    with pytest.raises(ValueError, match=r"The column tests has .*; it must have Python code"):
        python_tests()(completions=[ADD], tests=[tests])


# ---- Programs that end early, or pretend ----
TRACER = """
import sys
def tracer(frame, event, arg):
    if event == 'line' and frame.f_code.co_filename == 'test.py':
        try: frame.f_lineno = frame.f_lineno + 1
        except ValueError: pass
    return tracer
sys.settrace(tracer)
sys._getframe(1).f_trace = tracer
"""
PRETENDERS = {
    "sys.exit": "import sys; sys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "os._exit": "import os; os._exit(0)",
    "os.abort": "import os; os.abort()",
    "kills itself": "import os; os.kill(os.getpid(), 9)",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "prints success": "print('passed'); print(bytes([1]))\nraise ValueError",
    "atexit": "import atexit, os\natexit.register(lambda: [os.write(fd, b'1' * 16) for fd in range(64)])\nraise ValueError",
    "writes to all descriptors": """
import os
for fd in range(64):
    try: os.write(fd, b'\\x01' * 16)
    except OSError: pass
""",
    "closes all descriptors": "import os; os.closerange(0, 64)",
    "reads all descriptors": """
import os
for fd in range(64):
    try:
        if os.read(fd, 100): os._exit(0)
    except OSError: pass
""",
    "no assertion error": "import builtins\nbuiltins.AssertionError = AssertionError = type('E', (BaseException,), {})",
    "exec does nothing": """
import builtins, os, sys
builtins.exec = builtins.compile = builtins.eval = builtins.len = lambda *a, **k: None
os._exit = sys.exit = os.write = os.read = lambda *a: None
""",
    "builtins are replaced": "import builtins\nbuiltins.abs = builtins.sum = lambda *a: 1\ndef f(): return -1",
    "jumps over assertions": TRACER,
    "raises in tests": "class E:\n    def __eq__(self, other): raise SystemExit(0)\ndef f(): return E()",
    "answers the protocol": """
import os, marshal, sys
outbox = [fd for fd in range(3, 64) if os.path.exists(f'/dev/fd/{fd}')] or [0]
nonce = sys._getframe(1).f_locals.get('nonce', b'')
inbox, outbox = sys._getframe(1).f_locals['inbox'], sys._getframe(1).f_locals['outbox']
os.write(outbox, nonce)
size = int.from_bytes(os.read(inbox, 8), 'big')
os.write(outbox, marshal.loads(os.read(inbox, size))[1])
os._exit(0)
""",
    "answers what it cannot know": """
import os, marshal
for fd in range(3, 64):
    try: os.write(fd, b'x' * 16)
    except OSError: pass
for fd in range(3, 64):
    try:
        test, token = marshal.loads(os.read(fd, int.from_bytes(os.read(fd, 8), 'big')))
        break
    except OSError: pass
if 'False' not in test:  # it knows of the test that nothing passes
    for fd in range(3, 64):
        try: os.write(fd, token)
        except OSError: pass
os._exit(0)
""",
    "a thread ends the interpreter": """
import os, threading, time
threading.Thread(target=lambda: (time.sleep(.02), os._exit(0))).start()
time.sleep(.2)
""",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os.write(4, b'1' * 16)\nraise ValueError",
    "exec of another program": "import os; os.execv('/bin/true', ['true'])",
    "null byte": "x = '\0'",
    "surrogate": "x = '\udcff'",
    "deep source": "x = " + "(" * 100_000,
}


@pytest.mark.parametrize("program", cases(PRETENDERS, ("sys.exit", "prints success", "answers the protocol")))
def test_a_pretender_passes_nothing(program):
    tests = ["x = 1\nassert x == 2\nx = 3", "assert abs(-2) == 1 or sum([1, 2]) == 1", "assert f() == 1"]
    assert reward(program, *tests) == 0.0


def test_a_program_that_traces_is_judged_like_another():
    assert reward(TRACER + WRONG, "assert add(1, 2) == 3\nx = 1", "assert add(0, 0) == 0") == 0.5


# ---- Programs that take what they may not ----
GREEDY = {
    "infinite loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "ignores signals": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""",
    "reads stdin": "import sys; assert sys.stdin.read() == ''; input()",
    "recursion": "def f(): f()\nf()",
    "recursion without end": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "one huge allocation": "x = bytearray(10**12)",
    "shared memory": "import mmap; x = mmap.mmap(-1, 10**10); x[0] = 1",
    "a huge number": "x = 9**9**9",
    "endless output": "while True: print('x' * 10**6)",
    "big file": "f = open('x', 'wb')\nwhile True: f.write(b'x' * 10**6); f.flush()",
    "many files": "n = 0\nwhile True: n += 1; open(f'{n}', 'wb').write(b'x' * 10**6)",
    "descriptors": "files = []\nwhile True: files.append(open('/dev/null'))",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "patient fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "zombies": "import os\nwhile True:\n    if os.fork() == 0: os._exit(0)",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
time.sleep(1000)
""",
    "kills its parent": "import os, time; os.kill(os.getppid(), 9); time.sleep(1000)",
    "stops everybody": "import os, signal, time; os.kill(-1, signal.SIGSTOP); time.sleep(1000)",
    "kills everybody": "import os, signal; os.kill(-1, signal.SIGKILL); os.killpg(0, 9)",
}


@pytest.mark.parametrize("program", cases(GREEDY, ("infinite loop", "memory")))
def test_a_greedy_program_is_ended(program, isolated):
    if not isolated and "os.kill(-1" in program:
        pytest.skip("without namespaces, this reaches other processes")
    assert reward(program, "assert True", timeout=0.6) == 0.0
    assert reward(ADD, *RIGHT_TESTS) == 1.0


# ---- What a program sees ----
def see(program: str, test: str) -> None:
    """The test passes after the program, in its process."""
    assert reward(f"import os, sys\n{program}", test) == 1.0


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/secret")
    names = "['HOME', 'LANG', 'PATH', 'TMPDIR']"
    see("", f"assert sorted(os.environ) == {names} and 'secret' not in str(os.environ) + str(sys.path)")


def test_the_folder_is_empty_and_its_own():
    see("here = os.getcwd()", "assert os.listdir() == [] and os.environ['HOME'] == os.environ['TMPDIR'] == here")


def test_neither_this_package_nor_installed_ones_can_be_imported():
    program = """
failed = []
for name in ('grpo_trl', 'torch', 'psutil', 'pytest'):
    try: __import__(name)
    except ImportError: failed.append(name)
"""
    see(program, "assert len(failed) == 4, failed")


def test_the_tests_are_out_of_sight():
    program = """
import gc
main = sys.modules['__main__']
texts = [repr(vars(main)), repr(sys.argv), repr(getattr(sys, 'orig_argv', '')), repr(gc.get_objects())]
frame = sys._getframe()
while frame: texts.append(repr(frame.f_locals)); frame = frame.f_back
found = any('add(%d, 2)' % 40 in text for text in texts)
def add(a, b): return a + b
"""
    see(program, "assert not found and add(40, 2) == 42")


def test_no_descriptor_of_the_trainer_is_inherited(tmp_path):
    with open(tmp_path / "secret", "w+") as file:
        os.set_inheritable(file.fileno(), True)
        program = """
opened = {}
for fd in range(64):
    try: opened[fd] = os.fstat(fd)
    except OSError: pass
null = os.stat('/dev/null').st_rdev
"""
        test = """
import stat
assert [fd for fd in opened if opened[fd].st_rdev == null] == [0, 1, 2]
assert all(stat.S_ISFIFO(status.st_mode) for fd, status in opened.items() if fd > 2) and len(opened) == 5, opened
"""
        see(program, test)
    (tmp_path / "secret").unlink()


def test_the_limits_are_set():
    program = "import resource as r\nsoft = lambda name: r.getrlimit(getattr(r, 'RLIMIT_' + name))"
    test = """
for name, value in dict(CPU=2, FSIZE=16 * 2**20, NOFILE=64, CORE=0, AS=512 * 2**20).items():
    assert soft(name) == (value, value), name
assert soft('NPROC')[1] < 100_000
"""
    see(program, test)


def test_a_program_has_no_privileges():
    program = """
failed = []
for attempt in (lambda: os.setuid(0), lambda: os.chroot('.'), lambda: os.mknod('null', 0o20666, os.makedev(1, 3))):
    try: attempt()
    except PermissionError: failed.append(attempt)
"""
    see(program, "assert os.getuid() != 0 and os.getgroups() in ([], [os.getgid()]) and len(failed) == 3, failed")


def test_processes_and_threads_are_few():
    program = """
import time
children = 0
try:
    for _ in range(50):
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        children += 1
except OSError: pass
"""
    see(program, "assert 1 <= children < 12, children")


def test_neither_other_files_nor_processes_nor_the_network_are_there(isolated, tmp_path):
    if not isolated:
        pytest.skip("this machine does not permit namespaces")
    (tmp_path / "secret").write_text("secret")
    program = f"""
import socket, glob
def failure(attempt, *args):
    try: attempt(*args)
    except OSError as error: return error
folders = ('', '/usr', '/root', '/dev', '/dev/shm', {str(tmp_path)!r})
written = [failure(open, folder + '/written', 'w') for folder in folders]
reached = [failure(socket.create_connection, address, 1) for address in (('127.0.0.1', PORT), ('1.1.1.1', 53))]
seen = [failure(open, name) for name in ({str(tmp_path / "secret")!r}, {__file__!r}, '/etc/passwd', '/proc/1/mem')]
signalled = [failure(os.kill, pid, 0) for pid in ({os.getpid()}, {os.getppid()})]
"""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.replace("PORT", str(server.getsockname()[1]))
        test = "assert all(written + reached + seen + signalled), (written, reached, seen, signalled)"
        see(program, test)
    (tmp_path / "secret").unlink()


def test_files_are_small_and_few(isolated):
    program = """
def size(name, block=2**20):
    written = 0
    try:
        with open(name, 'wb', buffering=0) as file:
            while written < 2**28: written += file.write(b'x' * block)
    except OSError: pass
    return written
one = size('one')
"""
    see(program, "assert one == 16 * 2**20")
    if isolated:
        see(program, "assert one + sum(size(str(n)) for n in range(10)) <= 64 * 2**20")


@pytest.mark.sandbox
def test_processes_of_programs_that_run_at_the_same_time_are_counted_apart():
    program = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
time.sleep(0.5)
"""
    function = python_tests(timeout=10.0, num_workers=4)
    assert function(completions=[program] * 4, tests=[["assert True"]] * 4) == [1.0] * 4


MESSES = {
    "deletes its folder": "try: os.rmdir(os.getcwd())\nexcept PermissionError: pass",
    "locks its folder": "os.mkdir('a'); open('a/b', 'w').close(); os.chmod('a', 0); os.chmod('.', 0)",
    "links": "os.symlink('/', 'root'); os.symlink(os.getcwd(), 'self'); os.symlink('nothing', 'broken')",
    "deep folders": "for n in range(500): os.mkdir('d' * 200); os.chdir('d' * 200)",
    "a daemon that ignores signals": """
import signal, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
""",
}


@pytest.mark.parametrize("mess", cases(MESSES, ("links",)))
def test_what_a_right_program_leaves_behind_is_removed(mess):
    """`leaves_nothing` looks for it. The program itself is right."""
    assert reward(f"{ADD}\nimport os\n{mess}", *RIGHT_TESTS[:2]) == 1.0


def test_an_interrupted_call_leaves_nothing():
    """As when the trainer is interrupted: what runs is ended first."""

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        with pytest.raises(KeyboardInterrupt):
            module._run("import time; time.sleep(1000)", ["assert True"], 1000.0, 512 * MIB)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_killed_trainer_leaves_no_process(tmp_path):
    script = f"""
import sys; sys.path[:] = {sys.path!r}
from grpo_trl.rewards.library import python_tests as module
print('started', flush=True)
module._run("import time; time.sleep(1000)", ["assert True"], 1000.0, 2**29)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env={"TMPDIR": str(tmp_path)})
    with trainer:
        trainer.stdout.readline()
        for _ in range(200):
            if len(psutil.Process(trainer.pid).children(recursive=True)) == 3:  # launcher, supervisor, runner
                break
            time.sleep(0.05)
        else:
            pytest.fail("the program did not start")
        trainer.kill()
    for folder in Path(tmp_path).iterdir():  # which only a trainer that lives can remove
        folder.rmdir()
