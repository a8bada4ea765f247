"""The GPU: which operations LiteRT's delegates take of a file, by their own rules, and what the real one says.

webgpu is the accelerator in ai-edge-litert, which can be asked on this machine; opencl and opengl are TFLite's
delegate on phones, known from its source alone. All of them check every operation, group those that pass as TFLite
does (mobile_bench.xray.partition) and take one group only, the largest.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mobile_bench.errors import JobFailed, Problem
from mobile_bench.flatbuffer import TFLiteModel
from mobile_bench.jobs import run_job, serve
from mobile_bench.profile import layers_of
from mobile_bench.xray import gpu_classic, gpu_faults, gpu_webgpu
from mobile_bench.xray.gpu_rules import constant, open_sizes
from mobile_bench.xray.partition import partitions
from mobile_bench.xray.report import OpVerdict, XrayReport, arena_bytes, weights_of
from mobile_bench.xray.rules import Node, Verdict, nodes

_PARTITIONS = "tflite/delegates/utils.cc, GetNodesOfFirstNLargestPartitions"
_TIMEOUT_S = 600
_TAKEN = re.compile(r"(\w+) operations will run on the GPU, and (?:the remaining|all) (\d+) operations")
_LISTED = "operations are not supported by GPU delegate"
_ADAPTER = re.compile(r"Selected adapter: (.+?), arch=.*backend=(\w+), adapterType=(.+)")
_FAULT = re.compile(r"^E\d{4} .*?\] (Validation error: .+)$", re.MULTILINE)
#: What there is to say of a file that was not asked about.
_NOTHING = {"text": "", "failed": "", "none": False, "accelerator": "", "software": False, "drift": None, "wrong": ""}
NO_GPU = "There is no GPU that LiteRT can use here"


@dataclass(frozen=True)
class Choice:
    """What a delegate would announce of a file: what it refuses, which group it takes, and what then stops it.

    All by the index of an operation. Where `broken` is not empty, nothing runs on the GPU after all.
    """

    seen: tuple[Node, ...]
    refused: dict[int, Verdict]
    taken: set[int]
    broken: dict[int, Verdict]

    @property
    def runs(self) -> set[int]:
        return set() if self.broken else self.taken

    @property
    def kinds(self) -> set[str]:
        """The names of what it refuses, as the delegate lists them."""
        listed = {name_of(n) for n in self.seen if n.operator.index in self.refused}
        return listed | {"DEQUANTIZE"} if self.refused and any(map(unpacks_float16, self.seen)) else listed


def look(model: TFLiteModel, tflite: str | Path | bytes, *, backend: str, ask: bool) -> XrayReport:
    """Where each operation of the main graph would run with a GPU; backend: webgpu, opencl or opengl.

    ask: also open the file on this machine's GPU, in a child process, and compare its answers with the CPU's. Only
    webgpu can be asked; that it fails, or that there is none, is said in the report.
    """
    choice = choose(model, backend)
    layers = layers_of(model)
    ops = [_verdict(node, choice, layers[node.operator.index]) for node in choice.seen]
    asked, disagreements, notes = "", [], _notes(choice, backend)
    if len(model.subgraphs) > 1:
        notes.append(f"Only the main graph of {len(model.subgraphs)} is shown")
    if ask and backend == "webgpu":
        found = _ask(tflite)
        asked, disagreements, more = judge(found, choice)
        notes += more
        ops = [dataclasses.replace(op, said=word) for op, word in zip(ops, said_of(found, model, choice))]
    elif ask:
        notes.append(f"The {backend} delegate is not in the runtime for this machine, so it could not be asked")
    return XrayReport(
        "gpu", backend, tuple(ops), int(bool(choice.runs)), weights_of(model, sorted(choice.runs)),
        arena_bytes(model, notes), asked, tuple(disagreements), tuple(notes),
    )  # fmt: skip


def choose(model: TFLiteModel, backend: str) -> Choice:
    """What the delegate of this backend would do with the main graph, by its rules."""
    seen = seen_by_delegate(model)
    rule = gpu_webgpu.objection if backend == "webgpu" else gpu_classic.objection
    refused = {n.operator.index: verdict for n in seen if not unpacks_float16(n) and (verdict := rule(n))}
    taken = largest_group(model, seen, refused)
    return Choice(seen, refused, taken, open_sizes(seen) or _breaking(seen, taken, backend))


def seen_by_delegate(model: TFLiteModel) -> tuple[Node, ...]:
    """The operations with float16 constants in place of what DEQUANTIZE makes of them, as delegates look at them."""
    every = nodes(model)
    packed = {n.operator.outputs[0]: n.operator.inputs[0] for n in every if unpacks_float16(n)}

    def remapped(node: Node) -> Node:
        if unpacks_float16(node):
            return node
        given = tuple(packed.get(tensor, tensor) for tensor in node.operator.inputs)
        return dataclasses.replace(node, operator=dataclasses.replace(node.operator, inputs=given))

    return tuple(remapped(node) for node in every)


def unpacks_float16(node: Node) -> bool:
    """Whether this is a DEQUANTIZE of float16 constants, which a delegate does itself."""
    if node.op != "DEQUANTIZE" or not node.operator.outputs:
        return False
    return constant(node.input(0)) and node.input(0).dtype == "float16"


def largest_group(model: TFLiteModel, seen: Sequence[Node], against: Collection[int]) -> set[int]:
    """The operations that the delegate takes where it refuses those of these numbers."""
    if not against:
        return {node.operator.index for node in seen}
    able = [node.operator.index not in against and not unpacks_float16(node) for node in seen]
    return set(max(partitions(model.main, able), key=len, default=()))


def _breaking(seen: Sequence[Node], taken: set[int], backend: str) -> dict[int, Verdict]:
    """Why none of the operations taken runs, after all: one of them passes the checks and stops what follows them."""
    rule = {"webgpu": gpu_faults.breaks, "opengl": gpu_classic.breaks_opengl}.get(backend, lambda node: None)
    found = {n.operator.index: verdict for n in seen if n.operator.index in taken and (verdict := rule(n))}
    if not found:
        return {}
    first = min(found)
    why = f"the delegate gives up on the whole file, because of operation {first}: {found[first].reason}"
    return dict.fromkeys(taken, Verdict(why, found[first].fix, found[first].source)) | found


def _verdict(node: Node, choice: Choice, layer: str) -> OpVerdict:
    index, name = node.operator.index, name_of(node)
    if index in choice.runs:
        return OpVerdict(index, name, "delegate", layer=layer)
    verdict = choice.refused.get(index) or choice.broken.get(index) or _left_behind(node, choice)
    return OpVerdict(index, name, "cpu", verdict.reason, verdict.fix, verdict.source, layer=layer)


def _left_behind(node: Node, choice: Choice) -> Verdict:
    cut = f"Replace what stays on the CPU, first of all operation {min(choice.refused)}"
    if unpacks_float16(node):
        why = "it unpacks float16 constants, and the GPU does that itself only where it takes the whole file"
        return Verdict(why, cut, "tflite/delegates/utils.cc, FP16GraphPartitionHelper::IsNodeSupported")
    why = f"it could run on the GPU, which takes only one group of operations, here another one of {len(choice.taken)}"
    return Verdict(why, cut, _PARTITIONS)


def name_of(node: Node) -> str:
    return node.operator.custom_code if node.op == "CUSTOM" else node.op


def _notes(choice: Choice, backend: str) -> list[str]:
    if backend != "webgpu":
        return [
            f"By the source of TFLite's GPU delegate ({gpu_classic.FILE}), for {backend}; it was not run here, and a "
            "phone's driver may refuse or fail where the source does not"
        ]
    mine = [node for node in choice.seen if node.operator.index in choice.runs]
    wrong: dict[str, list[str]] = {}
    for node in mine:
        wrong.setdefault(gpu_faults.known_wrong(node), []).append(f"{node.operator.index} ({node.op})")
    notes = [f"Wrong answers: {why}: operation {', '.join(where)}" for why, where in wrong.items() if why]
    unchecked = sorted({name_of(n) for n in mine if gpu_webgpu.unchecked(n)})
    if unchecked:
        notes.append(f"Not checked in detail, taken to run on the GPU: {', '.join(unchecked)}. Ask the GPU itself")
    return notes


def _ask(tflite: str | Path | bytes) -> dict:
    """What the GPU of this machine says of a file: see ask_in_this_process. A crash is an answer, too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite" if isinstance(tflite, bytes) else Path(tflite).resolve()
        if isinstance(tflite, bytes):
            path.write_bytes(tflite)
        try:
            return run_job("mobile_bench.xray.gpu", {"tflites": [str(path)]}, Path(folder), timeout_s=_TIMEOUT_S)["0"]
        except JobFailed as failure:
            return {**_NOTHING, "failed": f"{failure.what}: {failure.received or 'no reason given'}"}


