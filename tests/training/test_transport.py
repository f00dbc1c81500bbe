"""What an optimizer keeps, carried over a squeeze: against autograd in float64."""

import copy

import pytest
import torch
from live_models import CASES, Linears, inputs, make
from peft.tuners.lora import LoraLayer

from loratools.training import squeeze_model
from loratools_formats.disk.errors import OptionError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KINDS = ["linear", "rslora", "patterns", "dora", "lora_bias", "Conv1D", "convolution",
         "one dimension", "embedding"]  # fmt: skip


def of_low_rank(kind, rank=3, **config):
    """Return a model in float64 whose factors of rank 8 have products of a lower rank."""
    model = make(kind, **{**config, "dtype": torch.float64})
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for held in (module.lora_A, module.lora_embedding_A):
                for part in held.values():
                    a = part if isinstance(part, torch.nn.Parameter) else part.weight
                    with torch.no_grad():
                        flat = a.reshape(len(a), -1)
                        mix = torch.randn(len(a), rank, generator=generator, dtype=a.dtype)
                        a.copy_((mix @ flat[:rank]).reshape(a.shape))
    return model


def trained(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in trained(model).items()}


def same(got, want, tolerance=1e-10):
    """Whether tensors agree to rounding, each relative to the largest of all."""
    size = max(float(w.abs().max()) for w in want.values())
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert float((got[name] - value).abs().max()) <= tolerance * size, name


def input_of(kind):
    x = inputs(kind)
    return x if x.dtype == torch.int64 else x.double()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("alpha", ["keep-scale", "sqrt"])
def test_pending_gradients_become_those_that_autograd_gives(name, alpha):
    # ΔW is of rank 3, so that a squeeze to 3 leaves the function, and ∂L/∂ΔW, as they are.
    kind, config = CASES[name]
    model = of_low_rank(kind, **config)
    x = input_of(kind)
    gradients(model, x)
    squeeze_model(model, rank=3, alpha=alpha)
    carried = {n: p.grad.clone() for n, p in trained(model).items()}
    same(carried, gradients(model, x))


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_momentum_is_what_it_were_with_the_new_factors_all_along(kind):
    # Steps of rate 0: gradients of several batches add up, and the factors stand still.
    model = of_low_rank(Linears, lora_bias=True)
    reference = copy.deepcopy(model)
    squeeze_model(reference, rank=3, alpha="sqrt")
    more = {"momentum": 0.9} if kind == "SGD" else {"weight_decay": 0.0}
    optimizers = {}
    for name, each in (("carried", model), ("reference", reference)):
        optimizers[name] = getattr(torch.optim, kind)(trained(each).values(), lr=0.0, **more)
        for seed in range(4):
            each.zero_grad()
            each(inputs(Linears, seed=seed).double()).square().mean().backward()
            optimizers[name].step()
        each.zero_grad()
    before = next(iter(optimizers["carried"].state.values())).get("step")
    done = squeeze_model(model, rank=3, optimizer=optimizers["carried"], alpha="sqrt")
    assert done.optimizer == "carried"
    key = "momentum_buffer" if kind == "SGD" else "exp_avg"

    def state(name, each, what):
        return {n: optimizers[name].state[p][what] for n, p in trained(each).items()}

    same(state("carried", model, key), state("reference", reference, key))
    if kind != "SGD":
        after = next(iter(optimizers["carried"].state.values()))["step"]
        assert after == before == 4


