"""Calibrated squeezes: against dense optima for inputs that were seen."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from live_models import Convolutions, Embeddings, Linears, Lines, Solids, Transposed, inputs, make
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli
from loratools.training import collect_stats
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def seen(model, batches):
    """Return the inputs of each base layer as columns."""
    found, handles = {}, []
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layer = module.get_base_layer()
            hook = lambda _, x, n=name: found.setdefault(n, []).append(x[0])  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(x).double().numpy() for name, x in found.items()}


@pytest.fixture(scope="module")
def linears(tmp_path_factory):
    """Return a model, its saved adapter, its inputs and their moments."""
    folder = tmp_path_factory.mktemp("linears")
    model = make(Linears, decay=0.9)
    batches = [inputs(Linears, 40, seed) * torch.linspace(0.1, 3, 20) for seed in range(3)]
    model.save_pretrained(folder / "lora")
    for kind in ("gram", "diag"):
        done = collect_stats(model, batches, output=folder / f"{kind}.safetensors", kind=kind)
        assert done.samples == (120, 120, 120)
    return folder, seen(model, batches)


def output_errors(folder, squeezed, columns, weigh=None):
    """Return ‖(ΔW − ΔW')·X‖ and ‖ΔW·X‖ over modules, densely."""
    adapter = lt.read(folder / "lora")
    error = whole = 0.0
    for name, rows in columns.items():
        x = np.diag(np.sqrt(np.sum(rows**2, axis=0))) if weigh == "diag" else rows.T
        delta = lt.delta(adapter, name)
        error += np.sum(((delta - lt.delta(squeezed.adapter, name)) @ x) ** 2)
        whole += np.sum((delta @ x) ** 2)
    return np.sqrt(error), np.sqrt(whole)


@pytest.mark.parametrize("kind", ["gram", "diag"])
def test_the_error_for_the_inputs_is_the_least_there_is(linears, kind):
    folder, columns = linears
    done = lt.squeeze(folder / "lora", rank=3, stats=folder / f"{kind}.safetensors")
    plain = lt.squeeze(folder / "lora", rank=3)
    error, whole = output_errors(folder, done, columns, kind)
    adapter, least = lt.read(folder / "lora"), 0.0
    for name, rows in columns.items():
        x = np.diag(np.sqrt(np.sum(rows**2, axis=0))) if kind == "diag" else rows.T
        least += np.sum(np.linalg.svd(lt.delta(adapter, name) @ x, compute_uv=False)[3:] ** 2)
    assert error == pytest.approx(np.sqrt(least), rel=1e-5)
    assert done.calibrated_error == pytest.approx(error / whole, rel=1e-5)
    assert error < output_errors(folder, plain, columns, kind)[0]
    assert plain.relative_error < done.relative_error
    assert plain.calibrated_error is None
    assert all(module.rank_out == 3 for module in done.modules)


def test_inputs_of_few_directions_need_no_more_ranks(linears, tmp_path):
    folder, _ = linears
    model = make(Linears, decay=0.9)
    direction = inputs(Linears, 2)
    collect_stats(model, [direction], output=tmp_path / "stats")
    done = lt.squeeze(folder / "lora", rank=2, include="up", stats=tmp_path / "stats")
    assert done.calibrated_error < 1e-6  # of ΔW·X, which is of rank 2
    assert done.relative_error > 0.3


def test_a_module_that_no_input_reached_keeps_its_best_factors(linears, tmp_path):
    folder, _ = linears
    moments = dict(load_file(folder / "gram.safetensors"))
    moments["up.gram"] = np.zeros_like(moments["up.gram"])
    save_file(moments, tmp_path / "stats", metadata={"format": "loratools-stats"})
    done = lt.squeeze(folder / "lora", rank=3, include="up", stats=tmp_path / "stats")
    plain = lt.squeeze(folder / "lora", rank=3, include="up")
    assert done.calibrated_error == 0.0
    assert done.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
    assert plain.relative_error < 0.9


def test_layers_that_only_empty_inputs_reached_are_unseen():
    model = make(Linears)
    forward = model.base_model.model.forward

    def routed(x):  # as experts do to which no token goes
        model.base_model.model.up(x[:0])
        return model.base_model.model.square(torch.zeros(1, 24))

    model.base_model.model.forward = routed
    done = collect_stats(model, [inputs(Linears)])
    model.base_model.model.forward = forward
    assert done.modules == ("square",)
    assert done.unseen == ("up", "down")


def test_full_rank_loses_nothing(linears):
    folder, _ = linears
    done = lt.squeeze(folder / "lora", rank=8, stats=folder / "gram.safetensors")
    assert done.relative_error == 0.0
    assert done.calibrated_error < 1e-7


def test_rules_choose_by_the_outputs(linears, tmp_path):
    folder, columns = linears
    done = lt.squeeze(folder / "lora", energy=0.9, stats=folder / "gram.safetensors")
    adapter = lt.read(folder / "lora")
    for module in done.modules:
        s = np.linalg.svd(lt.delta(adapter, module.name) @ columns[module.name].T)[1] ** 2
        want = 1 + int(np.searchsorted(np.cumsum(s) / s.sum(), 0.9))
        assert module.rank_out == want


@pytest.mark.parametrize("model_class", [Convolutions, Lines, Solids, Transposed, Embeddings])
def test_moments_of_other_layers_predict_their_outputs(tmp_path, model_class):
    config = {"fan_in_fan_out": True} if model_class is Transposed else {}
    config |= {"target_modules": ["up", "down"]} if model_class is Solids else {}
    model = make(model_class, **config)
    model.save_pretrained(tmp_path / "lora")
    batches = [inputs(model_class, 5, seed) for seed in range(2)]
    collect_stats(model, batches, output=tmp_path / "stats")
    done = lt.squeeze(
        tmp_path / "lora", rank=2, stats=tmp_path / "stats", output=tmp_path / "small"
    )
    # What each layer's own forward makes of the changes, before and after.
    small = type(model).from_pretrained(model_class(), tmp_path / "small")
    for report in done.modules:
        with torch.no_grad():
            error, whole = changes(model, small, report.name, batches)
        assert report.calibrated_error == pytest.approx(error / whole, rel=2e-5), report.name


def changes(model, small, name, batches):
    """Return ‖y(ΔW) − y(ΔW')‖ and ‖y(ΔW)‖ of a layer over the inputs that it sees in `model`."""
    one = model.base_model.model.get_submodule(name)
    other = small.base_model.model.get_submodule(name)
    caught = []
    handle = one.register_forward_pre_hook(lambda _, x: caught.append(x[0]))
    for batch in batches:
        model(batch)
    handle.remove()
    error = whole = 0.0
    for x in caught:
        base = one.get_base_layer()(x)
        y, z = one(x) - base, other(x) - other.get_base_layer()(x)
        error, whole = error + float((y - z).square().sum()), whole + float(y.square().sum())
    return error**0.5, whole**0.5


def test_padding_is_left_out(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("examples/tiny-llama/model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.arange(10).view(1, 10)
    padded = torch.nn.functional.pad(ids, (0, 5), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    one = collect_stats(model, [{"input_ids": ids}], output=tmp_path / "one")
    other = collect_stats(
        model, [{"input_ids": padded, "attention_mask": mask}], output=tmp_path / "other"
    )
    assert one.samples == other.samples
    assert set(other.samples) == {10}
    first, second = load_file(tmp_path / "one"), load_file(tmp_path / "other")
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, rtol=1e-4, atol=1e-5 * value.max())


def test_a_model_without_an_adapter_is_measured_too(tmp_path):
    torch.manual_seed(0)
    model = Linears().train()
    done = collect_stats(model, [inputs(Linears)], output=tmp_path / "stats")
    assert done.modules == ("up", "square", "down")
    assert done.unseen == ()
    assert model.training
    again = collect_stats(model, [inputs(Linears)])
    assert again.write(tmp_path / "again").read_bytes() == (tmp_path / "stats").read_bytes()
    with pytest.raises(lt.LoratoolsError, match="exists"):
        collect_stats(model, [inputs(Linears)], output=tmp_path / "stats")


def test_what_does_not_fit_is_refused(linears, tmp_path):
    folder, _ = linears
    with pytest.raises(OptionError, match="no batch"):
        collect_stats(make(Linears), [], output=tmp_path / "none")
    with pytest.raises(OptionError, match="kind"):
        collect_stats(make(Linears), [inputs(Linears)], output=tmp_path / "none", kind="all")
    groups = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1, groups=2))
    with pytest.raises(UnsupportedError, match="in groups"):
        collect_stats(groups, [], output=tmp_path / "none")
    moments, metadata = load_file(folder / "gram.safetensors"), {"format": "loratools-stats"}

    def error(changed, metadata=metadata):
        save_file(changed, tmp_path / "bad", metadata)
        with pytest.raises(AdapterError) as caught:
            lt.squeeze(folder / "lora", rank=3, stats=tmp_path / "bad")
        return str(caught.value)

    assert "not a file of second moments" in error(moments, None)
    without = {key: value for key, value in moments.items() if not key.startswith("up")}
    assert "no second moments" in error(without)
    assert "do not fit" in error(moments | {"up.gram": moments["square.gram"]})
    assert "negative" in error(moments | {"up.gram": -moments["up.gram"]})
    assert "NaN" in error(moments | {"up.gram": np.full_like(moments["up.gram"], np.nan)})


def test_the_command_prints_both_errors_and_the_output_says_how_it_was_made(linears, tmp_path):
    folder, _ = linears
    given = ["--rank=3", "--stats", str(folder / "gram.safetensors")]
    out = str(tmp_path / "small")
    done = CliRunner().invoke(cli, ["squeeze", str(folder / "lora"), "-o", out, *given])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    result = lt.squeeze(folder / "lora", rank=3, stats=folder / "gram.safetensors")
    assert f"relative error: {result.relative_error:.3g}" in lines
    assert f"relative error for the inputs: {result.calibrated_error:.3g}" in lines
    (made,) = lt.provenance(out).steps
    assert [each.role for each in made.inputs if "stats" in each.role] == ["stats"]
    assert lt.replay(out).identical
    refused = CliRunner().invoke(cli, ["squeeze", str(folder / "lora"), *given[1:]])
    assert isinstance(refused.exception, OptionError)
