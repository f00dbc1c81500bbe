"""`squeeze_model` on every kind of layer: the answer of the file command on the saved adapter."""

import itertools

import numpy as np
import pytest
import torch
from live_models import CASES, Embeddings, Linears, deltas, inputs, make
from peft import PeftModel, get_peft_model_state_dict

import loratools as lt
from loratools.training import squeeze_model
from loratools_formats.disk.errors import OptionError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def apart(got, want):
    norm = np.sqrt(sum(np.sum(w**2) for w in want.values()))
    return np.sqrt(sum(np.sum((got[n] - w) ** 2) for n, w in want.items())) / norm


def rounding(model):
    dtype = next(p.dtype for n, p in model.named_parameters() if "lora_" in n)
    return 4 * EPS.get(dtype, 2.0**-40)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.8}], ids=str)
def test_equals_the_file_command(tmp_path, name, rule):
    kind, config = CASES[name]
    model = make(kind, **config)
    before = deltas(model)
    model.save_pretrained(tmp_path / "saved")
    squeezed = lt.squeeze(tmp_path / "saved", **rule, output=tmp_path / "small")
    done = squeeze_model(model, **rule)
    assert done.ranks == {module.name: module.rank_out for module in squeezed.modules}
    again = PeftModel.from_pretrained(kind().to(config.get("dtype")), tmp_path / "small")
    assert apart(deltas(model), deltas(again)) <= rounding(model)
    # Each is the truncated change, by a dense decomposition that knows nothing of factors.
    for module, dense in before.items():
        flat = dense.reshape(len(dense), -1)
        u, s, vt = np.linalg.svd(flat, full_matrices=False)
        rank = done.ranks[module]
        want = ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(dense.shape)
        assert np.linalg.norm(deltas(model)[module] - want) <= rounding(model) * np.linalg.norm(
            want
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("alpha", ["keep-scale", "sqrt"])
def test_a_squeezed_model_saves_and_loads_as_it_is(tmp_path, name, alpha):
    kind, config = CASES[name]
    model = make(kind, **config)
    scales = {n: m.scaling["default"] for n, m in layers(model)}
    squeeze_model(model, energy=0.8, alpha=alpha)
    x = inputs(kind)
    x = x if x.dtype == torch.int64 else x.to(config.get("dtype"))
    model.eval()
    want = model(x)
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(
        kind().to(config.get("dtype")), tmp_path / "saved", autocast_adapter_dtype=False
    ).eval()
    assert torch.equal(again(x), want)
    for (n, one), (_, other) in zip(layers(model), layers(again), strict=True):
        assert one.scaling == other.scaling
        assert one.r == other.r
        if alpha == "keep-scale" or config.get("use_rslora"):
            assert one.scaling["default"] == pytest.approx(scales[n], rel=1e-12)
    ranks = {m.name: m.rank for m in lt.info(tmp_path / "saved").modules}
    assert ranks == {n: m.r["default"] for n, m in layers(model)}


def layers(model):
    from peft.tuners.lora import LoraLayer

    return [(n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)]


def test_alpha_follows_the_policy():
    kept, rooted = make(Linears), make(Linears)
    squeeze_model(kept, rank=2)
    squeeze_model(rooted, rank=2, alpha="sqrt")
    assert kept.peft_config["default"].lora_alpha == 3
    assert rooted.peft_config["default"].lora_alpha == 6
    assert {m.scaling["default"] for _, m in layers(rooted)} == {3.0}
    assert apart(deltas(kept), deltas(rooted)) <= rounding(kept)


def test_a_budget_lets_ranks_differ():
    model = make(Linears, rank_pattern={"square": 4})
    model.base_model.model.up.lora_B["default"].weight.data *= 30
    done = squeeze_model(model, budget="60%")
    assert len(set(done.ranks.values())) > 1
    assert done.parameters < 0.6 * done.parameters_before
    assert done.ranks["up"] > done.ranks["down"]


@pytest.mark.parametrize("name", ["linear", "linear, bf16", "dora", "lora_bias", "convolution"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.31])
@pytest.mark.parametrize("is_share", [True, False])
def test_a_budget_counts_the_bytes_of_parameters_and_no_header(name, share, is_share):
    kind, config = CASES[name]
    model = make(kind, **config)

    def nbytes():
        return sum(p.nbytes for n, p in model.named_parameters() if ".lora_" in n)

    limit = int(share * nbytes())
    done = squeeze_model(model, budget=f"{share * 100}%" if is_share else str(limit))
    assert nbytes() <= limit
    if share == 1.0:
        assert set(done.ranks.values()) == {8}
    for name, module in layers(model):  # one rank more of any module would be too much
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        more = a[0].nbytes + b[:, 0].nbytes
        assert done.ranks[name] == 8 or nbytes() + more > limit


def test_only_selected_modules_change_and_the_rest_keep_their_parameters():
    model = make(Linears)
    up = model.base_model.model.up.lora_A["default"].weight
    done = squeeze_model(model, rank=2, include="square")
    assert done.ranks == {"up": 8, "square": 2, "down": 8}
    assert model.base_model.model.up.lora_A["default"].weight is up
    assert len(model.base_model.model.square.lora_A["default"].weight) == 2


@pytest.mark.parametrize("left", [0.0, 1e-9])  # of their size: none, or less than float32 tells
def test_zero_directions_can_learn_again(left):
    model = make(Linears)
    with torch.no_grad():
        for _, module in layers(model):
            module.lora_B["default"].weight[:, 2:] *= left
    before = deltas(model)
    done = squeeze_model(model, rank=4)
    assert done.revived == 6
    assert apart(deltas(model), before) <= rounding(model)
    x = inputs(Linears, 64)
    model(x).square().sum().backward()
    for _, module in layers(model):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert (b[:, 2:] == 0).all()
        assert (a[2:].norm(dim=1) > 0).all()
        assert (b.grad.norm(dim=0) > 0).all()
    again = make(Linears)
    with torch.no_grad():
        for _, module in layers(again):
            module.lora_B["default"].weight[:, 2:] *= left
    squeeze_model(again, rank=4)
    states = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


@pytest.mark.parametrize("kind", [Linears, Embeddings])
def test_a_fresh_adapter_can_be_squeezed_and_then_learns(kind):
    model = make(kind)
    with torch.no_grad():
        for _, module in layers(model):
            held = module.lora_embedding_A if len(module.lora_embedding_A) else module.lora_B
            p = held["default"]
            (p if isinstance(p, torch.nn.Parameter) else p.weight).zero_()
    squeeze_model(model, rank=2)
    assert all(np.all(delta == 0) for delta in deltas(model).values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(inputs(kind)).square().sum().backward()
    optimizer.step()
    assert all(np.any(delta != 0) for delta in deltas(model).values())


def test_wrappers_within_one_process_are_looked_through():
    model = make(Linears)
    squeeze_model(torch.nn.DataParallel(model), rank=2)
    assert model.peft_config["default"].r == 2


@pytest.mark.slow
def test_a_compiled_model_makes_the_squeezed_change():
    model = make(Linears)
    compiled = torch.compile(model, backend="eager")
    x = inputs(Linears)
    before = compiled(x)
    squeeze_model(compiled, rank=2)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)


def test_a_disabled_adapter_is_squeezed_as_any():
    model, other = make(Linears), make(Linears)
    with model.disable_adapter():
        squeeze_model(model, rank=2)
    squeeze_model(other, rank=2)
    states = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_other_adapters_of_the_model_stay(tmp_path):
    from peft import LoraConfig

    model = make(Linears)
    model.add_adapter("other", LoraConfig(r=5, lora_alpha=5, target_modules=["up"]))
    squeeze_model(model, rank=2)
    up = model.base_model.model.up
    assert (up.r["default"], up.r["other"]) == (2, 5)
    assert len(up.lora_A["other"].weight) == 5
    model.base_model.set_adapter(["default", "other"])
    assert "not one active adapter" in refused(model)
    squeeze_model(model, rank=1, adapter="other")
    assert (up.r["default"], up.r["other"]) == (2, 1)


def refused(model, **given):
    states = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises((OptionError, UnsupportedError)) as caught:
        squeeze_model(model, **{"rank": 2, **given})
    assert all(torch.equal(states[n], p) for n, p in model.named_parameters())
    return str(caught.value)


def test_what_cannot_be_replaced_is_refused_and_nothing_changes():
    assert "no rule" in refused(make(Linears), rank=None)
    assert "no such adapter" in refused(make(Linears), adapter="other")
    assert "not a PEFT model" in refused(Linears())
    assert "unchanged base" in refused(make(Linears, init_lora_weights="pissa"))
    bare = make(Linears)
    inner = bare.base_model.model
    for name, child in list(inner.named_children()):
        setattr(inner, name, getattr(child, "base_layer", child))
    assert "has no layer" in refused(bare)
    merged = make(Linears)
    merged.merge_adapter()
    assert "is merged" in refused(merged)
    scaled = make(Linears)
    scaled.base_model.model.up.scaling["default"] *= 2
    assert "scaling" in refused(scaled)
    hooked = make(Linears)
    hooked.base_model.model.up.lora_A["default"].weight.register_post_accumulate_grad_hook(id)
    assert "has hooks" in refused(hooked)
    flat = make(Linears)  # as ZeRO and FSDP leave parameters between steps
    flat.base_model.model.up.lora_A["default"].weight.data = torch.zeros(0)
    assert "spread" in refused(flat)
    shared = make(Linears)
    shared.base_model.model.square.lora_A = shared.base_model.model.down.lora_A
    assert "shares a factor with square" in refused(shared)
    groups = type("Groups", (Linears,), {})

    def init(self):
        torch.nn.Module.__init__(self)
        self.up = torch.nn.Conv2d(8, 8, 3, groups=2)

    groups.__init__ = init
    assert "in groups" in refused(make(groups, target_modules=["up"]))
    stranger = torch.optim.AdamW(Linears().parameters())
    assert "does not have the factors" in refused(make(Linears), optimizer=stranger)
    assert "keep-scale or sqrt" in refused(make(Linears), alpha="half")


def test_every_layer_of_a_transformer_is_found(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("examples/tiny-llama/model", dtype=torch.float32)
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    model = get_peft_model(base, LoraConfig(r=6, lora_alpha=6, target_modules=targets))
    for name, p in itertools.chain(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    file = lt.squeeze(tmp_path / "saved", rank=2)
    done = squeeze_model(model, rank=2)
    assert set(done.ranks) == {module.name for module in file.modules}
    assert done.relative_error == pytest.approx(file.relative_error, rel=1e-5)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"up": 5}}])