def heard(text: str) -> tuple[int | None, dict[str, set[str]]]:
    """What the accelerator printed: how many operations it takes, None where it did not say (then it is all or an
    error), and the kinds that it refuses with its reasons."""
    counts = list(_TAKEN.finditer(text))
    if not counts:
        return None, {}
    block = text[: counts[-1].start()].rpartition(_LISTED)[2].splitlines()[1:]
    kinds: dict[str, set[str]] = {}
    for line in filter(str.strip, block):
        name, _, reason = line.partition(":")
        kinds.setdefault(name.strip(), set()).add(reason.strip())
    said = counts[-1][1]
    return int(said) if said.isdigit() else 0, kinds


def said_of(found: dict, model: TFLiteModel, choice: Choice) -> list[str]:
    """'delegate', 'cpu' or '' for each operation: what follows from the kinds and the number that it named."""
    everything = [node.operator.index for node in choice.seen]
    count, kinds = heard(found["text"])
    if found["none"] or (found["failed"] and count != 0):
        return [""] * len(everything)
    if not count:
        return ["delegate" if count is None else "cpu"] * len(everything)
    # It names kinds, not operations: those that our rules refuse if these are of the same kinds, or else all of each.
    whole = {node.operator.index for node in choice.seen if name_of(node) in kinds}
    guesses = [choice.taken] if choice.kinds == set(kinds) else []
    for guess in (*guesses, largest_group(model, choice.seen, whole)):
        if len(guess) == count:
            return ["delegate" if index in guess else "cpu" for index in everything]
    names = [name_of(node) for node in choice.seen]
    return ["cpu" if name in kinds and names.count(name) == 1 else "" for name in names]


