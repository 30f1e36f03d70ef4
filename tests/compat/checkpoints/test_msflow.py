"""Reference checkpoints load in every encoding and convert back; an error names a broken file."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msflow_ext import MSFlowHead, compat
from msflow_ext.compat.checkpoints.msflow import (
    flatten_checkpoint,
    head_from_state_dict,
    read_permutation,
    to_reference_state_dict,
)
from msflow_ext.testing import relative_error

Checkpoint = dict[str, Any]
Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = ("model_a.checkpoint.pt", "model_a.checkpoint_index.pt", "model_c.checkpoint.pt")


def load(name: str) -> Checkpoint:
    return torch.load(GOLDEN / name, weights_only=True)


@pytest.fixture
def checkpoint() -> Checkpoint:
    """Return the smallest of the checkpoints."""
    return load("model_c.checkpoint.pt")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def save(checkpoint: Any) -> Path:
        torch.save(checkpoint, tmp_path / "saved.pt")
        return tmp_path / "saved.pt"

    return save


@pytest.mark.parametrize("file", FILES)
def test_a_published_checkpoint_gives_the_recorded_latents(golden: Golden, file: str) -> None:
    tensors, meta = golden(file.split(".")[0])
    head = compat.load_msflow_checkpoint(GOLDEN / file, clamp=meta["clamp_alpha"])
    assert head.channels == tuple(meta["channels"])
    assert head.blocks == tuple(meta["blocks"])
    assert head.cond_channels == tuple(meta["c_conds"])
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    out = head.double()([tensors[f"f64.y{s}"] for s in range(len(head.channels))])
    for s, z in enumerate(out.z):
        assert relative_error(z, tensors[f"f64.z{s}"]) <= 1e-10
    assert relative_error(out.log_det, tensors["f64.jac_total"]) <= 1e-10


def test_both_encodings_of_the_permutations_give_the_same_head() -> None:
    dense, index = (compat.load_msflow_checkpoint(GOLDEN / file) for file in FILES[:2])
    for key, value in dense.state_dict().items():
        assert torch.equal(value, index.state_dict()[key]), key


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("index", [False, True], ids=["dense", "index"])
def test_a_head_converts_to_the_reference_state_and_back(
    index: bool, order: tuple[int, ...]
) -> None:
    head = MSFlowHead((6, 8, 10), blocks=(1, 2, 1), cond_channels=(4, 8, 4), seed=3)
    state = to_reference_state_dict(head, index_permutations=index, fusion_order=order)
    assert [len(state[f"fusion_flow.module_list.{j}.perm"]) for j in range(3)] == [
        head.channels[s] for s in order
    ]
    back = head_from_state_dict(state)
    for key, value in head.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key


@pytest.mark.parametrize("file", FILES)
def test_a_loaded_head_converts_back_to_the_published_state(file: str) -> None:
    expected = flatten_checkpoint(load(file))
    head = compat.load_msflow_checkpoint(GOLDEN / file)
    sizes = [len(expected[f"fusion_flow.module_list.{j}.perm"]) for j in range(len(head.channels))]
    got = to_reference_state_dict(
        head,
        index_permutations="index" in file,
        fusion_order=[head.channels.index(size) for size in sizes],
    )
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert (got[key].dtype, got[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(got[key], value), key


def test_equal_channel_counts_need_an_order(saved: Callable[[Any], Path]) -> None:
    head = MSFlowHead((8, 8), blocks=(1, 1), cond_channels=4, seed=1)
    path = saved(reference_layout(to_reference_state_dict(head, fusion_order=(1, 0)), 2))
    with pytest.raises(ValueError, match=r"fusion_order must be given, .*: \(8, 8\)"):
        compat.load_msflow_checkpoint(path)
    back = compat.load_msflow_checkpoint(path, fusion_order=(1, 0))
    other = compat.load_msflow_checkpoint(path, fusion_order=(0, 1))
    assert torch.equal(back.fusion.perms()[0], head.fusion.perms()[0])
    assert torch.equal(other.fusion.perms()[0], head.fusion.perms()[1])


@pytest.mark.parametrize("order", [(0, 0), (1, 0), (0,), (0, 2)], ids=str)
def test_an_order_that_does_not_fit_is_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"fusion_order must order .* permutations with \[16, 20\] channels, got"
    ):
        compat.load_msflow_checkpoint(GOLDEN / "model_c.checkpoint.pt", fusion_order=order)


def test_arguments_set_the_clamp_and_its_form() -> None:
    path = GOLDEN / "model_c.checkpoint.pt"
    head = compat.load_msflow_checkpoint(path, clamp=1.3, clamp_form="head")
    assert (head.clamp, head.clamp_form) == (1.3, "head")
    assert compat.load_msflow_checkpoint(path).clamp == 1.9


def reference_layout(state: dict[str, Tensor], scales: int) -> Checkpoint:
    """Return a checkpoint from a flat state dict, the inverse of :func:`flatten_checkpoint`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}

    flows = [part(f"parallel_flows.{i}.") for i in range(scales)]
    return {"epoch": 0, "fusion_flow": part("fusion_flow."), "parallel_flows": flows}


