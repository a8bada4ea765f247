"""Measuring by SSH, against a real sshd on loopback."""

import json
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from mobile_bench.cli import main
from mobile_bench.compare import compare
from mobile_bench.errors import DelegateError
from mobile_bench.evaluate import evaluate, evaluate_apart
from mobile_bench.inputs import InputSpec
from mobile_bench.measure import measure
from mobile_bench.profile import profile
from mobile_bench.records import Connection, Delegate

from .small_graphs import write_chain
from .ssh_board import JOB, SPEC, TARGET, emptied, needs_sshd, over, without_runtime

pytestmark = needs_sshd


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
