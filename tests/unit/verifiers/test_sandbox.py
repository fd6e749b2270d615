"""Code that attacks: at every level that works here, and the fences of the kernel without the rules of Python."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from megatron_opd.config import VerifierConfig
from megatron_opd.errors import ProcessError
from megatron_opd.records import Outcome
from megatron_opd.verifiers import sandbox
from megatron_opd.verifiers.base import Verdict
from megatron_opd.verifiers.code import CodeVerifier
from megatron_opd.verifiers.sandbox import levels, process

from runs import command_of

FORMS = {
    "calls": {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]},
    "assertions": {"test": "def check(f):\n    assert f(1) == 2\n    assert f(2) == 3", "entry_point": "f"},
    "bare": {"test_list": ["assert all(f(x) == x + 1 for x in range(1, 5))"]},
    "tolerance": {"test": "assert abs(f(1) - 2) < 1e-6"},
    "loop": {"test": "for got, x in zip(map(f, [1, 2]), [1, 2]):\n    assert got == x + 1"},
    "program": {"inputs": ["1", "2"], "outputs": ["2", "3"]},
}
# What a response may try in order to pass without the right values. BODY is what f does; the rest runs at loading.
CHEATS = {
    "exit": "import sys\ndef f(x): sys.exit(0)",
    "exit at loading": "import sys\nsys.exit(0)",
    "hard exit": "import os\ndef f(x): os._exit(0)",
    "print": "print(2)\ndef f(x): print(2)",
    "stop iteration": "def f(x): raise StopIteration",
    "generator exit": "def f(x): raise GeneratorExit",
    "keyboard": "def f(x): raise KeyboardInterrupt",
    "equal to all": """
        class Same(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = int.__hash__
        def f(x): return Same(41)""",
    "equal object": "class Same:\n    def __eq__(self, other): return True\ndef f(x): return Same()",
    "equal class": """
        class Meta(type):
            def __eq__(cls, other): return True
            __hash__ = type.__hash__
        class f(metaclass=Meta):
            def __init__(self, x): pass
            def __eq__(self, other): return True""",
    "patched builtins": """
        import builtins
        builtins.all = lambda xs: True
        builtins.map = lambda f, xs: xs
        builtins.AssertionError = type("Quiet", (Exception,), {})
        builtins.zip = lambda *xs: ()
        builtins.range = lambda *xs: ()
        def f(x): return 41""",
    "names of builtins": "def abs(x): return 0\ndef zip(*xs): return ()\nmap = zip\ndef f(x): return 41",
    "own check": "def check(f): pass\ndef candidate(x): return x + 1\ndef f(x): return 41",
    "patched json": 'import json\njson.dumps = lambda row: \'["passed", ""]\'\ndef f(x): return 41',
    "patched writer": """
        import sys
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
                if hasattr(value, "write"):
                    try: value.write('["passed", ""]' + chr(10)); value.flush()
                    except Exception: pass
            frame = frame.f_back
        def f(x): return 41""",
    "all descriptors": """
        import os
        def f(x):
            for number in range(64):
                for row in ('["passed", ""]', '["value", 2]', '["out", "2", ""]'):
                    try: os.write(number, row.encode() + bytes([10]))
                    except OSError: pass
            return 41
        f(1)""",
    "exit handler": """
        import atexit, os
        atexit.register(lambda: print(2))
        atexit.register(lambda: os._exit(0))
        def f(x): return 41""",
    "false rows": """
        import os
        def f(x):
            for number in range(3, 9):
                try: os.write(number, b"{[" + bytes([10]))
                except OSError: pass
            return 41""",
    "wrong code": "def f(x): return x + 1\nimport sys\nf.__code__ = (lambda x: 41).__code__",
    "mutated argument": "def f(x):\n    x = [2]\n    return x",
}
# What a response may try against the machine; all end as failures, and nothing is left of them.
BOMBS = {
    "forks": """
        import os, time
        def f(x):
            for _ in range(100):  # a defect of the sandbox must not take the tests' machine down
                if os.fork() == 0: time.sleep(60)
            return x + 1""",
    "output": "def f(x):\n    while True: print('x' * 10000, flush=True)",
    "memory": "def f(x):\n    y = [0] * 10**7\n    while True: y = y + y",
    "endless": "def f(x):\n    while True: pass",
    "sleep": "import time\ndef f(x): time.sleep(60)",
    "threads": """
        import threading, time
        def f(x):
            for _ in range(1000): threading.Thread(target=time.sleep, args=(60,)).start()
            return x + 1""",
    "big answer": "def f(x): return 'x' * 10**8",
    "deep answer": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "huge number": "def f(x): return 10**(10**6)",
    "crash": "def f(x):\n    import sys\n    sys.setrecursionlimit(10**9)\n    return f(x)",
    "signals": "import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    os.kill(-1, 9)",
}
WORKING = [probe.level for probe in sandbox.probes() if probe.works]
FENCED = [level for level in WORKING if level != "limits"]


def verdict(source: str, reference: dict, level: str = "best", limit: float = 8.0) -> Verdict:
    verifier = CodeVerifier(VerifierConfig(timeout_s=limit, sandbox=level))
    return verifier.verify("", f"```python\n{textwrap.dedent(source)}\n```", json.dumps(reference))


@pytest.mark.parametrize("level", WORKING)
@pytest.mark.parametrize("form", FORMS)
def test_the_right_answer_passes(level, form):
    source = "print(int(input()) + 1)" if form == "program" else "def f(x): return x + 1"
    assert verdict(source, FORMS[form], level).outcome is Outcome.CORRECT


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(cheat):
    for form, reference in FORMS.items():
        assert verdict(CHEATS[cheat], reference).outcome is Outcome.INCORRECT, form


def test_a_process_that_ended_has_failed_even_if_the_test_forgives_everything():
    forgiving = {"test": "try:\n    f(1)\nexcept BaseException:\n    pass"}
    assert verdict("def f(x): raise KeyError", forgiving).outcome is Outcome.CORRECT
    found = verdict("import os\ndef f(x): os._exit(0)", forgiving)
    assert found == Verdict(Outcome.INCORRECT, "a test failed; exited with code 0 before it answered")


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb):
    for level in WORKING:
        found = verdict(BOMBS[bomb], FORMS["assertions"], level, limit=1.5)
        assert found.outcome is Outcome.INCORRECT, (level, found)
    assert not any("forker.py" in command_of(child) for child in psutil.Process().children(recursive=True))


@pytest.mark.parametrize("level", WORKING)
def test_the_response_does_not_hold_the_tests(level):
    """Its objects, its frames and its memory do not contain a text that only the tests contain."""
    search = """
        import gc, re, sys
        def f():
            word, seen = re.compile(b"SECRET_[W]ORD"), []  # does not contain itself
            for item in gc.get_objects():
                if isinstance(item, dict): seen += [v for v in list(item.values()) if isinstance(v, (str, bytes))]
            if any(word.search(str(item).encode()) for item in seen): return "objects"
            try:
                memory = open("/proc/self/mem", "rb", 0)
                for line in open("/proc/self/maps"):
                    start, end = (int(part, 16) for part in line.split()[0].split("-"))
                    memory.seek(start)
                    if word.search(memory.read(end - start)): return "memory"
            except OSError: pass
            return "nothing"
    """
    found = verdict(search, {"test": "# SECRET_WORD\nfound = f()\nassert found == 'nothing', found"}, level)
    assert found == Verdict(Outcome.CORRECT, "the tests passed")


@pytest.mark.parametrize("level", WORKING)
def test_the_surroundings(level, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    look = """
        import os
        def opened(d):
            try: return bool(os.fstat(d))
            except OSError: return False
        def f():
            open("mine", "w").write("x")
            return [sorted(os.environ), os.listdir("."), sum(map(opened, range(3, 60)))]
    """
    expected = [["HOME", "LC_CTYPE", "OPENBLAS_NUM_THREADS", "PATH", "TMPDIR"], ["mine"], 2]  # 2: its own channel
    found = verdict(look, {"fn_name": "f", "inputs": [[]], "outputs": [[expected]]}, level)
    os.close(inherited)
    assert found == Verdict(Outcome.CORRECT, "1 test passed")


@pytest.mark.parametrize("level", FENCED)
def test_files_of_the_user_are_out_of_sight(level, tmp_path):
    secret = tmp_path / "answers.txt"
    secret.write_text("42")
    os.chmod(tmp_path, 0o777)
    paths = [str(secret), os.path.expanduser("~/.bashrc"), str(Path(__file__)), "/proc/1/environ", "/etc/passwd"]
    look = f"""
        import os
        def tried(action):
            try: action(); return "done"
            except OSError as error: return type(error).__name__
        def f(what):
            if what == "read": return [tried(lambda: open(path).read()) for path in {paths}]
            places = ["/x", "/usr/x", "/tmp/../x", "{tmp_path}/x", "/dev/x", os.__file__, os.__file__ + "/../x"]
            return sorted(set(tried(lambda: open(place, "a").write("x")) for place in places) - {{"PermissionError"}})
    """
    reading = ["FileNotFoundError"] * len(paths)
    reference = {"test": f"assert f('read') == {reading}, f('read')\nassert 'done' not in f('write'), f('write')"}
    assert verdict(look, reference, level) == Verdict(Outcome.CORRECT, "the tests passed")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("level", FENCED)
def test_scratch_space_has_an_end(level):
    fill = """
        def f():
            try:
                for number in range(10**4):
                    with open(f"file{number}", "wb") as file: file.write(bytes(4000000))
            except OSError as error:
                return [number, error.strerror]
    """
    reference = {"fn_name": "f", "inputs": [[]], "outputs": [[[16, "No space left on device"]]]}
    assert verdict(fill, reference, level).outcome is Outcome.CORRECT


UNRULED = """
import os, signal, socket, sys, threading, time
sys.path.insert(0, sys.argv[1])
import confine
confine.enter_namespaces(sys.argv[2], sys.argv[4:], 1 << 20)
confine.set_limits(5, 1 << 29, 1 << 20)
confine.limit_tasks(8)
def tried(action):
    try: return str(action())
    except OSError: return "refused"
def forks():
    count = 0
    try:
        while count < 50:  # a defect must not take the machine down
            if os.fork() == 0: time.sleep(60)
            count += 1
    except OSError: pass
    return count
connect = lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), timeout=2)
print([os.getpid(), tried(connect), tried(lambda: os.kill(-1, 9))])
print([tried(lambda: os.setuid(0)), tried(lambda: open("/proc/self/environ")), tried(lambda: os.mkdir("/x"))])
print(tried(lambda: open(sys.argv[-1] + "/x", "w")))
print([tried(lambda: confine.call("mount", b"x", b"/tmp", b"tmpfs", 0, b"")), tried(lambda: os.chroot("/tmp"))])
sys.stdout.flush()
print(forks() < 8, flush=True)
os._exit(7)
"""


@pytest.mark.skipif("namespaces" not in WORKING, reason="this machine allows no namespaces")
def test_the_kernel_holds_without_the_rules_of_python(tmp_path):
    writable, root = tmp_path / "writable", tmp_path / "root"
    for folder in (tmp_path, writable, root):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        python = os.path.realpath(sys.executable)
        inside = str(process.INSIDE)
        command = [python, "-I", "-S", "-c", UNRULED, inside, str(root), port, *process.visible_paths(), str(writable)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert done.stdout.splitlines() == [
        "[1, 'refused', 'refused']",
        "['refused', 'refused', 'refused']",
        "refused",
        "['refused', 'refused']",
        "True",
    ], done.stderr
    assert done.returncode == 7


@pytest.mark.parametrize("level", WORKING)
def test_nothing_is_left_behind(level, monkeypatch, tmp_path):
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    source = "def f(x):\n    open('a', 'w').write('x')\n    while True: pass"
    assert verdict(source, FORMS["calls"], level, limit=0.5).outcome is Outcome.INCORRECT
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_does_not_start_is_unknown(monkeypatch):
    verifier = CodeVerifier(VerifierConfig())
    monkeypatch.setattr(process, "INSIDE", Path("/nowhere"))
    found = verifier.verify("", "```\nx\n```", json.dumps(FORMS["calls"]))
    assert found == Verdict(Outcome.UNKNOWN, "The sandbox cannot run: the process that starts it has died")
    monkeypatch.setattr(process.sys, "executable", "/nowhere/python")
    found = verifier.verify("", "```\nx\n```", json.dumps(FORMS["calls"]))
    assert found.reason.startswith("The sandbox cannot run: [Errno 2]")


def test_a_level_that_does_not_work_is_not_replaced(monkeypatch):
    monkeypatch.setattr(levels, "probe", lambda level: sandbox.Probe(level, level == "limits", "not here"))
    assert levels.choose("best") == "limits"
    with pytest.raises(ProcessError) as caught:
        levels.choose("namespaces")
    assert caught.value.got == "namespaces: not here"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_becomes_a_user_who_owns_nothing(tmp_path):
    """Where others can read Python; a Python in root's home folder cannot be used by anybody else."""
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("no Python of the system")
    code = "import os, sys\nsys.path.insert(0, sys.argv[1])\nimport confine\nconfine.leave_root()\n"
    code += "own = confine.FIRST_USER + os.getpid()\n"
    code += "print(os.getuid() in (own, confine.NOBODY), os.getuid() == os.getgid(), os.getgroups())"
    command = [str(python), "-I", "-S", "-c", code, str(process.INSIDE)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={}, check=True)
    assert done.stdout == "True True []\n"


def test_limits_need_no_right_at_all():
    """A root who can neither leave to mount nor become another user, as in a container that was given nothing."""
    shut = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all "
    look = "from megatron_opd.verifiers.sandbox import probes; print([(p.level, p.works) for p in probes()][1:])"
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", f"{shut} {sys.executable} -c '{look}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0 and "unshare" in done.stderr and "Traceback" not in done.stderr:
        pytest.skip("no user namespaces to be shut in")
    assert done.stdout == "[('namespaces', False), ('limits', True)]\n", done.stderr
