"""Measuring by SSH, against a real sshd on loopback."""

import contextlib
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mobile_bench import stream as streams
from mobile_bench.cli import main
from mobile_bench.compare import compare
from mobile_bench.errors import DataError, DelegateError, InputError, JobFailed, ModelRefused, TransportError
from mobile_bench.evaluate import evaluate, evaluate_apart
from mobile_bench.inputs import InputSpec
from mobile_bench.measure import measure
from mobile_bench.profile import profile
from mobile_bench.records import Connection, Delegate, Target
from mobile_bench.stream import stream
from mobile_bench.sustained import sustain
from mobile_bench.transports import transport_for
from mobile_bench.transports.local import Local

from .small_graphs import write_chain

SSHD = "/usr/sbin/sshd"
SPEC = InputSpec(12, 12, 3)
TARGET = Target("ssh", address="board")
JOB = {"threads": 1, "runtime": "auto", "batch": 1, "runs": 50, "max_runs": 60, "seed": 0, "spec": SPEC.to_dict()}
LONG = {**JOB, "runs": 100_000_000}

pytestmark = pytest.mark.skipif(
    not (os.path.exists(SSHD) and shutil.which("ssh-keygen")), reason=f"needs OpenSSH's server, {SSHD}, and ssh-keygen"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_name(path.name + ".pub").read_text()


@contextlib.contextmanager
def serving(folder, sftp="internal-sftp"):
    """A server with keys of its own, for the user who runs the tests."""
    port, host_key = free_port(), new_key(folder / "host")
    (folder / "authorized").write_text(new_key(folder / "key"))
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nSubsystem sftp {sftp}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if server.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert server.poll() is None, (folder / "log").read_text()
        yield SimpleNamespace(folder=folder, port=port, pid=server.pid)
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def board(sshd, tmp_path, monkeypatch):
    """A connection to it that works, with a work folder of its own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    place = tmp_path / "board"
    place.mkdir()
    return Connection(
        f"{subprocess.check_output(['id', '-un'], text=True).strip()}@127.0.0.1", sshd.port, str(sshd.folder / "key"),
        str(sshd.folder / "known_hosts"), str(place), sys.executable,
    )  # fmt: skip


def over(connection):
    return transport_for(TARGET, connection)


def emptied(connection):
    return until(lambda: not os.listdir(connection.folder))


def until(holds):
    deadline = time.monotonic() + 30
    while not (answer := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


def worker_in(connection, module=b"mobile_bench.worker"):
    """The process id of the measuring Python on the board."""

    def find():
        for file in Path(connection.folder).glob("*/job*.pid"):
            pid = file.read_text().strip()
            command = Path(f"/proc/{pid}/cmdline")
            if pid and command.exists() and module in command.read_bytes():
                return int(pid)

    return until(find)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def refused_entry(connection, error=TransportError):
    with pytest.raises(error) as caught, over(connection):
        pass
    return str(caught.value)


def wrapper(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def without_runtime(folder):
    """A Python that has no runtime, and whose pip is played by links to what is installed here."""
    real, site = shlex.quote(sys.executable), shlex.quote(str(Path(np.__file__).parents[1]))
    pip = f'case "$*" in *"-m pip"*) mkdir runtime && ln -s {site}/* runtime/; exit;; esac'
    return wrapper(folder / "bare", f'{pip}\nexec {real} -S "$@"')


# --- what it is for


def test_a_measurement_has_the_same_fields_as_here(board, tiny):
    here = measure(tiny.path("int8"), spec=SPEC, max_runs=60)
    stages = []
    there = measure(tiny.path("int8"), TARGET, connection=board, spec=SPEC, max_runs=60, on_progress=stages.append)
    assert there.status == "ok", there.reason
    for field in fields(here):
        assert bool(getattr(here, field.name)) == bool(getattr(there, field.name)) or (
            field.name in ("warnings", "load_average")
        )
    assert there.input_shape == (1, 12, 12, 3) and len(there.latency_ms) >= 50 and there.target == TARGET
    assert there.device.keys() == here.device.keys()
    assert [s["stage"] for s in stages if "stage" in s] == ["load", "warm-up", "timing", *["round"] * len(there.rounds)]
    assert emptied(board)


def test_a_delegates_library_there_is_checked_and_timed(board, adder, tmp_path):
    target = replace(TARGET, accelerator="external")
    wanted = Delegate(library=str(adder))
    found = measure(write_chain(tmp_path / "two.tflite", "ADD", "ADD"), target, connection=board, delegate=wanted)
    assert (found.status, found.delegated_ops, found.output_drift) == ("ok", ("ADD", "ADD"), 0.0), found.reason
    mixed = write_chain(tmp_path / "mixed.tflite", "LOGISTIC", "ADD", "EXP")
    refused = measure(mixed, target, connection=board, delegate=wanted)
    assert refused.status == "refused" and "LOGISTIC" in refused.reason and not refused.latency_ms
    missing = measure(mixed, target, connection=board, delegate=Delegate(library="/nowhere/lib.so"))
    assert missing.status in ("refused", "failed") and "/nowhere/lib.so" in missing.reason
    assert emptied(board)


def test_minutes_there_with_the_energy_and_the_heat_of_there(board, tiny, machine):
    options = {"target": TARGET, "connection": board, "root": machine}
    found = sustain(tiny.path("float32"), seconds=2.2, idle_s=0.2, **options)
    assert (found.status, len(found.windows)) == ("ok", 2) and sum(w.count for w in found.windows) > 100
    assert found.energy.source == "RAPL package-0" and found.energy.gross_mj > 0 and found.energy.idle_w > 0
    assert found.windows[0].temperature_c == 61.0 and found.device["runtime"] == "ai-edge-litert"
    with pytest.raises(InputError, match="no battery"):
        sustain(tiny.path("float32"), seconds=2, energy="battery", **options)
    assert emptied(board)


def test_minutes_there_whose_process_is_killed_keep_what_was_measured(board, tiny):
    def kill(message):
        if message.get("window"):
            os.kill(worker_in(board, b"mobile_bench.sustained_worker"), signal.SIGKILL)

    found = sustain(tiny.path("float32"), seconds=60, target=TARGET, connection=board, energy="none", on_progress=kill)
    assert found.status == "failed" and "SIGKILL" in found.reason and 1 <= len(found.windows) < 30
    assert emptied(board)


def test_minutes_there_whose_connection_is_cut_keep_what_was_measured(board, sshd, tiny):
    def cut(message):
        if message.get("window"):
            for pid in sessions_of(sshd.pid):
                os.kill(pid, signal.SIGKILL)

    found = sustain(tiny.path("float32"), seconds=60, target=TARGET, connection=board, energy="none", on_progress=cut)
    assert found.status == "failed" and "was lost" in found.reason and 1 <= len(found.windows) < 30
    assert emptied(board)


def test_minutes_there_that_are_interrupted_keep_what_was_measured(board, tiny):
    def stop(message):
        if message.get("window"):
            raise KeyboardInterrupt

    found = sustain(tiny.path("float32"), seconds=60, target=TARGET, connection=board, energy="none", on_progress=stop)
    assert (found.status, len(found.windows), found.energy) == ("interrupted", 1, None)
    assert emptied(board)


def test_an_accelerator_there_answers_the_sample_and_what_is_installed_is_said(board, adder, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 1, 3), np.uint8)
    np.savez(tmp_path / "sample.npz", images=images, labels=images.reshape(20, 3).argmax(1).astype(np.int32))
    target, said = replace(TARGET, accelerator="external"), []
    answer = lambda connection, *ops, **wanted: evaluate_apart(
        write_chain(tmp_path / "chain.tflite", *ops, shape=(1, 1, 1, 3)), tmp_path / "sample.npz", InputSpec(1, 1, 3),
        target, connection=connection, delegate=Delegate(library=str(adder), **wanted), tell=said.append,
    )  # fmt: skip
    assert answer(replace(board, python=without_runtime(tmp_path)), "ADD").correct == 20
    assert len(said) == 1 and "installing ai-edge-litert" in said[0]
    with pytest.raises(DelegateError, match="leaves 1 of 2 operations to the CPU"):
        answer(board, "LOGISTIC", "ADD")
    assert answer(board, "LOGISTIC", "ADD", allow_fallback=True).correct == 20
    assert len(said) == 1 and emptied(board)


def test_a_compiled_file_runs_there_beside_its_plain_twin(board, adder, tmp_path):
    compiled, plain = (write_chain(tmp_path / f"{op}.tflite", op) for op in ("EDGETPU", "ADD"))
    target, early = replace(TARGET, accelerator="edgetpu"), {"early": "1"}
    there = lambda **wanted: measure(
        compiled, target, connection=board, delegate=Delegate(library=str(adder), options=early, **wanted)
    )
    found = there(reference=str(plain))
    assert (found.status, found.delegated_ops, found.output_drift) == ("ok", ("edgetpu-custom-op",), 0.0), found.reason
    assert found.latency_ms and there().status == "refused"
    wrong = there(reference=str(write_chain(tmp_path / "other.tflite", "EXP")))
    assert wrong.status == "refused" and not wrong.latency_ms
    assert emptied(board)


@pytest.fixture
def photos(tiny, tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, image in enumerate(tiny.images[:6]):
        Image.fromarray(image).save(folder / ("more" if number > 3 else "") / f"{number}.png")
    return folder


def test_frames_of_here_are_sent_there_and_answered_alike(board, tiny, photos):
    said, options = [], {"fps": 40.0, "seconds": 0.5, "drop": False}
    here = stream(tiny.path("int8"), str(photos), SPEC, **options)
    there = stream(
        tiny.path("int8"), str(photos), SPEC, target=TARGET, connection=board, on_progress=said.append, **options
    )
    # A busy machine may end before the last of the twenty frames is begun.
    alike = lambda one, other: len(one) > 2 and one[: len(other)] == other[: len(one)]
    assert alike(there.number, tuple(range(20))) and alike(there.classes, here.classes) and there.about == "6 images"
    assert any("sending 6 images" in message.get("text", "") for message in said)
    there = stream(tiny.path("int8"), f"board:{photos}", SPEC, target=TARGET, connection=board, **options)
    assert alike(there.classes, here.classes)
    home = pwd.getpwuid(os.getuid()).pw_dir
    for source in ("board:no/such", "board:~/no/such"):
        with pytest.raises(InputError, match=rf"{re.escape(home)}/no/such \(no such file or folder"):
            stream(tiny.path("int8"), source, SPEC, target=TARGET, connection=board, **options)
    with pytest.raises(InputError, match="--target ssh"):
        stream(tiny.path("int8"), f"board:{photos}", SPEC, **options)
    assert emptied(board)


def test_videos_are_sent_and_cameras_are_the_boards(board, tiny, tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="needs pip install 'tfopt[stream]'")
    clip, said = tmp_path / "my clip.mkv", []
    with av.open(str(clip), "w") as container:
        added = container.add_stream("mpeg4", rate=30)
        added.width, added.height, added.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            gray = np.full((48, 64, 3), 20 * number, np.uint8)
            container.mux(added.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(added.encode())
    there = lambda source: stream(
        tiny.path("int8"), source, SPEC, seconds=0.5, target=TARGET, connection=board, on_progress=said.append
    )
    found = there(str(clip))
    assert found.number[0] == 0 and found.about.endswith("video of 64 x 48")
    assert any(message.get("text", "").startswith(f"sending {clip}, 0.0 MB") for message in said)
    for source in ("camera:93", "board:/dev/video93", "/dev/video93"):
        with pytest.raises(DataError, match=r"camera cannot be opened.*/dev/video93"):
            there(source)
    monkeypatch.setattr(streams, "MOST_VIDEO_BYTES", 100)
    with pytest.raises(InputError, match=r"too large to be sent.*--source board:"):
        there(str(clip))
    assert emptied(board)


def test_a_stream_there_that_is_interrupted_keeps_its_frames(board, tiny, photos):
    def stop(message):
        if "frames a second from" in message.get("text", ""):
            time.sleep(0.3)
            raise KeyboardInterrupt

    found = stream(tiny.path("int8"), str(photos), SPEC, seconds=60, target=TARGET, connection=board, on_progress=stop)
    assert found.interrupted and len(found.number) >= 1 and found.seconds < 30
    assert emptied(board)


def test_what_the_board_lacks_is_installed_or_named(board, tiny):
    job = {**JOB, "requires": {"no_such_module_there": "a-project-that-is-not-there==0"}}
    with over(board) as transport, pytest.raises(TransportError, match="lacks the module no_such_module_there"):
        transport.run("mobile_bench.worker", job, files={"tflite": tiny.path("float32")})


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_predictions_are_the_same_as_here(board, tiny, tmp_path, name):
    job = {"spec": SPEC.to_dict(), "workers": 1, "runtime": "auto"}
    files, out = {"tflite": tiny.path(name), "sample": tiny.sample}, tmp_path / "out put.npy"
    seen = []
    with over(board) as transport:
        result = transport.run(
            "mobile_bench.evaluate", job, files=files, outputs={"out": out}, on_progress=seen.append, timeout_s=300
        )
    expected = evaluate(tiny.path(name), tiny.images, tiny.labels, SPEC, workers=1)
    assert np.array_equal(np.load(out), expected.predictions) and result["correct"] == expected.correct
    assert seen[-1]["done"] == 300 and emptied(board)


def test_a_file_goes_there_once_a_session_and_everything_goes_with_it(board, tiny, tmp_path):
    copy = tmp_path / "copy.tflite"
    shutil.copy(tiny.path("float32"), copy)
    with over(board) as transport:
        for path in (tiny.path("float32"), copy, tiny.path("float32")):
            transport.run("mobile_bench.worker", JOB, files={"tflite": path})
        assert len(list(Path(board.folder).glob("*/*.tflite"))) == 1
        assert transport.place.startswith("ssh-") and transport.place.endswith(f"@127.0.0.1:{board.port}")
    assert emptied(board)


@pytest.mark.parametrize("name", ["it's; touch owned", 'a "b" $(touch owned)', "ü:`touch owned`"])
def test_any_folder_name_works(board, tiny, name):
    folder = Path(board.folder) / name
    folder.mkdir()
    odd = replace(board, folder=str(folder))
    with over(odd) as transport:
        assert transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("float32")})["latency_ms"]
        assert list(folder.iterdir())
    assert emptied(odd) and os.listdir(board.folder) == [name]
    assert not any((place / "owned").exists() for place in (folder, Path(board.folder), Path.home(), Path("/root")))


def test_the_users_ssh_config_is_heard(board, sshd, tiny):
    (Path.home() / ".ssh").mkdir()
    (Path.home() / ".ssh" / "config").write_text(
        f"Host nick\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {board.address.split('@')[0]}\n"
        f"  IdentityFile {sshd.folder}/key\n"
    )
    shutil.copy(sshd.folder / "known_hosts", Path.home() / ".ssh" / "known_hosts")
    nick = Connection("nick", folder=board.folder, python=sys.executable)
    assert over(nick).place == over(board).place
    assert measure(tiny.path("float32"), TARGET, connection=nick, max_runs=50).status == "ok"


# --- files that fail


@pytest.mark.parametrize(("name", "word"), [("text", "not a TensorFlow"), ("truncated", "truncated")])
def test_a_refusal_comes_back_as_itself_with_the_name_from_here(board, tiny, name, word):
    with over(board) as transport:
        with pytest.raises(ModelRefused, match=word) as caught:
            transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path(name)})
        assert str(tiny.path(name).resolve()) in caught.value.received and board.folder not in str(caught.value)
        transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("float32")})
    assert emptied(board)


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
        "import os, signal; from mobile_bench.records import Connection; from tests.mobile_bench import test_ssh as t\n"
        "stop = lambda m: os.kill(os.getpid(), signal.SIGKILL) if m.get('stage') == 'timing' else None\n"
        f"with t.over({board!r}) as transport:\n"
        f"    transport.run('mobile_bench.worker', t.LONG, files={{'tflite': {str(tiny.path('float32'))!r}}}, "
        "on_progress=stop)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert emptied(board)


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


def sessions_of(server):
    """The processes of sshd that serve a connection, and only those."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, after = stat.read_text().rsplit(")", 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid, name = before.split(" (", 1)
        if name.startswith("sshd"):
            parents[int(pid)] = int(after.split()[1])
    found = [server]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


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


def test_an_output_that_is_not_written(board, tiny, tmp_path):
    files, out = {"tflite": tiny.path("float32")}, {"out": tmp_path / "out.npy"}
    with pytest.raises(JobFailed, match=r"did not write out\.npy"), over(board) as transport:
        transport.run("mobile_bench.worker", JOB, files=files, outputs=out)
    assert emptied(board) and not out["out"].exists()


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


def test_local_refuses_in_the_same_words(board, tiny):
    said = []
    for transport in (Local(), over(board)):
        with transport, pytest.raises(ModelRefused) as caught:
            transport.run("mobile_bench.worker", JOB, files={"tflite": tiny.path("text")})
        said.append(str(caught.value))
    assert said[0] == said[1]


# --- the commands


def test_files_are_compared_profiled_and_evaluated_there(board, tiny):
    files = [tiny.path("float32")] * 2
    compared = compare(files, TARGET, connection=board, seconds=2, rounds=6)
    assert compared.rounds == 6 and compared.verdicts[0].reference_ms > 0
    assert profile(tiny.path("float32"), TARGET, connection=board, runs=5).ops
    there = evaluate_apart(tiny.path("int8"), tiny.sample, SPEC, TARGET, connection=board)
    here = evaluate_apart(tiny.path("int8"), tiny.sample, SPEC)
    assert (there.predictions == here.predictions).all() and there.runtime == here.runtime
    assert emptied(board)


@pytest.fixture
def bench_there(board, monkeypatch, capsys, tmp_path):
    """mobile-bench, here, with the board as its target: arguments -> exit code, the object it prints."""
    inventory = tmp_path / "targets.toml"
    settings = {name: getattr(board, name) for name in ("identity_file", "known_hosts", "folder", "python")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    inventory.write_text("\n".join(["[targets.board]", f'url = "ssh://{board.address}:{board.port}"', *lines]))

    def run(*args):
        command = [*map(str, args), "--target", "board", "--inventory", str(inventory), "--json"]
        monkeypatch.setattr(sys, "argv", ["mobile-bench", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.slow
def test_a_compiled_file_is_gated_there(bench_there, board, adder, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (400, 1, 1, 3), np.uint8)
    np.savez(tmp_path / "sample.npz", images=images, labels=images.reshape(400, 3).argmax(1).astype(np.int32))
    compiled, plain = (write_chain(tmp_path / f"{op}.tflite", op, shape=(1, 1, 1, 3)) for op in ("EDGETPU", "ADD"))
    asked = ("gate", compiled, "--against", compiled, "--accelerator", "edgetpu", "--delegate", adder)
    asked += ("--delegate-option", "early=1", "--sample", tmp_path / "sample.npz", "--input-spec", "scaling=unit")
    asked += ("--max-slower", 900, "--max-drop", 1, "--seconds", 1)
    code, said = bench_there(*asked, "--reference", plain, "--reference", plain)
    assert code == 0 and [c["verdict"] for c in said["checks"]] == ["ACCEPT"] * 3, said
    code, said = bench_there(*asked)
    assert code == 2 and "reference" in said["error"]["what"] + said["error"]["next"]
    assert emptied(board)


def test_evaluate_says_how_often_the_board_agrees(bench_there, tiny):
    code, said = bench_there(
        "evaluate", tiny.path("int8"), "--sample", tiny.sample, "--input-spec", "scaling=signed"
    )  # fmt: skip
    assert code == 0
    assert said["same_as_here"] == said["images"] and said["target"].startswith("ssh-")
