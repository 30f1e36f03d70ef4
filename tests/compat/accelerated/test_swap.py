"""An accelerated model keeps its parameters, and works with copies, compilers, exporters, hooks and DDP."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import msflow_ext as mx

FORMS = pytest.mark.parametrize("form", ["0.2", "head"])


@pytest.fixture
def pair(make) -> tuple[Any, Any, Tensor]:
    """Return a chain, an accelerated copy of it, and data."""
    chain = make.chain()
    fast = copy.deepcopy(chain)
    mx.accelerate(fast)
    return chain, fast, make.data()[0]


def close(got: Any, expected: Any, bound: float = 1e-10) -> None:
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, w, rtol=bound, atol=bound)


@FORMS
def test_parameters_and_state_dict_keep_their_objects_and_names(make, form):
    chain = make.chain(form)
    before, state = dict(chain.named_parameters()), chain.state_dict()
    buffers, modules = dict(chain.named_buffers()), dict(chain.named_modules())
    for change in (mx.accelerate, mx.restore):
        change(chain)
        now = dict(chain.named_parameters())
        assert list(now) == list(before)
        assert all(now[name] is before[name] for name in before)
        assert dict(chain.named_buffers()) == buffers
        assert dict(chain.named_modules()) == modules
        assert list(chain.state_dict()) == list(state)


def test_state_dicts_load_from_and_into_a_model_that_is_not_accelerated(make, pair):
    chain, fast, x = pair
    other = make.chain()
    other.load_state_dict(fast.state_dict())
    close(other(x), chain(x))
    again = make.chain()
    mx.accelerate(again)
    again.load_state_dict(chain.state_dict())
    close(again(x), chain(x))


def test_an_optimizer_keeps_working_after_accelerate_and_restore(make):
    chain = make.chain()
    x = make.data()[0]
    adam = torch.optim.Adam(chain.parameters(), lr=1e-2)

    def step() -> float:
        adam.zero_grad()
        z, log_det = chain(x)
        loss = (0.5 * z.square().sum((1, 2, 3)) - log_det).mean()
        loss.backward()
        adam.step()
        return loss.item()

    losses = [step()]
    mx.accelerate(chain)
    losses += [step() for _ in range(5)]
    mx.restore(chain)
    losses.append(step())
    assert losses == sorted(losses, reverse=True)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("journey", [copy.deepcopy, through_pickle, through_a_file])
def test_a_copy_is_accelerated_independent_and_can_be_restored(pair, journey):
    chain, fast, x = pair
    for block in fast:
        block.global_scale_activation = torch.exp  # FrEIA uses a lambda, which cannot be pickled
    for block in chain:
        block.global_scale_activation = torch.exp
    other = journey(fast)
    assert type(other) is type(fast) and type(other[0]) is type(fast[0])
    close(other(x), chain(x))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    close(fast(x), chain(x))
    mx.restore(other)
    assert type(other) is type(chain) and type(other[0]) is type(chain[0])
    assert vars(other[0]).keys() == vars(chain[0]).keys()


def test_a_shallow_copy_shares_its_parameters(pair):
    _, fast, x = pair
    other = copy.copy(fast[0])
    assert other.global_scale is fast[0].global_scale
    close(other([x])[0], fast[0]([x])[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_compiles_without_graph_breaks_and_gives_the_same_results(pair, dynamic):
    chain, fast, x = pair
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    found = []
    for model in (compiled, chain):
        leaf = x.clone().requires_grad_()
        z, log_det = model(leaf)
        grads = torch.autograd.grad(z.cos().sum() + log_det.sum(), leaf)
        found.append((z, log_det, *grads))
    close(*found)


def test_a_compiled_model_is_compiled_again_after_accelerate_and_restore(pair):
    chain, _, x = pair
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="eager")
    expected = compiled(x)
    for change in (mx.accelerate, mx.restore):
        change(chain)
        close(compiled(x), expected)


def graph_of_export(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,)).graph


def graph_of_strict_export(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), strict=True).graph


def graph_of_make_fx(model: nn.Module, x: Tensor) -> Any:
    return make_fx(lambda t: model(t))(x).graph


@pytest.mark.parametrize(
    "graph", [graph_of_export, graph_of_strict_export, graph_of_make_fx], ids=lambda f: f.__name__
)
@pytest.mark.filterwarnings("ignore")
def test_an_exported_graph_has_the_operators_of_the_original(pair, graph):
    chain, fast, x = pair
    operators = [[str(n.target) for n in graph(m, x).nodes] for m in (chain, fast)]
    assert operators[0] == operators[1]


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_a_traced_graph_has_the_operators_of_the_original(pair):
    chain, fast, x = pair
    kinds = []
    for model in (chain, fast):
        traced: Any = torch.jit.trace(model, (x,), check_trace=False)  # pyright: ignore[reportPrivateImportUsage]
        close(traced(x), chain(x))
        kinds.append([node.kind() for node in traced.inlined_graph.nodes()])
    assert kinds[0] == kinds[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_has_the_operators_of_the_original(pair):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    operators = []
    for model in pair[:2]:
        program = torch.onnx.export(model.eval().float(), (pair[2].float(),), verbose=False)
        assert program is not None
        operators.append([node.op_type for node in program.model.graph])
    assert operators[0] == operators[1]


def test_functional_transforms_work(pair):
    chain, fast, x = pair
    close(*(torch.func.jacrev(lambda t, m=m: m(t)[0])(x[:1]) for m in (fast, chain)))
    close(*(torch.func.vmap(lambda t, m=m: m(t[None])[0])(x) for m in (fast, chain)))


def test_a_functional_call_uses_the_given_permutation(make, pair):
    _, fast, x = pair
    other = make.chain()
    found = torch.func.functional_call(fast, dict(other.named_parameters()), (x,))
    close(found, other(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_stay_close_to_double(pair, dtype):
    chain, fast, x = pair
    (z, log_det), half = chain(x), x.to(dtype)
    with torch.autocast("cpu", dtype):
        got = fast.float()(x.float())
    close([t.double() for t in got], (z, log_det), 0.1)
    y, got = fast.to(dtype)(half)
    assert y.dtype is dtype and got.dtype is torch.float32
    close([y.double(), got.double()], (z, log_det), 0.2)
    back, _ = fast(y, rev=True)
    assert back.dtype is dtype


def test_a_subnet_that_returns_float32_under_autocast_gives_float32_results(make):
    class Normed(nn.Module):
        def __init__(self, channels_in: int, channels_out: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels_in, channels_out, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).float().softmax(1)

    block = make.block(subnet_constructor=Normed)
    x = make.data()[0]
    (expected,), _ = block.float()([x.float()])
    mx.accelerate(block)
    with torch.autocast("cpu", torch.bfloat16):
        for rev in (False, True):
            (y,), log_det = block([x.bfloat16()], rev=rev)
            assert y.dtype is log_det.dtype is torch.float32
        (y,), _ = block([x.bfloat16()])
    close([y], [expected], 0.1)


def test_the_permutation_follows_to_another_device_and_back(pair):
    chain, fast, x = pair
    (z, _), on_meta = chain(x), copy.deepcopy(fast).to("meta")
    assert on_meta(x.to("meta"))[0].shape == z.shape
    on_meta.to_empty(device="cpu").load_state_dict(fast.state_dict())
    close(on_meta(x), chain(x))


def test_hooks_on_the_chain_and_on_every_part_of_it_run_once(pair):
    _, fast, x = pair
    expected, seen = fast(x), []
    names = ["", "module_list.1", "module_list.1.subnet", "module_list.2.subnet.0"]
    for name in names:
        part = fast.get_submodule(name)
        part.register_forward_hook(lambda m, x, y, name=name: seen.append(name))
        part.register_forward_pre_hook(lambda m, x, name=name: seen.append("pre " + name))
    close(fast(x), expected)
    assert sorted(seen) == sorted([*names, *("pre " + name for name in names)])


def test_a_hook_may_change_what_an_inner_block_gives(pair):
    chain, fast, x = pair
    for model in (chain, fast):
        model[1].register_forward_hook(lambda m, x, y: ((2 * y[0][0],), y[1]))
    close(fast(x), chain(x))


def test_backward_hooks_of_an_inner_block_run(pair):
    chain, fast, x = pair
    seen = []
    for model in (chain, fast):
        model[1].register_full_backward_pre_hook(lambda m, grads: seen.append(grads[1]))
        model(x)[1].sum().backward()
    close(seen[:1], seen[1:])


def test_training_and_evaluation_reach_the_subnets(make):
    block = make.block(subnet_constructor=lambda i, o: nn.Sequential(nn.Linear(i, o)), rank=0)
    block.eval()
    mx.accelerate(block)
    assert not any(m.training for m in block.modules())
    block.train()
    assert all(m.training for m in block.modules())


def test_distributed_training_works(pair, tmp_path):
    chain, fast, x = pair
    dist = torch.distributed
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", world_size=1, rank=0
    )
    try:
        found = []
        for model in (chain, fast):
            nn.parallel.DistributedDataParallel(model)(x)[0].square().sum().backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
        close(*found)
    finally:
        dist.destroy_process_group()


def test_a_module_whose_class_was_changed_later_is_not_restored(pair):
    _, fast, _ = pair
    nn.utils.parametrize.register_parametrization(fast[0], "global_offset", nn.Identity())
    with pytest.raises(
        ValueError, match=r"the class of module_list\.0 was changed after accelerate"
    ):
        mx.restore(fast)
    assert type(fast[1]).__name__ == "AcceleratedAllInOneBlock"
