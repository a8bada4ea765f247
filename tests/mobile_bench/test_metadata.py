"""The input spec that a file carries, read without a runtime or flatbuffers."""

import json
import random

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from mobile_bench.errors import InputError
from mobile_bench.inputs import InputSpec
from mobile_bench.metadata import METADATA_KEY, embedded_spec, find_spec, recorded_spec

SPEC = InputSpec(12, 12, 3, head="logits", labels=("a", "b", "c", "d")).with_scaling("torch")


def with_metadata(content, entries):
    """The same .tflite with metadata, written by the official schema code."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    model.metadata = model.metadata or []
    for name, data in entries:
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(data, np.uint8)
        model.buffers.append(buffer)
        entry.name, entry.buffer = name, len(model.buffers) - 1
        model.metadata.append(entry)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.fixture
def carrying(tiny):
    entries = [("other", b"x"), (METADATA_KEY, json.dumps(SPEC.to_dict()).encode()), ("more", b"y")]
    return with_metadata(tiny.path("float32").read_bytes(), entries)


def test_the_spec_inside_a_file(carrying, tiny, tmp_path):
    assert embedded_spec(carrying) == SPEC
    assert embedded_spec(tiny.path("float32").read_bytes()) is None
    (tmp_path / "x.tflite").write_bytes(carrying)
    assert recorded_spec(tmp_path / "x.tflite") == find_spec(tmp_path / "x.tflite") == SPEC


def test_damaged_files_have_no_spec(carrying):
    for length in range(0, len(carrying), 97):
        embedded_spec(carrying[:length])
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(carrying)
        for _ in range(10):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        found = embedded_spec(bytes(damaged))
        assert found is None or isinstance(found, InputSpec)
    for content in (b"", b"x", b"\xff" * 64, b"\0" * 64):
        assert embedded_spec(content) is None


def test_damaged_specs_inside_a_file(tiny):
    for data in (b"", b"[]", b"{", b'{"height": 0}', b"\xff\xff"):
        assert embedded_spec(with_metadata(tiny.path("float32").read_bytes(), [(METADATA_KEY, data)])) is None


def test_the_record_beside_a_file_comes_first(carrying, tmp_path):
    (tmp_path / "x.tflite").write_bytes(carrying)
    (tmp_path / "variant.json").write_text(json.dumps({"spec": InputSpec(12, 12, 3).to_dict()}))
    assert recorded_spec(tmp_path / "x.tflite") == InputSpec(12, 12, 3)
    (tmp_path / "variant.json").write_text("{}")
    assert recorded_spec(tmp_path / "x.tflite") == SPEC


def test_a_file_that_says_nothing_needs_a_scaling(tiny):
    path = tiny.path("float32")
    for text in ("", "head=logits"):
        with pytest.raises(InputError, match="--input-spec scaling="):
            find_spec(path, text, shape=(12, 12, 3))
    assert find_spec(path, "scaling=unit", shape=(12, 12, 3)) == InputSpec(12, 12, 3).with_scaling("unit")


def test_what_the_user_writes_changes_what_the_file_says(carrying, tmp_path):
    (tmp_path / "x.tflite").write_bytes(carrying)
    found = find_spec(tmp_path / "x.tflite", "head=softmax")
    assert found.head == "softmax" and found.scaling == "torch" and found.labels == SPEC.labels
