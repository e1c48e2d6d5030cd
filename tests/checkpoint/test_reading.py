"""checkpoint/reader.py reads our checkpoints and those of torch and Megatron-Core, and refuses hostile files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata, Metadata, MetadataIndex

from megatron_ettin.base.errors import UserError
from megatron_ettin.checkpoint.reader import (
    AllowListed,
    CheckpointReader,
    SafeReader,
    common_strategy,
    load_strategy,
    read_common,
)
from megatron_ettin.checkpoint.weights_writer import write_weights


class Trap:
    """Make a folder when unpickled without a restricted unpickler."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def example():
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding.word_embeddings.weight": torch.randn(10, 4, generator=generator),
        "transformer.layers.0.self_attention.linear_proj.weight": torch.randn(4, 4, generator=generator).t(),
        "transformer.final_layernorm.weight": torch.randn(12, generator=generator)[4:8],
        "output_layer.bias": torch.randn(10, generator=generator).bfloat16(),
        "scale": torch.tensor(2.5),
    }


@pytest.fixture
def written(tmp_path):
    write_weights(tmp_path / "c", example().items(), {"progress": {"step": 3}}, file_bytes=100)
    return tmp_path / "c"


def edit(folder, change):
    """Apply `change` to the unpickled `.metadata` and pickle it again, as torch does."""
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)


def assert_same(reader, expected):
    assert reader.keys() == sorted(expected)
    for key, tensor in expected.items():
        assert reader.shape(key) == tuple(tensor.shape)
        assert reader.dtype(key) == tensor.dtype
        assert torch.equal(reader.read(key), tensor)


def test_reader_reads_back_what_write_weights_wrote(written):
    assert_same(CheckpointReader(written), example())
    assert read_common(written) == {"progress": {"step": 3}}
    files = list(written.glob("*.distcp"))
    assert len(files) > 1
    assert sum(file.stat().st_size for file in files) < 12_000  # a view is stored without the storage behind it
    with pytest.raises(UserError, match="no tensor 'other'"):
        CheckpointReader(written).read("other")


def test_write_weights_holds_one_tensor_at_a_time(tmp_path):
    import weakref

    alive = []

    def made():
        for number in range(5):
            tensor = torch.full((100,), float(number))
            alive.append(weakref.ref(tensor))
            yield f"w{number}", tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 1

    write_weights(tmp_path, made(), {})
    assert CheckpointReader(tmp_path).read("w4")[0] == 4


def test_reader_reads_checkpoint_of_torch_dcp(tmp_path):
    import torch.distributed.checkpoint as dcp

    state = {key: tensor.contiguous() for key, tensor in example().items()}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    assert_same(CheckpointReader(tmp_path / "c"), state)


def cut(metadata, first_rows, second_first=None):
    """Make one tensor [10, 4] of two stored ones, w.a and w.b, in place of whatever rows they say."""
    a, b = metadata.state_dict_metadata.pop("w.a"), metadata.state_dict_metadata.pop("w.b")
    start = first_rows if second_first is None else second_first
    chunks = [ChunkStorageMetadata(torch.Size([0, 0]), a.size), ChunkStorageMetadata(torch.Size([start, 0]), b.size)]
    metadata.state_dict_metadata["w"] = dataclasses.replace(a, size=torch.Size([10, 4]), chunks=chunks)
    for name, chunk in zip(("w.a", "w.b"), chunks, strict=True):
        info = metadata.storage_data.pop(MetadataIndex(name, torch.Size([0, 0])))
        metadata.storage_data[MetadataIndex("w", chunk.offsets)] = info


def test_reader_tensor_stored_in_chunks_is_reassembled(tmp_path):
    whole = torch.arange(40.0).view(10, 4)
    write_weights(tmp_path, [("w.a", whole[:7]), ("w.b", whole[7:])], {})
    edit(tmp_path, lambda metadata: cut(metadata, 7))
    assert torch.equal(CheckpointReader(tmp_path).read("w"), whole)


@pytest.mark.parametrize("start", [6, 8], ids=["overlap", "outside"])
def test_reader_chunks_that_do_not_tile_are_refused(tmp_path, start):
    whole = torch.zeros(10, 4)
    write_weights(tmp_path, [("w.a", whole[:7]), ("w.b", whole[7:])], {})
    edit(tmp_path, lambda metadata: cut(metadata, 7, second_first=start))
    with pytest.raises(UserError, match="do not tile"):
        CheckpointReader(tmp_path).read("w")


