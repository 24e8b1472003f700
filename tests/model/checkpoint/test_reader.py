"""Reading checkpoints: both expert layouts, only what is asked for, and errors that say what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from divisi.model.checkpoint import Checkpoint, rank_tensors
from divisi.model.checkpoint.index import read_header
from divisi.model.config import ModelConfig
from divisi.model.errors import CheckpointError
from divisi.model.placement import Role
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

CONFIG_JSON = SMALL_CONFIG | {
    "num_hidden_layers": 4, "num_experts": 7, "num_experts_per_tok": 3, "mlp_only_layers": [1], "attention_bias": True,
}  # fmt: skip
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published")
    write_random_checkpoint(out, CONFIG_JSON, seed=3, tokenizer=False)
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    write_random_checkpoint(out, CONFIG_JSON, seed=3, layout="packed", tokenizer=False)
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    write_random_checkpoint(out, CONFIG_JSON, seed=3, tokenizer=False, max_file_bytes=200_000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    return out


@pytest.fixture
def damaged(published: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(published, tmp_path / "damaged"))


@pytest.fixture
def damaged_shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "damaged"))


def edit_tensors(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, model_dir / "model.safetensors")


@pytest.mark.parametrize("ids", [range(7), range(2, 5), (6, 0, 1, 3), ()])
def test_all_forms_hold_the_same_experts(published: Path, packed: Path, sharded: Path, ids: tuple[int, ...]) -> None:
    config = ModelConfig.load(published)
    found = [Checkpoint.open(path).read_experts(2, ids, config, torch.float32) for path in (published, packed, sharded)]
    gate_up_EFD, down_EDI = found[0]
    assert gate_up_EFD.shape == (len(ids), 2 * config.moe_intermediate_size, config.hidden_size)
    assert down_EDI.shape == (len(ids), config.hidden_size, config.moe_intermediate_size)
    for other in found[1:]:
        assert torch.equal(other[0], gate_up_EFD)
        assert torch.equal(other[1], down_EDI)


def test_gate_rows_come_first(published: Path) -> None:
    config = ModelConfig.load(published)
    tensors = load_file(published / "model.safetensors")
    gate_up_EFD, _ = Checkpoint.open(published).read_experts(0, [4], config, torch.bfloat16)
    gate, up = gate_up_EFD[0].chunk(2)
    assert torch.equal(gate, tensors["model.layers.0.mlp.experts.4.gate_proj.weight"])
    assert torch.equal(up, tensors["model.layers.0.mlp.experts.4.up_proj.weight"])


def test_read_gives_an_own_contiguous_copy(published: Path) -> None:
    checkpoint = Checkpoint.open(published)
    config = ModelConfig.load(published)
    shape = (config.vocab_size, config.hidden_size)
    first = checkpoint.read("lm_head.weight", shape, torch.float32)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    first.zero_()
    assert checkpoint.read("lm_head.weight", shape).dtype == torch.bfloat16
    assert checkpoint.read("lm_head.weight", shape).any()
    checkpoint.close()
    assert checkpoint.read("lm_head.weight", shape).any()


@pytest.mark.parametrize("form", ["published", "packed", "sharded"])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_role_reads_its_share_only(form: str, shards: int, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(form)
    config = ModelConfig.load(path)
    total = 0
    for role in Role.all_of(config, 1, shards):
        checkpoint = Checkpoint.open(path)
        if role.attention:
            for name in rank_tensors(config, checkpoint.tensors, role):
                checkpoint.read(name, checkpoint.shape(name))
        for layer in config.moe_layers if role.experts else ():
            checkpoint.read_experts(layer, role.experts, config, torch.float32)
        plan = rank_tensors(config, checkpoint.tensors, role)
        assert checkpoint.bytes_read == sum(plan.values()) > 0
        total += checkpoint.bytes_read
    assert total == sum(info.num_bytes for info in Checkpoint.open(path).tensors.values())


def test_plan_without_a_checkpoint_is_that_of_the_published_form(published: Path) -> None:
    config = ModelConfig.load(published)
    tensors = Checkpoint.open(published).tensors
    for role in Role.all_of(config, 1, 3):
        assert rank_tensors(config, None, role) == rank_tensors(config, tensors, role)


@pytest.mark.parametrize("form", ["published", "packed", "sharded"])
def test_complete_checkpoints_pass(form: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(form)
    Checkpoint.open(path).check_all(ModelConfig.load(path))


def test_mtp_tensors_and_foreign_ones_are_left_alone(damaged: Path) -> None:
    extra = {
        "mtp.fc.weight": torch.zeros(2),
        "vision.x": torch.zeros(1),
        "model.layers.3.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    edit_tensors(damaged, lambda tensors: tensors.update(extra))
    checkpoint = Checkpoint.open(damaged)
    checkpoint.check_all(ModelConfig.load(damaged))
    assert "mtp.fc.weight" in checkpoint.names
    assert "mtp.fc.weight" not in rank_tensors(ModelConfig.load(damaged), checkpoint.tensors, Role("x", True, range(7)))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(EXPERT), [EXPERT, "missing"]),
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight", "missing"]),
        (lambda t: t.update({EXPERT: torch.zeros(3, 5)}), [EXPERT, "expected shape [48, 96]", "found [3, 5]"]),
        (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), [EXPERT, "expected dtype", "found I8"]),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(1)}), ["model.layers.9.x", "expected no such tensor"]),
        (lambda t: t.update({"model.layers.2.mlp.experts.down_proj": torch.zeros(1)}), ["not both"]),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], object], parts: list[str], damaged: Path
) -> None:
    edit_tensors(damaged, change)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(damaged).check_all(ModelConfig.load(damaged))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_reading_checks_the_shape(published: Path) -> None:
    checkpoint = Checkpoint.open(published)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected shape \[5\]"):
        checkpoint.read("model.norm.weight", (5,))
    with pytest.raises(CheckpointError, match=r"nothing\.weight: missing"):
        checkpoint.read("nothing.weight", (5,))
    with pytest.raises(CheckpointError, match=r"experts\.7\.gate_proj\.weight: missing"):
        checkpoint.read_experts(0, [7], ModelConfig.load(published), torch.float32)


def test_a_tied_head_may_be_stored_all_the_same(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL_CONFIG | {"tie_word_embeddings": True}, tokenizer=False)
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).names
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    Checkpoint.open(tmp_path).check_all(ModelConfig.load(tmp_path))


def test_truncated_data_names_the_tensor(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    header = read_header(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        Checkpoint.open(damaged)
    assert any(name in str(caught.value) for name in header)


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_truncated_header(size: int, damaged: Path) -> None:
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(damaged)


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("{]", "damaged safetensors header"),
        ("[]", "not a JSON object"),
        ('{"a":{}}', "damaged header entry of a"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "should take 8 bytes, found 4"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "a should end at byte 8"),
    ],
)
def test_damaged_header(header: str, part: str, tmp_path: Path) -> None:
    raw = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"1234")
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        Checkpoint.open(tmp_path)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        (None, ["empty directory"]),
        ("pytorch_model.bin", ["pickle", "pytorch_model.bin", "convert"]),
        ("weights.pt", ["pickle", "weights.pt"]),
        ("model-00001-of-00002.safetensors", ["expected 2 files", "download model-00002-of-00002.safetensors"]),
        ("config.json", ["config.json"]),
    ],
)
def test_directories_without_weights(file: str | None, parts: list[str], tmp_path: Path) -> None:
    if file is not None:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert all(part in str(caught.value) for part in [*parts, "expected"]), str(caught.value)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model directory"):
        Checkpoint.open(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "bad index"),
        ("{}", "bad index"),
        ('{"weight_map": []}', "non-empty object"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "no safetensors file name"),
        ('{"weight_map": {"a": "x.bin"}}', "no safetensors file name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "a: expected in gone.safetensors"),
    ],
)
def test_bad_index(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert part in str(caught.value)


def test_index_that_points_to_the_wrong_file(damaged_shards: Path) -> None:
    path = damaged_shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.embed_tokens.weight"] = files[-1]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: expected in .* found"):
        Checkpoint.open(damaged_shards)


@pytest.mark.parametrize("stem", ["model", "qwen3-next.fp16"])
def test_shards_without_an_index_are_known_by_their_names(damaged_shards: Path, sharded: Path, stem: str) -> None:
    (damaged_shards / "model.safetensors.index.json").unlink()
    for file in damaged_shards.glob("model-*.safetensors"):
        file.rename(file.with_name(file.name.replace("model", stem)))
    checkpoint = Checkpoint.open(damaged_shards)
    assert checkpoint.names == Checkpoint.open(sharded).names
    checkpoint.check_all(ModelConfig.load(damaged_shards))


def test_a_shard_that_is_missing_without_an_index_is_named(damaged_shards: Path) -> None:
    (damaged_shards / "model.safetensors.index.json").unlink()
    files = sorted(damaged_shards.glob("model-*.safetensors"))
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"download {files[1].name}"):
        Checkpoint.open(damaged_shards)


def test_a_tensor_in_two_files_without_an_index_is_refused(damaged_shards: Path) -> None:
    (damaged_shards / "model.safetensors.index.json").unlink()
    first, second, *_ = sorted(damaged_shards.glob("model-*.safetensors"))
    save_file(load_file(first), second)
    with pytest.raises(CheckpointError, match=f"found in both {first.name} and {second.name}"):
        Checkpoint.open(damaged_shards)


def test_the_only_file_may_have_any_name(damaged: Path, published: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "weights.safetensors")
    assert Checkpoint.open(damaged).names == Checkpoint.open(published).names


def test_files_whose_names_do_not_say_what_belongs_together_are_refused(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "a.safetensors")
    shutil.copy(damaged / "a.safetensors", damaged / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"found a\.safetensors, b\.safetensors without an index"):
        Checkpoint.open(damaged)


def test_an_index_may_begin_with_a_byte_order_mark(damaged_shards: Path, sharded: Path) -> None:
    path = damaged_shards / "model.safetensors.index.json"
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert Checkpoint.open(damaged_shards).names == Checkpoint.open(sharded).names