def judge(found: dict, choice: Choice) -> tuple[str, list[str], list[str]]:
    """(who was asked, where it disagrees with our rules or with the CPU, notes) from what was found."""
    if found["none"]:
        return "", [], [f"The GPU was not asked: {found['failed']}"]
    count, kinds = heard(found["text"])
    said, notes, everything = [], [], len(choice.seen)
    if found["failed"] and count != 0:
        (notes if not choice.runs else said).append(f"The accelerator failed on this file: {found['failed']}")
    elif choice.broken:
        said.append(
            f"The accelerator did not fail on this file, our rules say: {next(iter(choice.broken.values())).reason}"
        )
    taken = everything if count is None and not found["failed"] else count
    if taken is not None and taken != len(choice.taken):
        said.append(f"The accelerator took {taken} of {everything} operations, our rules say {len(choice.taken)}")
    if count is not None and set(kinds) != choice.kinds:
        theirs, ours = (", ".join(sorted(names)) or "none" for names in (kinds, choice.kinds))
        said.append(f"The accelerator refuses the kinds {theirs}, our rules {ours}")
    said += [found["wrong"]] if found["wrong"] else []
    said += list(dict.fromkeys(_FAULT.findall(found["text"])))[:1]
    if found["drift"] is not None and count != 0:
        notes.append(f"Its answers differ from the CPU's by at most {found['drift']:.2g} of the largest value")
    if found["software"]:
        notes.append("The GPU asked is software: correctness only, times on it never mean anything")
    return found["accelerator"] or "WebGPU accelerator of ai-edge-litert", said, notes


def ask_in_this_process(job: dict, emit: Callable[..., None]) -> dict:
    """The child's side. job: tflites, paths. Gives for the number of each file as text: text (what was printed),
    failed ('' where it opened), none (no GPU here), accelerator, software, drift and wrong (against the CPU)."""
    found = {}
    for number, path in enumerate(job["tflites"]):
        found[str(number)] = _open_and_compare(path)
        emit("progress", done=number, found=found[str(number)])
    return found


def _open_and_compare(path: str) -> dict:
    from mobile_bench.delegates import Wanted, check
    from mobile_bench.gpu import RUNTIME, open_gpu
    from mobile_bench.interpreter import load_runtime
    from mobile_bench.worker import random_inputs

    answer, model = {**_NOTHING}, None
    job = {"threads": 1, "runtime": "auto", "batch": 1, "seed": 0}
    with tempfile.TemporaryFile() as caught:
        saved = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            model = open_gpu(path, allow_fallback=True)
            model.set_inputs(*random_inputs(model, None, 0))
            model.run()
            wanted, values = Wanted("gpu", allow_fallback=True), partial(random_inputs, model, None)
            answer["drift"] = check(wanted, model, path, job, None, values)
        except Problem as problem:
            answer["none"] = problem.what == NO_GPU
            answer["wrong" if model else "failed"] = f"{problem.what}: {problem.received}"
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        caught.seek(0)
        answer["text"] = caught.read().decode("utf-8", "replace")
    adapter = _ADAPTER.search(answer["text"])
    if adapter:
        answer["accelerator"] = f"{adapter[1]} ({adapter[2]}, {adapter[3].strip()}), {load_runtime(RUNTIME)}"
        answer["software"] = "software" in adapter[3].lower()
    return answer


if __name__ == "__main__":
    serve(ask_in_this_process)