def test_reader_hostile_metadata_is_refused_and_not_run(written, tmp_path):
    trap = tmp_path / "sprung"
    edit(written, lambda metadata: setattr(metadata, "planner_data", Trap(trap)))
    with pytest.raises(UserError, match=r"\.metadata: refused: it names posix\.mkdir"):
        CheckpointReader(written)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"garbage", pickle.dumps({}), pickle.dumps(None), b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04K\x01."],
)
def test_reader_garbage_metadata_is_refused(written, content):
    (written / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata"):
        CheckpointReader(written)


def test_unpickler_getattr_reaches_enum_members_only(written):
    """Python 3.11.0 to 3.11.3 pickle enum members as calls of getattr, which must reach nothing else."""

    def asking(module, name):
        class Asks:
            def __reduce__(self):
                return getattr, (module, name)

        return pickle.dumps(Asks())

    member = next(iter(_MEM_FORMAT_ENCODING))
    assert AllowListed(io.BytesIO(asking(type(member), member.name))).load() is member
    for module, name in (
        (type(member), "__class__"),
        (type(member), "mro"),
        (Metadata, "__init__"),
        (torch.Size, "numel"),
    ):
        with pytest.raises(pickle.UnpicklingError, match=r"it asks for|it names"):
            AllowListed(io.BytesIO(asking(module, name))).load()


def test_unpickler_dotted_name_is_refused(written):
    """Protocol 4 allows `Size.__class__...`; the list holds whole names only."""
    name = b"Size.__subclasses__"
    (written / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name + b"\x93)R.")
    with pytest.raises(UserError, match="__subclasses__"):
        CheckpointReader(written)


def test_reader_path_outside_checkpoint_is_refused(written):
    def move(metadata):
        info = next(iter(metadata.storage_data.values()))
        info.relative_path = "../elsewhere.distcp"

    edit(written, move)
    with pytest.raises(UserError, match="leads out of its folder"):
        CheckpointReader(written)


def test_reader_file_name_with_line_break_is_refused(written):
    def rename(metadata):
        next(iter(metadata.storage_data.values())).relative_path = "__0_0.dist\x85p"

    edit(written, rename)
    with pytest.raises(UserError, match="is not what torch writes") as refused:
        CheckpointReader(written)
    assert len(str(refused.value).splitlines()) == 1


def test_reader_pickle_in_place_of_tensor_is_refused_and_not_run(written, tmp_path):
    """A tensor's bytes are replaced by a hostile pickle, which torch's weights-only unpickler refuses."""
    trap = tmp_path / "sprung"
    reader = CheckpointReader(written)
    key = "embedding.word_embeddings.weight"
    info = next(i for index, i in reader._metadata.storage_data.items() if index.fqn == key)
    with open(written / info.relative_path, "wb") as file:
        torch.save(Trap(trap), file)
        length = file.tell()

    def point(metadata):
        for index, position in metadata.storage_data.items():
            if index.fqn == key:
                position.offset, position.length = 0, length

    edit(written, point)
    with pytest.raises(UserError, match=rf"{info.relative_path}: damaged or refused"):
        CheckpointReader(written).read(key)
    assert not trap.exists()


@pytest.mark.parametrize("harm", ["missing", "truncated", "garbage"])
def test_reader_damaged_or_missing_file_is_named(written, harm):
    reader = CheckpointReader(written)
    for file in written.glob("*.distcp"):
        if harm == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:50] if harm == "truncated" else b"\0" * file.stat().st_size)
    for key in reader.keys():  # noqa: SIM118
        with pytest.raises(UserError, match=r"__0_\d+\.distcp: "):
            reader.read(key)


def test_reader_tensor_of_another_shape_is_refused(written):
    def widen(metadata):
        entry = metadata.state_dict_metadata["scale"]
        entry.size = torch.Size([2])
        entry.chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))]
        info = metadata.storage_data.pop(MetadataIndex("scale", torch.Size([])))
        metadata.storage_data[MetadataIndex("scale", torch.Size([0]))] = info

    edit(written, widen)
    with pytest.raises(UserError, match=r"scale is not the torch\.float32 tensor \(2,\)"):
        CheckpointReader(written).read("scale")


