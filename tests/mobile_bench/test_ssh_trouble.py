"""What goes wrong when measuring by SSH, against a real sshd on loopback."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mobile_bench.errors import InputError, JobFailed, ModelRefused, TransportError
from mobile_bench.measure import measure
from mobile_bench.records import Connection
from mobile_bench.transports import transport_for
from mobile_bench.transports.local import Local

from .ssh_board import (
    JOB,
    LONG,
    SPEC,
    TARGET,
    emptied,
    free_port,
    needs_sshd,
    new_key,
    over,
    serving,
    sessions_of,
    until,
    without_runtime,
    worker_in,
    wrapper,
)

pytestmark = needs_sshd


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def refused_entry(connection, error=TransportError):
    with pytest.raises(error) as caught, over(connection):
        pass
    return str(caught.value)


# --- files and jobs that fail


@pytest.mark.parametrize(("name", "word"), [("text", "not a TensorFlow"), ("truncated", "truncated")])
def test_a_refusal_comes_back_as_itself_with_the_name_from_here(board, tiny, name, word):
    with over(board) as transport:
        with pytest.raises(ModelRefused, match=word) as caught:
            transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path(name)})
        assert str(tiny.path(name).resolve()) in caught.value.received and board.folder not in str(caught.value)
        transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("float32")})
    assert emptied(board)


def test_local_refuses_in_the_same_words(board, tiny):
    said = []
    for transport in (Local(), over(board)):
        with transport, pytest.raises(ModelRefused) as caught:
            transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("text")})
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_crash_of_the_runtime_is_named(board, tiny):
    found = measure(tiny.path("self_calling"), TARGET, connection=board)
    assert found.status == "failed" and "SIG" in found.reason and "Traceback" not in found.reason
    assert emptied(board)


def test_a_killed_worker_is_a_failed_job(board, tiny):
    def kill(message):
        if message.get("stage") == "timing":
            os.kill(worker_in(board), signal.SIGKILL)

    with over(board) as transport:
        with pytest.raises(JobFailed, match="SIGKILL"):
            transport.run("mobile_bench.worker", LONG, files={"tflite": tiny.path("float32")}, on_progress=kill)
        transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("float32")})
    assert emptied(board)


def test_a_time_limit_ends_the_worker_there(board, tiny):
    pids = []
    with over(board) as transport:
        with pytest.raises(JobFailed, match="longer than its limit of 3 s"):
            transport.run(
                "mobile_bench.worker", LONG, files={"tflite": tiny.path("float32")}, timeout_s=3,
                on_progress=lambda m: pids.append(worker_in(board)) if m.get("stage") == "load" else None,
            )  # fmt: skip
        assert pids and until(lambda: not running(pids[0]))
        with pytest.raises(JobFailed, match=r"limit of 0\.01 s"):
            transport.run("mobile_bench.worker", LONG, files={"tflite": tiny.path("float32")}, timeout_s=0.01)
    assert emptied(board)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_interrupt_cleans_up(board, tiny, error):
    pids = []

    def interrupt(message):
        pids.append(worker_in(board))
        raise error

    with pytest.raises(error), over(board) as transport:
        transport.run("mobile_bench.worker", LONG, files={"tflite": tiny.path("float32")}, on_progress=interrupt)
    assert emptied(board) and until(lambda: not running(pids[0]))


def test_nothing_stays_when_this_process_is_killed(board, tiny):
    code = (
        "import os, signal; from mobile_bench.records import Connection\n"
        "from tests.mobile_bench import ssh_board as t\n"
        "stop = lambda m: os.kill(os.getpid(), signal.SIGKILL) if m.get('stage') == 'timing' else None\n"
        f"with t.over({board!r}) as transport:\n"
        f"    transport.run('mobile_bench.worker', t.LONG, files={{'tflite': {str(tiny.path('float32'))!r}}}, "
        "on_progress=stop)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert emptied(board)


def test_an_output_that_is_not_written(board, tiny, tmp_path):
    files, out = {"tflite": tiny.path("float32")}, {"out": tmp_path / "out.npy"}
    with pytest.raises(JobFailed, match=r"did not write out\.npy"), over(board) as transport:
        transport.run("mobile_bench.worker", JOB, files=files, outputs=out)
    assert emptied(board) and not out["out"].exists()


# --- connections that fail


def test_a_wrong_key(board, tmp_path):
    new_key(tmp_path / "other")
    assert "does not let us in" in refused_entry(replace(board, identity_file=str(tmp_path / "other")))
    assert "no such key file" in refused_entry(replace(board, identity_file=str(tmp_path / "none")))
    said = refused_entry(replace(board, identity_file=str(tmp_path / "other.pub")))
    assert "holds no private key" in said and "without .pub" in said
    (tmp_path / "torn").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nnot a key")
    said = refused_entry(replace(board, identity_file=str(tmp_path / "torn")))
    assert "127.0.0.1" in said and f"-i {tmp_path}/torn" in said
    assert emptied(board)


def test_an_unknown_host(board, tmp_path):
    said = refused_entry(replace(board, known_hosts=str(tmp_path / "none yet")))
    assert "not known" in said and "SHA256:" in said and f"ssh -p {board.port} -i" in said
    assert "not known" in refused_entry(replace(board, known_hosts=""))
    assert not (tmp_path / "none yet").exists() and not (Path.home() / ".ssh").exists()


def test_a_changed_host_key(board, tmp_path):
    key = new_key(tmp_path / "other")
    (tmp_path / "known").write_text(f"[127.0.0.1]:{board.port} {key}")
    said = refused_entry(replace(board, known_hosts=str(tmp_path / "known")))
    assert "has changed" in said and said.count("SHA256:") == 2 and f"ssh-keygen -R '[127.0.0.1]:{board.port}'" in said


def test_nobody_there(board, tiny):
    away = replace(board, port=free_port())
    assert "cannot be reached" in refused_entry(away)
    assert "cannot be reached" in refused_entry(replace(board, address="me@no-such-host.invalid"))
    found = measure(tiny.path("float32"), TARGET, connection=away)
    assert found.status == "failed" and "cannot be reached" in found.reason and "Errno None" not in found.reason


def test_something_else_answers(board, monkeypatch):
    monkeypatch.setattr("mobile_bench.transports.ssh_login.CONNECT_S", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "cannot be reached" in refused_entry(replace(board, port=silent.getsockname()[1]))


def test_a_connection_lost_half_way(board, sshd, tiny):
    pids = []

    def cut(message):
        if message.get("stage") == "timing":
            pids.append(worker_in(board))
            for pid in sessions_of(sshd.pid):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(TransportError, match="was lost"), over(board) as transport:
        transport.run("mobile_bench.worker", LONG, files={"tflite": tiny.path("float32")}, on_progress=cut)
    assert until(lambda: not running(pids[0])) and emptied(board)


def test_a_connection_lost_between_jobs(board, sshd, tiny):
    with pytest.raises(TransportError, match="was lost"), over(board) as transport:
        transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("float32")})
        for pid in sessions_of(sshd.pid):
            os.kill(pid, signal.SIGKILL)
        transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("int8")})
    assert emptied(board)


@pytest.mark.parametrize(
    "address", ["me;id@127.0.0.1", "$(id)@127.0.0.1", "me@127.0.0.1 -x", "me@-oProxyCommand=id", "@"]
)
def test_addresses_with_shell_characters_are_refused(address):
    with pytest.raises(InputError, match="address cannot be used"):
        over(Connection(address))


def test_a_connection_and_the_library_are_needed(board, monkeypatch):
    with pytest.raises(InputError, match="needs an address"):
        transport_for(TARGET)
    monkeypatch.delitem(sys.modules, "mobile_bench.transports.ssh", raising=False)
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(InputError, match=r"tfopt\[remote\]"):
        over(board)


# --- boards that lack something


@pytest.fixture
def small(board):
    """small(size): the board's work folder has only so much room."""
    mounted = []

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "small", board.folder]
        if os.geteuid() != 0 or subprocess.run(command).returncode:
            pytest.skip("needs the right to mount a small tmpfs")
        mounted.append(board.folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", ["64k", "1m"])
def test_no_space_there(board, tiny, tmp_path, small, size):
    """Room for not even the package; room for it, but not for the model."""
    small(size)
    big = tmp_path / "big.tflite"
    big.write_bytes(tiny.path("float32").read_bytes() + bytes(2 << 20))
    with pytest.raises(TransportError, match="cannot be written") as caught, over(board) as transport:
        transport.run("mobile_bench.worker", JOB, files={"tflite": big})
    assert board.folder in str(caught.value)
    assert emptied(board)


def test_no_space_for_what_the_job_writes(board, tiny, tmp_path, small):
    small("4m")
    job = {"spec": SPEC.to_dict(), "workers": 1, "runtime": "auto"}
    files, out = {"tflite": tiny.path("float32"), "sample": tiny.sample}, {"out": tmp_path / "out.npy"}
    with over(board) as transport:
        transport.run("mobile_bench.evaluate", job, files=files, outputs=out)
        out["out"].unlink()
        with pytest.raises(TransportError, match="cannot be written") as caught:
            with contextlib.suppress(OSError), open(Path(board.folder) / "full", "ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            os.truncate(file.name, os.path.getsize(file.name) - 8192)  # room for the job itself
            transport.run("mobile_bench.evaluate", job, files=files, outputs=out)
    assert board.folder in str(caught.value) and not (tmp_path / "out.npy").exists()


def test_no_such_folder_there(board):
    assert "work folder" in refused_entry(replace(board, folder=board.folder + "/none"))


def test_no_sftp_there(board, tmp_path):
    (tmp_path / "sshd").mkdir()
    with serving(tmp_path / "sshd", sftp="/bin/false") as other:
        keys = {"identity_file": str(other.folder / "key"), "known_hosts": str(other.folder / "known_hosts")}
        assert "does not offer SFTP" in refused_entry(replace(board, port=other.port, **keys))
    assert emptied(board)


def test_no_python_there(board, tmp_path):
    assert "cannot be started" in refused_entry(replace(board, python="/no/such python"))
    assert "cannot be started" in refused_entry(replace(board, python="no-such-python; true"))
    assert emptied(board)


def test_a_python_that_is_too_old(board, tmp_path):
    old = wrapper(tmp_path / "old python", "echo Python 3.9")
    said = refused_entry(replace(board, python=old))
    assert "too old" in said and "Python 3.9" in said and "3.11" in said and emptied(board)


def test_what_the_board_lacks_is_installed_or_named(board, tiny):
    job = {**JOB, "requires": {"no_such_module_there": "a-project-that-is-not-there==0"}}
    with over(board) as transport, pytest.raises(TransportError, match="lacks the module no_such_module_there"):
        transport.run("mobile_bench.worker", job, files={"tflite": tiny.path("float32")})


@pytest.mark.parametrize("lacking", ["pip", "network"])
def test_no_runtime_and_no_way_to_install_one(board, tiny, tmp_path, lacking):
    real = shlex.quote(sys.executable)
    offline = f'PIP_INDEX_URL=http://127.0.0.1:{free_port()}/ PIP_RETRIES=0 exec {real} "$@"'
    pip = f'case "$*" in *"-m pip"*) {offline};; esac\n' if lacking == "network" else ""
    bare = wrapper(tmp_path / "bare", f'{pip}exec {real} -S "$@"')
    messages = []
    with pytest.raises(TransportError, match="none can be installed") as caught, over(
        replace(board, python=bare)
    ) as transport:  # fmt: skip
        transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("int8")}, on_progress=messages.append)
    said = str(caught.value)
    assert ("No module named pip" if lacking == "pip" else "No matching distribution") in said
    assert "pip install ai-edge-litert" in said and emptied(board)
    assert [m["kind"] for m in messages] == ["log", "log"] and "installing ai-edge-litert" in messages[0]["text"]


def test_a_runtime_is_installed_into_the_work_folder(board, tiny, tmp_path):
    messages = []
    with over(replace(board, python=without_runtime(tmp_path))) as transport:
        for _ in range(2):
            found = transport.run(
                "mobile_bench.worker", JOB, files={"tflite": tiny.path("int8")}, on_progress=messages.append
            )
            assert found["device"]["runtime"] == "ai-edge-litert"
    assert [m["kind"] for m in messages].count("log") == 1 and emptied(board)
