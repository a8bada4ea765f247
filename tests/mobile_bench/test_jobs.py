"""The child-process protocol, with real children."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mobile_bench.errors import InputError, JobFailed, ModelRefused
from mobile_bench.jobs import run_job

CHILD = """
import os, signal, sys, time
print("5")  # a library that greets on import
print("hello")
from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.jobs import serve

def main(job, emit):
    print("noise on standard output")
    os.write(1, b"native noise\\n")
    emit("progress", done=1, pid=os.getpid())
    do = job["do"]
    if do == "answer":
        return {"twice": 2 * job["value"], "argv": sys.argv[2:]}
    if do == "refuse":
        raise ModelRefused("The child refuses", received=7, allowed="8", next_step="Try 8")
    if do == "bug":
        raise ZeroDivisionError("seven by zero")
    if do == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if do == "quit":
        sys.stderr.write("I0000 port.cc:153] oneDNN is on\\nlast words\\n"); sys.stderr.flush(); os._exit(3)
    if do == "sleep":
        time.sleep(600)
    if do == "eat":
        food = bytearray(600 << 20)
        for i in range(0, len(food), 4096): food[i] = 1
        time.sleep(600)

serve(main)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "job_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    folder = tmp_path / "job"

    def run(do, **options):
        value = options.pop("value", 21)
        return run_job("job_child", {"do": do, "value": value}, folder, **options)

    run.folder = folder
    return run


def gone(pid):
    """Whether a process has ended (waits for it a while)."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_result_comes_back_and_noise_goes_to_the_log(child):
    seen = []
    assert child("answer", on_progress=seen.append)["twice"] == 42
    assert [m["kind"] for m in seen] == ["progress"] and seen[0]["done"] == 1
    log = (child.folder / "log.txt").read_text()
    assert "noise on standard output" in log and "native noise" in log


def test_a_problem_comes_back_as_itself(child):
    with pytest.raises(ModelRefused) as caught:
        child("refuse")
    found = caught.value
    assert (found.what, found.received, found.allowed, found.next_step) == ("The child refuses", "7", "8", "Try 8")


def test_a_bug_is_one_sentence_here_and_a_traceback_in_the_log(child):
    with pytest.raises(JobFailed, match=r"ZeroDivisionError.*seven by zero") as caught:
        child("bug")
    assert "Traceback" not in str(caught.value)
    assert "Traceback" in (child.folder / "log.txt").read_text()


def test_a_crash_is_named_by_its_signal(child):
    with pytest.raises(JobFailed, match="SIGSEGV"):
        child("crash")


def test_an_early_end_shows_the_last_words(child):
    with pytest.raises(JobFailed, match=r"exit code 3 and no result.*last words") as caught:
        child("quit")
    assert "oneDNN" not in str(caught.value)


def test_a_time_limit(child):
    seen = []
    with pytest.raises(JobFailed, match="longer than its limit of 3 s"):
        child("sleep", timeout_s=3, on_progress=seen.append)
    assert gone(seen[0]["pid"])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory limits need /proc")
def test_a_memory_limit(child):
    with pytest.raises(JobFailed, match="more memory than its limit of 300 MiB"):
        child("eat", memory_bytes=300 << 20)


def test_an_interrupt_ends_the_child(child):
    seen = []

    def interrupt(message):
        seen.append(message["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child("sleep", on_progress=interrupt)
    assert gone(seen[0])


def test_the_child_ends_when_its_parent_is_killed(child, tmp_path, run_python):
    note = tmp_path / "pid"
    code = (
        "import pathlib, sys; from mobile_bench.jobs import run_job\n"
        "say = lambda m: pathlib.Path(sys.argv[1]).write_text(str(m['pid']))\n"
        "run_job('job_child', {'do': 'sleep', 'value': 0}, pathlib.Path(sys.argv[2]), on_progress=say)"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    parent = subprocess.Popen([sys.executable, "-c", code, str(note), str(tmp_path / "job")], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
        assert gone(int(note.read_text()))
    finally:
        parent.kill()
        parent.wait()


def test_the_current_folder_is_not_searched_for_libraries(child, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert child("answer")["twice"] == 42


def test_a_folder_that_cannot_be_written(child):
    child.folder.write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        child("answer")