def test_second_moments_move_by_the_squares():
    model = make(Linears, dtype=torch.float64)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.0, amsgrad=True)
    gradients(model, input_of(Linears))
    optimizer.step()
    old = {
        n: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
        for n, p in trained(model).items()
    }
    model.zero_grad()
    squeeze_model(model, rank=3, optimizer=optimizer)
    for n, p in trained(model).items():
        first, state = old[n]
        # By least squares, which needs no formula of the squeeze: A' = Y·A and B' = B·X.
        twin = n.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("_?", "_B")
        other, other_new = old[twin][0], trained(model)[twin]
        if "lora_A" in n:
            by = torch.linalg.lstsq(other, other_new).solution.T
            want, second = by @ state["exp_avg"], by**2 @ state["exp_avg_sq"]
        else:
            by = torch.linalg.lstsq(other.T, other_new.T).solution
            want, second = state["exp_avg"] @ by, state["exp_avg_sq"] @ by**2
        kept = optimizer.state[p]
        assert torch.allclose(kept["exp_avg"], want, rtol=1e-8, atol=1e-14)
        assert torch.allclose(kept["exp_avg_sq"], second, rtol=1e-8, atol=1e-14)
        assert torch.allclose(kept["max_exp_avg_sq"], second, rtol=1e-8, atol=1e-14)
        assert first.dtype == kept["exp_avg"].dtype


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adafactor", "NAdam", "AdamW8bit"])
def test_other_optimizers_start_anew_and_it_is_said(kind):
    model = make(Linears)
    home = pytest.importorskip("bitsandbytes").optim if "8bit" in kind else torch.optim
    optimizer = getattr(home, kind)(trained(model).values(), lr=1e-3)
    gradients(model, inputs(Linears))
    optimizer.step()
    assert all(optimizer.state[p] for p in trained(model).values())
    assert squeeze_model(model, rank=3, optimizer=optimizer).optimizer == "reset"
    assert all(p not in optimizer.state or not optimizer.state[p] for p in trained(model).values())


def test_groups_keep_their_order_and_options_and_frozen_factors_need_no_place():
    model = make(Linears)
    factors = trained(model)
    for n, p in factors.items():
        p.requires_grad_("square" not in n)
    groups = [
        {"params": [p for n, p in factors.items() if side in n and "square" not in n], "lr": lr}
        for side, lr in (("lora_A", 1e-3), ("lora_B", 2e-2))
    ]
    optimizer = torch.optim.AdamW(groups)
    squeeze_model(model, rank=3, optimizer=optimizer)
    new = trained(model)
    for group, side in zip(optimizer.param_groups, ("lora_A", "lora_B"), strict=True):
        want = [p for n, p in new.items() if side in n and "square" not in n]
        assert [id(p) for p in group["params"]] == [id(p) for p in want]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-2]
    assert not any(p.requires_grad for n, p in new.items() if "square" in n)


@pytest.mark.parametrize("given", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_each_implementation_of_an_optimizer_goes_on_alike(given):
    model, plain = (make(Linears, dtype=torch.float64) for _ in range(2))
    for each, options in ((model, given), (plain, {})):
        optimizer = torch.optim.AdamW(trained(each).values(), lr=1e-2, **options)
        for step in range(4):
            each.zero_grad()
            each(inputs(Linears, seed=step).double()).square().mean().backward()
            optimizer.step()
            if step == 1:
                squeeze_model(each, rank=3, optimizer=optimizer)
    same(trained(model), trained(plain))


def test_a_scaler_of_gradients_changes_nothing():
    # Powers of two scale float64 exactly, also gradients that wait while factors are squeezed.
    ends = []
    for is_scaled in (True, False):
        model = make(Linears, dtype=torch.float64)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=is_scaled)
        for step in range(5):
            loss = model(inputs(Linears, seed=step).double()).square().mean()
            scaler.scale(loss).backward()
            if step == 2:
                squeeze_model(model, rank=3, optimizer=optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(trained(model))
    same(*ends)


def test_training_goes_on_after_a_squeeze_with_the_last_loss_still_held():
    model = make(Linears)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    x = inputs(Linears, 32)
    losses = []
    for step in range(30):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if step in (10, 20):
            squeeze_model(model, rank=6 - step // 5, optimizer=optimizer)
    assert losses[-1] < losses[21]
    assert len(model.base_model.model.up.lora_A["default"].weight) == 2


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(OptionError, match="not an optimizer"):
        squeeze_model(make(Linears), rank=2, optimizer=object())