def test_read_common_hostile_pickle_is_refused_and_not_run(written, tmp_path, monkeypatch):
    trap = tmp_path / "sprung"
    torch.save({"progress": Trap(trap)}, written / "common.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for read in (read_common, lambda path: common_strategy().load_common(str(path))):
        with pytest.raises(UserError, match=r"common\.pt: damaged or refused"):
            read(written)
    assert not trap.exists()


@pytest.fixture
def alone(tmp_path):
    """Initialize a process group of this process alone, with the CPU platform that core needs."""
    import torch.distributed as dist

    from megatron_ettin.platform import detect

    detect("cpu")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(key, tensor, axis, parts):
    """Return ShardedTensors that ask for every part of `key`, as the ranks of a tensor-parallel group would."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return [
        ShardedTensor.from_rank_offsets(key, torch.zeros_like(part), (axis, rank, parts))
        for rank, part in enumerate(tensor.chunk(parts, axis))
    ]


def load(state, folder):
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(state, str(folder), load_strategy(), common_strategy())


def test_core_load_reads_what_write_weights_wrote(written, alone):
    """Load at one and at two tensor-parallel ranks; the content of common.pt is returned too."""
    from megatron.core.dist_checkpointing import ShardedTensor

    expected = {key: tensor.contiguous() for key, tensor in example().items()}
    whole = {key: ShardedTensor.from_rank_offsets(key, torch.zeros_like(t)) for key, t in expected.items()}
    loaded = load(whole, written)
    assert loaded["progress"] == {"step": 3}
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    for key, axis in (
        ("embedding.word_embeddings.weight", 0),
        ("transformer.layers.0.self_attention.linear_proj.weight", 1),
    ):
        parts = load({"parts": sharded(key, expected[key], axis, 2)}, written)["parts"]
        assert torch.equal(torch.cat(parts, axis), expected[key])


def test_core_load_damaged_file_is_named(written, alone):
    wanted = {"w": sharded("scale2", torch.zeros(4), 0, 1)}
    file = min(written.glob("*.distcp"))
    whole = file.read_bytes()
    state = {"w": sharded("embedding.word_embeddings.weight", torch.zeros(10, 4), 0, 2)}
    file.write_bytes(whole[:40])
    with pytest.raises(UserError, match=file.name):
        load(state, written)
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name}: missing"):
        load(state, written)
    file.write_bytes(whole)
    (written / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"\.metadata: refused"):
        load(wanted, written)


def test_core_load_byte_entry_is_refused_and_not_unpickled(tmp_path, alone):
    """Refuse a byte entry that core requests as a ShardedObject, and one planted where a tensor is requested."""
    import torch.distributed.checkpoint as dcp
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    trap, folder = tmp_path / "sprung", tmp_path / "c"
    write_weights(folder, [], {})
    state = {"w": torch.ones(4), "layer._extra_state/shard_0_1": Trap(trap)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    assert not trap.exists()
    reader = CheckpointReader(folder)
    assert reader.keys() == ["w"]
    (name,) = set(SafeReader(folder).read_metadata().state_dict_metadata) - {"w"}
    assert torch.equal(reader.read("w"), torch.ones(4))
    with pytest.raises(UserError, match="pickled object"):
        reader.read(name)
    with pytest.raises(UserError, match="pickled object"):
        load({"x": ShardedObject("layer._extra_state", None, (1,), (0,))}, folder)

    def plant(metadata):
        metadata.state_dict_metadata["w"] = metadata.state_dict_metadata[name]
        index = next(index for index in metadata.storage_data if index.fqn == name)
        metadata.storage_data[MetadataIndex("w")] = metadata.storage_data[index]

    edit(folder, plant)
    with pytest.raises(UserError, match=r"checkpoint .*BytesStorageMetadata"):
        load({"w": ShardedTensor.from_rank_offsets("w", torch.zeros(4))}, folder)
    assert not trap.exists()


def test_core_load_restores_patched_names(written, alone):
    import megatron.core.dist_checkpointing.strategies.torch as core

    before = (core._get_filesystem_reader, core.MCoreLoadPlanner)
    load({"w": sharded("embedding.word_embeddings.weight", torch.zeros(10, 4), 0, 2)}, written)
    (written / ".metadata").unlink()
    with pytest.raises(UserError, match=r"\.metadata: missing"):
        load({"w": sharded("scale2", torch.zeros(4), 0, 1)}, written)
    assert (core._get_filesystem_reader, core.MCoreLoadPlanner) == before


def test_write_weights_format_record_is_read_by_core(written):
    from megatron.core.dist_checkpointing.core import maybe_load_config

    config = maybe_load_config(str(written))
    assert (config.sharded_backend, config.common_backend) == ("torch_dist", "torch")
    assert json.loads((written / "metadata.json").read_text())["sharded_backend_version"] == 1
