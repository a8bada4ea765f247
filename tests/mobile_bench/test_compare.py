"""Which file is faster: the statistics on data with a known answer, and the real thing on real files."""

import json

import numpy as np
import pytest

from mobile_bench import compare as comparing
from mobile_bench import gate, interleave
from mobile_bench.cli import app
from mobile_bench.cli_support import exit_code_of
from mobile_bench.compare import compare, verdicts_of
from mobile_bench.errors import InputError, JobFailed, ModelRefused
from mobile_bench.inputs import InputSpec
from mobile_bench.records import Target
from mobile_bench.stats import ratio_interval, student_quantile

from .small_graphs import write_chain

SPEC = InputSpec(12, 12, 3)


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bench(run_python):
    return lambda *args, **options: run_python("-m", "mobile_bench", *args, **options)


def rounds_of(ratio: float, spread: float, *, rounds: int = 12, turns: int = 20, seed: int = 0):
    """Blocks of two files of which the second takes `ratio` times as long, on a machine that drifts."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(rounds):
        own = ratio * np.exp(random.normal(0, spread))
        drift = np.exp(np.cumsum(random.normal(0, 0.05, turns)))
        made.append([[[d * random.gamma(2500) / 2500] * 3, [own * d * random.gamma(2500) / 2500] * 3] for d in drift])
    return made


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says():
    random = np.random.default_rng(3)
    missed = 0
    for _ in range(600):
        low, high = ratio_interval(random.normal(np.log(1.1), 0.02, 12), 0.9)
        missed += not low <= 1.1 <= high
    assert 0.06 < missed / 600 < 0.14


def test_the_interval_of_a_ratio_is_the_same_each_time_and_wider_at_a_higher_confidence():
    logs = np.random.default_rng(0).normal(0, 0.01, 10)
    narrow, wide = ratio_interval(logs, 0.8), ratio_interval(logs, 0.98)
    assert narrow == ratio_interval(logs, 0.8)
    assert wide[0] < narrow[0] < np.exp(logs.mean()) < narrow[1] < wide[1]
    assert ratio_interval([0.1] * 6) == pytest.approx((np.exp(0.1),) * 2)
    for logs in ([0.1] * 5, [0.0] * 5 + [np.nan]):
        with pytest.raises(InputError, match="6 finite rounds"):
            ratio_interval(logs)


@pytest.mark.parametrize(
    ("probability", "freedom", "value"), [(0.975, 11, 2.2010), (0.99, 5, 3.3649), (0.95, 1, 6.3138), (0.99, 99, 2.3646)]
)
def test_students_quantiles_are_those_of_the_tables(probability, freedom, value):
    assert student_quantile(probability, freedom) == pytest.approx(value, abs=6e-4)


def test_a_difference_too_small_to_matter_is_none():
    rounds = [[[[1.0], [1.001 + 1e-5 * (r % 2)]] for _ in range(3)] for r in range(12)]
    (found,) = verdicts_of(rounds, ["a", "b"])
    assert found.low > 1 and found.verdict == "cannot tell"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.03, "slower"), (0.97, "faster"), (1.0, "cannot tell")])
def test_a_difference_is_found_through_drift_that_is_larger_than_it(ratio, verdict):
    (found,) = verdicts_of(rounds_of(ratio, 0.005), ["a", "b"])
    assert found.verdict == verdict and found.low <= ratio <= found.high
    assert len(found.round_ratios) == 12 and found.sha256 == "b"


def test_a_noisy_comparison_says_that_it_cannot_tell():
    (found,) = verdicts_of(rounds_of(1.03, 0.2), ["a", "b"])
    assert found.verdict == "cannot tell" and found.high - found.low > 0.1


def test_the_level_is_shared_out_over_the_files():
    rounds = [[[[1.0], [1.0 + 0.001 * (r % 3)], [1.0]] for _ in range(3)] for r in range(6)]
    assert [v.confidence for v in verdicts_of(rounds, ["a", "b", "c"], 0.02)] == [0.99, 0.99]


def test_a_comparison_keeps_every_sample(tiny):
    found = compare([tiny.path("float32")] * 2, seconds=1, rounds=6, specs=[SPEC, SPEC])
    (verdict,) = found.verdicts
    assert 0.5 < verdict.ratio < 2 and verdict.low < verdict.high
    assert found.rounds == len(found.blocks) == 6 and found.turns == sum(map(len, found.blocks))
    assert found.device["runtime"] and all(len(turn) == 2 for turns in found.blocks for turn in turns)


def test_a_batch_is_really_more_work(tiny):
    """The same file at batch 1 and 256 in one worker: the blocks must show it."""
    said = []
    job = {
        "tflites": 1, "tflite_0": str(tiny.path("float32")), "specs": [SPEC.to_dict()], "threads": 1,
        "runtime": "auto", "seed": 0, "order_seed": 1, "seconds": 0.05,
    }  # fmt: skip
    one, many = (
        interleave.time_in_turns({**job, "batch": batch}, lambda kind, **facts: said.append(facts))
        for batch in (1, 256)
    )
    assert np.median(many["blocks"][0][0]) > 5 * np.median(one["blocks"][0][0])
    assert [facts["stage"] for facts in said[:3]] == ["load", "warm-up", "timing in turns"]


def test_blocks_last_milliseconds_and_a_short_run_is_preceded_by_one_unseen():
    assert interleave.block_of([0.05]) == (80, 1)
    assert interleave.block_of([3.0, 3.0]) == (2, 1)
    assert interleave.block_of([50.0, 20.0]) == (1, 0)
    assert interleave.block_of([0.1, 10.0]) == (4, 1), "as many runs of the slow file as of the fast one"


def test_what_makes_no_sense_is_refused(tiny, tmp_path):
    files = [tiny.path("float32")] * 2
    for options, word in (({"rounds": 3}, "rounds"), ({"seconds": 0}, "seconds"), ({"level": 0}, "level")):
        with pytest.raises(InputError, match=word):
            compare(files, **options)
    with pytest.raises(InputError, match="two files"):
        compare(files[:1])
    with pytest.raises(InputError, match="cannot be read"):
        compare([files[0], tmp_path / "none.tflite"])
    with pytest.raises(InputError, match="accelerator"):
        compare(files, Target(accelerator="nnapi"))
    with pytest.raises(ModelRefused, match="truncated"):
        compare([files[0], tiny.path("truncated")])
    with pytest.raises(JobFailed, match="SIG"):
        compare([files[0], tiny.path("self_calling")])


def verdict(low, high):
    return comparing.Verdict("s", (low * high) ** 0.5, low, high, 0.98, "", 1.0, 1.0, ())


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.9, 1.02, gate.ACCEPT), (1.04, 1.1, gate.REGRESSION), (1.01, 1.05, gate.ANOMALOUS), (0.8, 1.4, gate.ANOMALOUS)],
)
def test_latency_is_judged_by_its_whole_interval(low, high, says):
    assert gate.judge_latency(verdict(low, high), 0.03).verdict == says


def test_size_is_a_fact():
    assert gate.judge_size(101, 100, 0.01).verdict == gate.ACCEPT
    assert gate.judge_size(102, 100, 0.01).verdict == gate.REGRESSION


def test_accuracy_is_judged_by_the_images_on_which_they_differ():
    labels = np.zeros(1000, int)
    old = labels.copy()
    worse, unlucky = labels.copy(), labels.copy()
    worse[:40], unlucky[:2] = 1, 1
    assert gate.judge_accuracy(worse, old, labels, 0.5).verdict == gate.REGRESSION
    assert gate.judge_accuracy(unlucky, old, labels, 0.7).verdict == gate.ACCEPT
    few = gate.judge_accuracy(unlucky[:20], old[:20], labels[:20], 0.5)
    assert few.verdict == gate.ANOMALOUS and "more images" in few.text
    assert gate.judge_accuracy(old, worse, labels, 0.0).verdict == gate.ACCEPT
    assert gate.sign_test(3, 0) == 0.125 and gate.sign_test(0, 0) == 1.0


@pytest.mark.parametrize(
    ("images", "points", "says"),
    [(1, 0.5, "about 598"), (40, 0.5, "about 598"), (597, 0.5, "about 598"), (598, 0.5, ""), (40, 8, "")],
)
def test_a_sample_too_small_to_exclude_the_loss_is_no_acceptance(images, points, says):
    labels = np.zeros(images, int)
    found = gate.judge_accuracy(labels, labels, labels, points)
    assert found.verdict == (gate.ANOMALOUS if says else gate.ACCEPT) and says in found.text


@pytest.mark.parametrize(("images", "lost", "won"), [(600, 0.006, 0.001), (1000, 0.015, 0.01), (300, 0.02, 0.0)])
def test_a_true_loss_is_excluded_once_in_twenty_at_most(images, lost, won):
    drawn = np.random.default_rng(0).multinomial(images, [lost, won, 1 - lost - won], 3000)[:, :2]
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    bounds = np.array([gate.largest_loss(int(a), int(b), images) for a, b in found])
    assert counts[bounds < lost - won].sum() / 3000 < 0.06
    assert np.all(bounds >= (found[:, 0] - found[:, 1]) / images)


def test_a_regression_outweighs_a_doubt():
    checks = [gate.Check("x", v, "") for v in (gate.ACCEPT, gate.ANOMALOUS, gate.REGRESSION)]
    assert gate.overall(checks) == gate.REGRESSION
    assert gate.overall(checks[:2]) == gate.ANOMALOUS and gate.overall(checks[:1]) == gate.ACCEPT


@pytest.fixture
def here(monkeypatch, capsys):
    """Run mobile-bench in this process with another `compare` in it: here(compare, 'gate', …) -> code, out, err."""

    def run(compare, *args):
        monkeypatch.setattr("mobile_bench.compare.compare", compare)
        code = exit_code_of(lambda **_: app([str(arg) for arg in args], standalone_mode=False))
        return code, *capsys.readouterr()

    return run


def found_in(rounds):
    return lambda *_, **__: comparing.Comparison(
        Target(), verdicts_of(rounds, ["a", "b"]), len(rounds), 1, 1.0, {"runtime": "x"}, None, (), tuple(rounds)
    )


def test_the_compare_command(bench, here, tiny, tmp_path):
    files = [tiny.path("float32"), tiny.path("int8"), tiny.path("float16")]
    done = bench("compare", *files, "--seconds", 3, "--rounds", 6, "--out", tmp_path / "raw.json")
    assert done.returncode == 0, done.stderr
    assert "99.0% interval" in done.stdout and "6 processes" in done.stdout
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert len(raw["blocks"]) == 6 and len(raw["verdicts"]) == 2 and raw["schema_version"]
    code, out, _ = here(found_in(rounds_of(1.1, 0.001)), "compare", *files[:2], "--json")
    assert code == 0 and json.loads(out)["verdicts"][0]["verdict"] == "slower"
    code, out, said = here(compare, "compare", files[0], tiny.path("self_calling"))
    assert (code, out) == (1, "") and "SIG" in said
    done = bench("compare", *files[:2], "--seconds", 3, "--rounds", 6, "--json")
    assert json.loads(done.stdout)["verdicts"][0]["verdict"] in ("faster", "slower", "cannot tell")


def test_the_gate_by_exit_code(bench, here, tiny, tmp_path):
    old, alike = tiny.path("float32"), found_in(rounds_of(1.0, 0.001))
    grown = tmp_path / "grown.tflite"
    grown.write_bytes(old.read_bytes() + bytes(4 * old.stat().st_size))
    code, out, said = here(alike, "gate", grown, "--against", old)
    assert code == 1 and "REGRESSION" in out and "accuracy was not judged" in said
    done = bench("gate", grown, "--against", old, "--seconds", 3, "--max-slower", 900)
    assert done.returncode == 1 and "REGRESSION" in done.stdout, done.stderr
    sample = ("--sample", tiny.sample, "--input-spec", "scaling=signed", "--json")
    quick = lambda *files, **options: compare(*files, **{**options, "rounds": 6, "seconds": 1})
    code, out, said = here(quick, "gate", old, "--against", old, "--max-slower", 900, "--max-drop", 2, *sample)
    found = json.loads(out)
    assert code == 0 and found["verdict"] == "ACCEPT" and "not judged" not in said
    assert [c["name"] for c in found["checks"]] == ["size", "accuracy", "latency"]
    code, out, _ = here(alike, "gate", old, "--against", old, *sample)
    assert code == 3 and "about 598" in out, "300 images cannot exclude half a point"
    code, out, _ = here(compare, "gate", tiny.path("self_calling"), "--against", old, "--max-larger", 900)
    assert code == 3 and "ANOMALOUS" in out
    code, _, said = here(compare, "gate", tiny.path("truncated"), "--against", old)
    assert code == 2 and "truncated" in said


def test_a_runtime_that_is_installed_there_is_said(here, tiny):
    def installing(*args, on_progress, **options):
        on_progress({"kind": "log", "text": "the board has no TFLite runtime: installing one"})
        return found_in(rounds_of(1.0, 0.001))()

    code, _, said = here(installing, "compare", tiny.path("float32"), tiny.path("int8"))
    assert code == 0 and "installing one" in said


def test_the_gate_on_an_accelerator(here, adder, tmp_path):
    """What is compiled for the Edge TPU can be judged only beside the file that it was compiled from."""
    images = np.random.default_rng(0).integers(0, 256, (400, 1, 1, 3), np.uint8)
    labels = images.reshape(400, 3).argmax(1).astype(np.int32)
    np.savez(tmp_path / "sample.npz", images=images, labels=labels)
    make = lambda name, *ops: write_chain(tmp_path / f"{name}.tflite", *ops, shape=(1, 1, 1, 3))
    plain, other, new, old = make("plain", "ADD"), make("other", "EXP"), make("new", "EDGETPU"), make("old", "EDGETPU")
    quick = lambda *files, **options: compare(*files, **{**options, "rounds": 6, "seconds": 1})
    asked = ("gate", new, "--against", old, "--accelerator", "edgetpu", "--delegate", adder, "--max-slower", 900)
    asked = (*asked, "--delegate-option", "early=1", "--max-drop", 1, "--input-spec", "scaling=unit", "--json")
    judge = lambda *more: here(quick, *asked, "--sample", tmp_path / "sample.npz", *more)
    code, out, _ = judge("--reference", plain, "--reference", plain)
    assert code == 0 and {c["verdict"] for c in json.loads(out)["checks"]} == {"ACCEPT"}
    code, _, said = judge()
    assert code == 2 and "--reference" in said
    code, _, said = judge("--reference", other, "--reference", plain)
    assert code == 2 and "differs from the CPU" in said
    code, _, said = judge("--reference", plain)
    assert code == 2 and "1 for 2 files" in said and "evaluating" not in said
    code, _, said = here(quick, "gate", plain, "--against", plain, "--reference", plain, "--reference", plain)
    assert code == 2 and "for an accelerator" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["gate", "{text}", "--against", "{float32}"], ["not a TensorFlow Lite file"]),
        (
            ["gate", "{float32}", "--against", "{float32}", "--max-slower", "-5"],
            ["latency", "-5 percent", "0 to 1000 percent"],
        ),
        (["gate", "{float32}", "--against", "{float32}", "--input-spec", "scaling=unit"], ["--sample"]),
        (["compare", "{float32}"], ["two files"]),
        (["compare", "{float32}", "{float32}", "--rounds", "2"], ["rounds", "6 to"]),
        (["compare", "{float32}", "/nowhere.tflite"], ["cannot be read"]),
    ],
)
def test_bad_input_is_one_clear_error(bench, tiny, args, words):
    done = bench(*(arg.format(float32=tiny.path("float32"), text=tiny.path("text")) for arg in args))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in words:
        assert word in " ".join(done.stderr.split())