def changed(part: str, key: str, value: Any) -> Callable[[Checkpoint], None]:
    """Return a function that sets (or, by None, removes) an entry of ``fusion_flow`` or of parallel flow ``part``."""

    def change(checkpoint: Checkpoint) -> None:
        fusion = part == "fusion_flow"
        state = checkpoint[part] if fusion else checkpoint["parallel_flows"][int(part)]
        state.pop(key) if value is None else state.update({key: value})

    return change


BLOCK, CROSS = "module_list.0.", "module_list.2.subnet_1.cross_convs."
BROKEN: dict[str, tuple[Callable[[Checkpoint], None], str]] = {
    "missing weight": (
        changed("0", BLOCK + "subnet.ln.bias", None),
        r"missing parallel_flows\.0\.module_list\.0\.subnet\.ln\.bias",
    ),
    "missing scale": (
        changed("1", BLOCK + "global_scale", None),
        r"missing parallel_flows\.1\.module_list\.0\.global_scale",
    ),
    "missing permutation": (
        changed("fusion_flow", BLOCK + "perm", None),
        r"missing fusion_flow\.module_list\.0\.perm",
    ),
    "unexpected": (
        changed("0", BLOCK + "extra", torch.zeros(1)),
        r"unexpected parallel_flows\.0\.module_list\.0\.extra",
    ),
    "misshapen": (
        changed("fusion_flow", CROSS + "conv1.weight", torch.zeros(4, 18, 1, 1)),
        r"cross_convs\.conv1\.weight must have shape \(4, 18, 3, 3\), got \(4, 18, 1, 1\)",
    ),
    "no dimensions": (
        changed("0", BLOCK + "global_scale", torch.tensor(1.0)),
        r"global_scale must have more than 1 dimensions, got shape \(\)",
    ),
    "not a tensor": (changed("0", BLOCK + "global_offset", 3), "global_offset"),
    "whole numbers": (
        changed("fusion_flow", CROSS + "conv1.weight", torch.ones(4, 18, 3, 3, dtype=torch.int64)),
        r"cross_convs\.conv1\.weight",
    ),
    "odd condition": (
        changed("0", BLOCK + "subnet.conv1.weight", torch.zeros(14, 14, 3, 3)),
        "cond_channels must be multiples of 4",
    ),
    "block far away": (
        changed("1", "module_list.999.global_scale", torch.zeros(1, 20, 1, 1)),
        r"unexpected parallel_flows\.1\.module_list\.999\.global_scale",
    ),
    "doubled channel": (
        changed("fusion_flow", BLOCK + "perm", torch.zeros(16, dtype=torch.int64)),
        r"fusion_flow\.module_list\.0\.perm must be a permutation of 16 channels",
    ),
    "float index": (
        changed("0", BLOCK + "w_perm", torch.arange(16.0)),
        r"w_perm must be a permutation of 16 channels .* got torch.float32 \(16,\)",
    ),
    "soft permutation": (
        changed("0", BLOCK + "w_perm", torch.full((16, 16, 1, 1), 1 / 16)),
        "w_perm must be a matrix of zeros and ones",
    ),
    "another inverse": (
        changed("fusion_flow", BLOCK + "perm_inv", torch.arange(16)),
        "perm_inv must be the inverse of fusion_flow.module_list.0.perm",
    ),
    "one flow": (
        lambda c: c["parallel_flows"].pop(),
        "channels must have two scales or more",
    ),
    "no flow": (lambda c: c["parallel_flows"].clear(), "must hold keys 'parallel_flows.0"),
    "flows by name": (
        lambda c: c.update(parallel_flows={}),
        r"must hold 'fusion_flow' and 'parallel_flows', got \['epoch', 'fusion_flow'",
    ),
    "another model": (
        lambda c: (c.clear(), c.update(state_dict={})),  # type: ignore[func-returns-value]
        r"must hold 'fusion_flow' and 'parallel_flows', got \['state_dict'\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_sentence_that_names_the_file(
    checkpoint: Checkpoint, saved: Callable[[Any], Path], case: str
) -> None:
    change, message = BROKEN[case]
    change(checkpoint)
    with pytest.raises(ValueError, match=rf"saved\.pt: .*{message}") as error:
        compat.load_msflow_checkpoint(saved(checkpoint))
    assert "\n" not in str(error.value)


def test_all_wrong_keys_are_named_at_once(
    checkpoint: Checkpoint, saved: Callable[[Any], Path]
) -> None:
    for case in ("missing weight", "unexpected", "misshapen"):
        BROKEN[case][0](checkpoint)
    with pytest.raises(
        ValueError, match=r"missing .*; unexpected .*; .* must have shape "
    ) as error:
        compat.load_msflow_checkpoint(saved(checkpoint))
    assert str(error.value).count(";") == 2


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text"], ids=["list", "tensor", "str"])
def test_a_file_without_a_dictionary_is_refused(content: Any, saved: Callable[[Any], Path]) -> None:
    name = type(content).__name__
    with pytest.raises(ValueError, match=rf"saved\.pt: a checkpoint must be a .* got {name}"):
        compat.load_msflow_checkpoint(saved(content))


def unreadable() -> dict[str, bytes]:
    """Return files that are not checkpoints, and truncated checkpoints in both formats of torch."""
    zipped = (GOLDEN / "model_c.checkpoint.pt").read_bytes()
    legacy, archive = io.BytesIO(), io.BytesIO()
    torch.save(load("model_c.checkpoint.pt"), legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(archive, "w") as other:
        other.writestr("readme.txt", "no checkpoint")
    return {
        "empty": b"",
        "text": b"hello world\n",
        "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "archive": archive.getvalue(),
        **{f"first-{n}": zipped[:n] for n in (7, 1000, 10000, len(zipped) // 2, len(zipped) - 1)},
        **{f"legacy-{n}": legacy.getvalue()[:n] for n in (7, 28, 49, 5000, 100000)},
    }


@pytest.mark.parametrize("case", UNREADABLE := unreadable())
def test_an_unreadable_file_is_one_sentence_that_names_it(tmp_path: Path, case: str) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(UNREADABLE[case])
    with pytest.raises(
        ValueError, match=r"broken\.pt cannot be read as a torch checkpoint"
    ) as error:
        compat.load_msflow_checkpoint(path)
    assert "\n" not in str(error.value)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if legacy:
        Path("evil.pt").write_bytes(pickle.dumps({"fusion_flow": Code()}, protocol=2))
    else:
        torch.save({"fusion_flow": Code(), "parallel_flows": []}, "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read as a torch checkpoint"):
        compat.load_msflow_checkpoint("evil.pt")
    assert not Path("executed").exists()


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} cannot be read: no such file"):
            compat.load_msflow_checkpoint(path)


def test_a_permutation_reads_the_same_from_both_encodings() -> None:
    perm = torch.tensor([2, 0, 3, 1])
    dense = torch.eye(4)[perm][:, :, None, None]
    state = {"a": perm, "a_inv": perm.argsort(), "b": dense, "b_inv": dense.transpose(0, 1)}
    assert torch.equal(read_permutation(state, "a", 4), perm)
    assert torch.equal(read_permutation(state, "b", 4), perm)