def test_a_negative_alpha_is_kept(tmp_path, config):
    model = make(Linears, lora_alpha=-12, **config)
    before = deltas(model)
    model.save_pretrained(tmp_path / "saved")
    squeezed = lt.squeeze(tmp_path / "saved", rank=3, output=tmp_path / "small")
    done = squeeze_model(model, rank=3)
    assert apart(deltas(model), before) == pytest.approx(squeezed.relative_error, rel=1e-5)
    assert done.alphas["down"] < 0.0
    again = PeftModel.from_pretrained(Linears(), tmp_path / "small")
    assert apart(deltas(model), deltas(again)) <= rounding(model)


def test_an_alpha_of_zero_is_refused():
    model = make(Linears, lora_alpha=0)
    with pytest.raises(UnsupportedError, match="alpha 0"):
        squeeze_model(model, rank=3)


@pytest.mark.parametrize("left", [0.0, 1e-7, 1e-4])
def test_factors_that_cancel_are_squeezed(left):
    model = make(Linears)
    up = model.base_model.model.up
    with torch.no_grad():
        a, b = up.lora_A["default"].weight, up.lora_B["default"].weight
        a[4:], b[:, 4:] = a[:4], -b[:, :4]
        b[:, 0] *= 1 + left
    before = deltas(model)["up"]
    done = squeeze_model(model, rank=3, include="up")
    assert done.ranks["up"] == 3
    size = float(a.norm() * b.norm())  # PEFT sums its products in float32
    assert np.linalg.norm(deltas(model)["up"] - before) <= rounding(model) * size
