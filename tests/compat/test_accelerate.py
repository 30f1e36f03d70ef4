"""``accelerate`` replaces supported blocks and reports why it keeps others; ``restore`` undoes it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msflow_ext as mx


def test_the_report_names_what_was_replaced_fused_and_kept(make):
    model = nn.ModuleDict(
        {"flow": make.chain(blocks=2), "gin": make.block(gin_block=True), "other": nn.Linear(2, 2)}
    )
    report = mx.accelerate(model)
    assert report.replaced == ["flow.module_list.0", "flow.module_list.1"]
    assert report.kept == {"gin": "it is a GIN block, for which there is no kernel"}
    assert report.fused == {"flow": "a chain without cat and split between the blocks"}
    assert str(report).splitlines() == [
        "replaced 2: flow.module_list.0, flow.module_list.1",
        "kept gin: it is a GIN block, for which there is no kernel",
        "fused flow: a chain without cat and split between the blocks",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gin_block": True}, "it is a GIN block"),
        ({"learned_householder_permutation": 2}, "it has learned reflections"),
        (
            {"affine_clamping": torch.tensor(2.0)},
            r"its clamp must be a positive number, got tensor\(2\.\)",
        ),
        ({"affine_clamping": -1.0}, "its clamp must be a positive number, got -1.0"),
    ],
)
def test_a_block_without_a_kernel_is_kept(make, options, reason):
    block = make.block(**options)
    inputs = make.data()
    expected = make.results(block, inputs)
    report = mx.accelerate(nn.ModuleList([block, make.block()]))
    assert list(report.kept) == ["0"]
    assert re.match(reason, report.kept["0"])
    make.same(make.results(block, inputs), expected, 0)


def test_a_model_without_blocks_to_replace_is_refused(make):
    with pytest.raises(ValueError, match=r"must contain an AllInOneBlock .* got Sequential$"):
        mx.accelerate(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"got ModuleList \(0: it is a GIN block"):
        mx.accelerate(nn.ModuleList([make.block(gin_block=True)]))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got list"):
        mx.accelerate([make.block()])  # type: ignore[arg-type]


def test_a_subclass_that_overrides_a_function_is_kept(make):
    class Doubling(make.classes["0.2"]):
        def forward(self, *args: Any, **options: Any) -> Any:
            (y,), log_det = super().forward(*args, **options)
            return (2 * y,), log_det

    class Shifting(make.classes["0.2"]):
        def _permute(self, x: Tensor, rev: bool = False) -> Any:
            return super()._permute(x + 1, rev)

    class Named(make.classes["0.2"]):
        def name(self) -> str:
            return "named"

    model: Any = nn.ModuleList(
        cls([(6, 4, 3)], subnet_constructor=make.hidden(2)) for cls in (Doubling, Shifting, Named)
    )
    report = mx.accelerate(model)
    assert report.kept == {
        "0": "its class Doubling overrides forward",
        "1": "its class Shifting overrides _permute",
    }
    assert [type(m) for m in model[:2]] == [Doubling, Shifting]
    assert report.replaced == ["2"]
    assert isinstance(model[2], Named) and model[2].name() == "named"


def test_a_block_with_a_forward_on_the_instance_is_kept(make):
    model = nn.ModuleList([make.block(), make.block()])
    model[0].forward = lambda x, **_: (tuple(x), 0)
    report = mx.accelerate(model)
    assert report.kept == {"0": "its forward was replaced on the instance"}


def test_a_parametrized_block_is_kept(make):
    model = nn.ModuleList([make.block(), make.block()])
    nn.utils.parametrize.register_parametrization(model[0], "global_offset", nn.Identity())
    assert mx.accelerate(model).kept == {"0": "it is parametrized"}


def test_a_block_on_the_meta_device_is_kept(make):
    model = nn.ModuleList([make.block().to("meta"), make.block()])
    report = mx.accelerate(model)
    assert report.kept == {"0": "it is on the meta device, where nothing can be compared"}
    assert report.replaced == ["1"]


def test_a_block_shared_by_two_parents_is_replaced_for_both(make):
    chain, inputs = make.chain(blocks=2), make.data()
    model = nn.ModuleDict({"chain": chain, "block": chain[1]})
    expected = make.results(chain, inputs), make.results(chain[1], inputs)
    report = mx.accelerate(model)
    assert report.replaced == ["chain.module_list.0", "chain.module_list.1"]
    assert model["block"] is chain[1]
    make.same(make.results(chain, inputs), expected[0])
    make.same(make.results(model["block"], inputs), expected[1])


def test_accelerating_twice_is_the_same_as_once(make):
    chain, inputs = make.chain(blocks=2), make.data()
    expected = make.results(chain, inputs)
    mx.accelerate(chain)
    types = [type(m) for m in chain.modules()]
    report = mx.accelerate(chain)
    assert not report.replaced and not report.fused
    assert report.kept == {f"module_list.{i}": "it is already accelerated" for i in range(2)}
    assert [type(m) for m in chain.modules()] == types
    make.same(make.results(chain, inputs), expected)


def test_accelerated_blocks_become_a_chain(make):
    chain, inputs = make.chain(blocks=2), make.data()
    expected = make.results(chain, inputs)
    mx.accelerate(chain.module_list)
    assert list(mx.accelerate(chain).fused) == [""]
    make.same(make.results(chain, inputs), expected)


def test_restore_gives_every_module_its_class_and_attributes_back(make):
    chain, inputs = make.chain(blocks=2), make.data()
    before = [(m, type(m), dict(vars(m))) for m in chain.modules()]
    expected = make.results(chain, inputs)
    mx.accelerate(chain)
    mx.restore(chain)
    assert [(m, type(m), vars(m)) for m in chain.modules()] == before
    make.same(make.results(chain, inputs), expected, 0)
    mx.restore(chain)  # a second call changes nothing


def test_a_chain_works_after_one_of_its_blocks_is_restored(make):
    chain, inputs = make.chain(), make.data()
    expected = make.results(chain, inputs)
    mx.accelerate(chain)
    mx.restore(chain[1])
    make.same(make.results(chain, inputs), expected)


def test_blocks_in_a_graph_are_replaced(freia, make):
    framework = freia.framework
    nodes = [framework.InputNode(6, 4, 3), framework.ConditionNode(2, 4, 3)]
    last = nodes[0]
    for _ in range(2):
        last = framework.Node(
            last,
            make.classes["0.2"],
            {"subnet_constructor": make.hidden(2)},
            conditions=nodes[1],
        )
        nodes.append(last)
    graph = framework.GraphINN([*nodes, framework.OutputNode(last)]).double()
    x, c = make.data(cond=(2,))
    for rev in (False, True):
        expected, log_det = graph(x, c=[c], rev=rev)
        assert len(mx.accelerate(graph).replaced) == 2
        y, got = graph(x, c=[c], rev=rev)
        mx.restore(graph)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got, log_det, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["0.2", "head"])
def test_training_gives_the_weights_of_the_original_run(make, form):
    chain = make.chain(form, channels=5, cond=2)
    ends = []
    for accelerated in (False, True):
        model = copy.deepcopy(chain)
        if accelerated:
            mx.accelerate(model)
        numbers = torch.Generator().manual_seed(0)
        adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(100):
            x, c = (torch.randn(2, n, 4, 3, generator=numbers).double() for n in (5, 2))
            z, log_det = model(x, [c])
            loss = (0.5 * z.square().sum((1, 2, 3)) - log_det).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        ends.append(model.state_dict())
    moved = max(float((ends[0][k] - v).abs().max()) for k, v in chain.state_dict().items())
    assert moved > 0.05
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-8, atol=1e-8)


def test_accelerating_during_training_keeps_hooks_and_accumulated_gradients(make):
    original = make.chain()
    models, x = (original, copy.deepcopy(original)), make.data()[0]
    ends = []
    for model, fast in zip(models, (False, True), strict=True):
        seen: list[str] = []
        for name in ("", "module_list.1", "module_list.1.subnet"):
            part = model.get_submodule(name)
            part.register_forward_pre_hook(lambda *_, n=name, s=seen: s.append(f"before {n}"))
            part.register_forward_hook(lambda *_, n=name, s=seen: s.append(f"after {n}"))
        model[1].global_scale.register_hook(lambda _, s=seen: s.append("gradient"))
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(4):
            z, log_det = model(x)
            (0.5 * z.square().sum((1, 2, 3)) - log_det).mean().backward()
            if fast and step == 2:  # the next step adds to these gradients
                mx.accelerate(model)
            if step % 2:
                adam.step()
                adam.zero_grad()
        ends.append((seen, list(model.parameters())))
    assert len(ends[0][0]) == 4 * 7 and ends[1][0] == ends[0][0]
    for got, want in zip(ends[1][1], ends[0][1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_msflow_on_freia_is_accelerated_and_its_fusion_layer_kept(freia):
    from msflow_ext.bench.reference import ReferenceMSFlow

    head = mx.MSFlowHead((8, 12), blocks=(1, 2), cond_channels=4, seed=0)
    reference = ReferenceMSFlow(head, [(8, 8), (4, 4)])
    features = [torch.randn(2, 8, 8, 8), torch.randn(2, 12, 4, 4)]
    expected, log_det = reference(features)
    report = mx.accelerate(reference)
    assert len(report.replaced) == 3
    assert set(report.fused.values()) == {
        "LayerNorm and ReLU in one pass",
        "a chain without cat and split between the blocks",
    }
    assert report.kept == {
        "fusion": "it is MSFlow's fusion layer, which spends its time in convolutions"
    }
    z, got = reference(features)
    for each, want in zip([*z, got], [*expected, log_det], strict=True):
        torch.testing.assert_close(each, want, rtol=1e-4, atol=1e-4)
