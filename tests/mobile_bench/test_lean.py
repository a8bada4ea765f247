"""mobile_bench stays light: it must run on a Raspberry Pi."""

import pytest

HEAVY = {"tensorflow", "keras", "tf_keras", "pandas", "streamlit", "altair", "tfopt", "dashboard", "sklearn", "yaml"}
MODULES = (
    "arena",
    "benchmark_model",
    "cli",
    "cli_support",
    "commands",
    "commands.compare",
    "commands.evaluate",
    "commands.fetch_tool",
    "commands.profile",
    "commands.roofline",
    "commands.run",
    "commands.shared",
    "commands.stream",
    "commands.sustained",
    "commands.sweep",
    "commands.xray",
    "compare",
    "concurrency",
    "delegates",
    "device",
    "edgetpu_compiler",
    "energy",
    "errors",
    "evaluate",
    "files",
    "flatbuffer",
    "flattables",
    "frames",
    "gate",
    "gpu",
    "inputs",
    "interleave",
    "interpreter",
    "interrupts",
    "jobs",
    "litert_c",
    "lock",
    "measure",
    "metadata",
    "meter_log",
    "opcost",
    "profile",
    "records",
    "roofline",
    "roofline_picture",
    "stats",
    "store",
    "stream",
    "stream_worker",
    "sustained",
    "sustained_picture",
    "sustained_worker",
    "targets",
    "tflite_ops",
    "tiny_file",
    "tool",
    "transports",
    "transports.adb",
    "transports.adb_evaluate",
    "transports.adb_jobs",
    "transports.android",
    "transports.local",
    "transports.ssh",
    "transports.ssh_install",
    "transports.ssh_login",
    "trust",
    "turns",
    "worker",
    "xray",
    "xray.cpu",
    "xray.cpu_rules",
    "xray.cpu_sparse",
    "xray.edgetpu",
    "xray.edgetpu_refusal",
    "xray.edgetpu_rules",
    "xray.gpu",
    "xray.gpu_classic",
    "xray.gpu_faults",
    "xray.gpu_rules",
    "xray.gpu_webgpu",
    "xray.partition",
    "xray.record",
    "xray.report",
    "xray.rules",
)


def loaded_by(run_python, code):
    done = run_python("-c", f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_list_of_modules_is_complete():
    from pathlib import Path

    import mobile_bench

    root = Path(mobile_bench.__file__).parent
    found = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in root.rglob("*.py")}
    assert found - {"__init__", "__main__"} == set(MODULES)


def test_the_package_alone_loads_nothing(run_python):
    assert not loaded_by(run_python, "import mobile_bench") & (HEAVY | {"numpy", "typer", "rich", "ai_edge_litert"})


@pytest.mark.parametrize("part", ["cli", "everything"])
def test_nothing_heavy_is_loaded(run_python, part):
    modules = ["cli"] if part == "cli" else MODULES
    loaded = loaded_by(run_python, "\n".join(f"import mobile_bench.{module}" for module in modules))
    assert not loaded & HEAVY
    if part == "cli":
        slow = {"numpy", "ai_edge_litert", "PIL", "paramiko", "adbutils", "av"}
        assert not loaded & slow, "--help should not wait for these"
