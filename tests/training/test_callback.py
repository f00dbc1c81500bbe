"""`SqueezeCallback` under transformers' Trainer: when it squeezes, what it logs, how it resumes."""

import json
import shutil

import pytest
import torch
from live_models import Linears
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import loratools as lt
from loratools.algebra.ranks import Budget, RankRule
from loratools.training import SqueezeCallback, SqueezeSchedule
from loratools_formats.disk.errors import OptionError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 12
SCHEDULES = {
    "ranks": SqueezeSchedule((8, 4, 2), (4, 4, 4)),
    "rules": SqueezeSchedule((8, RankRule(budget=Budget.parse("70%")), RankRule(energy=0.7)),
                             (4, 4, 4)),
}  # fmt: skip


class Regression(nn.Module):
    """A model as the Trainer wants one."""

    def __init__(self):
        super().__init__()
        self.net = Linears()

    def forward(self, x, labels=None):
        return {"loss": (self.net(x) - labels).square().mean()}


def data():
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(64, 20, generator=generator)
    y = torch.tanh(x @ torch.randn(20, 16, generator=generator))
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def trainer(folder, callback, *, config=None, eval_dataset=None, more=(), **given):
    set_seed(3)
    options = {"r": 8, "lora_alpha": 12, "lora_dropout": 0.1, **(config or {})}
    model = get_peft_model(
        Regression(), LoraConfig(target_modules=["up", "square", "down"], **options)
    )
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "save_steps": 1, "logging_steps": 5, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-2, "label_names": ["labels"],
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**arguments, **given})
    callbacks = [callback, *more]
    return Trainer(
        model, args, train_dataset=data(), eval_dataset=eval_dataset, callbacks=callbacks
    )


def factors(made):
    return {n: p.detach().clone() for n, p in made.model.named_parameters() if "lora_" in n}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "alpha"),
    [
        ("ranks", {}, "keep-scale"),
        ("rules", {"lora_alpha": 7.3}, "sqrt"),
        ("ranks", {"use_dora": True}, "sqrt"),
        ("rules", {"use_rslora": True, "lora_alpha": 5}, "keep-scale"),
    ],
)
def test_resuming_in_any_stage_ends_in_the_same_bits(tmp_path, name, config, alpha):
    schedule = SCHEDULES[name]
    whole = trainer(tmp_path / "whole", SqueezeCallback(schedule, alpha), config=config)
    whole.train()
    want = factors(whole)
    for step in (2, 4, 7, 8, 11):  # in every stage, and at both boundaries
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", folder / f"checkpoint-{step}")
        callback = SqueezeCallback(schedule, alpha)
        again = trainer(folder, callback, config=config)
        again.train(resume_from_checkpoint=True)
        got = factors(again)
        assert all(torch.equal(got[n], p) for n, p in want.items())
        scales = [
            {n: m.scaling for n, m in each.model.named_modules() if hasattr(m, "scaling")}
            for each in (whole, again)
        ]
        assert scales[0] == scales[1]
        assert [one["step"] for one in callback.squeezes] == [4, 8]
        assert (again.model.peft_config["default"].rank_pattern
                == whole.model.peft_config["default"].rank_pattern)  # fmt: skip


def test_it_squeezes_after_optimizer_steps_and_logs_what_it_did(tmp_path):
    callback = SqueezeCallback(SCHEDULES["ranks"])
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            seen[state.global_step] = kwargs["model"].peft_config["default"].r

    made = trainer(tmp_path, callback, more=[Watch])
    made.train()
    assert [seen[step] for step in range(1, STEPS + 1)] == [8] * 3 + [4] * 4 + [2] * 5
    history = {line["step"]: line for line in made.state.log_history if "squeeze/rank_max" in line}
    assert sorted(history) == [4, 8]
    assert history[8]["squeeze/rank_max"] == 2
    assert history[8]["squeeze/parameters"] == sum(p.numel() for p in factors(made).values())
    assert 0 < history[8]["squeeze/relative_error"] < 1
    assert "loss" in history[8]
    assert callback.squeezes[0]["optimizer"] == "carried"
    assert "squeeze/rank_max" not in made.state.log_history[-1]


def test_a_function_can_log_instead(tmp_path):
    callback, logged = SqueezeCallback(SCHEDULES["ranks"]), []
    made = trainer(tmp_path, callback)
    callback.log = logged.append
    made.train()
    assert [line["squeeze/rank_max"] for line in logged] == [4, 2]


def test_mixed_precision_trains_on(tmp_path):
    callback = SqueezeCallback(SCHEDULES["ranks"])
    made = trainer(tmp_path, callback, bf16=True)
    made.train()
    assert made.model.peft_config["default"].r == 2
    assert all(p.dtype == torch.float32 for p in factors(made).values())


def test_checkpoints_say_how_their_adapter_was_made(tmp_path):
    callback = SqueezeCallback(SCHEDULES["rules"])
    made = trainer(tmp_path, callback)
    made.train()
    assert not (tmp_path / "checkpoint-3" / "provenance.json").exists()
    (step,) = lt.provenance(tmp_path / "checkpoint-9").steps
    assert step.operation == "squeeze-model"
    text = json.loads((tmp_path / "checkpoint-9" / "provenance.json").read_text())
    kept = text["predicate"]["options"]
    assert kept["schedule"] == SCHEDULES["rules"].to_dict()
    assert [one["step"] for one in kept["squeezes"]] == [4, 8]
    assert kept["squeezes"][1]["ranks"].keys() == {"net.up", "net.square", "net.down"}
    ranks = {m.name: m.rank for m in lt.info(tmp_path / "checkpoint-9").modules}
    assert kept["squeezes"][1]["ranks"] == ranks
    made.save_model()
    callback.write_provenance()
    assert [step.operation for step in lt.provenance(tmp_path).steps] == ["squeeze-model"]
    # A folder that is saved by hand gets it by hand; what is made of it carries it on.
    made.model.save_pretrained(tmp_path / "final")
    callback.write_provenance(tmp_path / "final")
    lt.squeeze(tmp_path / "final", rank=1, output=tmp_path / "small")
    assert [s.operation for s in lt.provenance(tmp_path / "small").steps] == [
        "squeeze-model", "squeeze",
    ]  # fmt: skip
    assert lt.provenance(tmp_path / "final").changed == ()


def test_the_best_model_may_be_of_an_earlier_rank(tmp_path):
    callback = SqueezeCallback(SCHEDULES["ranks"])
    made = trainer(
        tmp_path, callback, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        learning_rate=0.5, metric_for_best_model="eval_loss", eval_dataset=data()[:8],
    )  # fmt: skip
    made.train()
    best = int(made.state.best_model_checkpoint.rpartition("-")[2])
    rank = 8 if best < 4 else 4 if best < 8 else 2
    assert made.model.peft_config["default"].r == rank
    assert {len(p) for n, p in factors(made).items() if "lora_A" in n} == {rank}


def squeezes_stated(folder):
    text = json.loads((folder / "provenance.json").read_text())
    return [one["step"] for one in text["predicate"]["options"]["squeezes"]]


@pytest.mark.parametrize(("best", "want"), [(3, []), (4, [4]), (6, [4]), (8, [4, 8]), (12, [4, 8])])
def test_provenance_states_the_squeezes_of_the_best_model(tmp_path, best, want):
    class Score(TrainerCallback):  # says which step is best
        def on_evaluate(self, args, state, control, metrics, **kwargs):  # noqa: ARG002
            metrics["eval_loss"] = abs(state.global_step - best)

    # The second boundary may keep the ranks: what counts is the step.
    callback = SqueezeCallback(SqueezeSchedule((8, 4, RankRule(energy=1.0)), (4, 4, 4)))
    made = trainer(
        tmp_path, callback, more=[Score()], eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        eval_dataset=data()[:8],
    )  # fmt: skip
    made.train()
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    made.save_model(tmp_path / "final")
    callback.write_provenance(tmp_path / "final")
    if want:
        assert squeezes_stated(tmp_path / "final") == want
        assert squeezes_stated(tmp_path / f"checkpoint-{best}") == want
    else:
        assert not (tmp_path / "final" / "provenance.json").exists()
    assert squeezes_stated(tmp_path / "checkpoint-12") == [4, 8]


def test_the_best_model_may_be_loaded_into_a_model_that_the_trainer_made(tmp_path):
    callback = SqueezeCallback(SCHEDULES["ranks"])
    made = trainer(tmp_path, callback)
    models = [made.model]
    made.model_init = lambda: models[-1]
    models.append(trainer(tmp_path, TrainerCallback()).model)
    made.train()
    assert made.model is models[1]
    made.model.load_adapter(str(tmp_path / "checkpoint-3"), "default")
    assert {len(p) for n, p in factors(made).items() if "lora_A" in n} == {8}


def test_states_of_callbacks_may_be_restored_by_the_trainer(tmp_path):
    whole = trainer(tmp_path, SqueezeCallback(SCHEDULES["rules"]))
    whole.train()
    callback, logged = SqueezeCallback(SCHEDULES["rules"]), []
    again = trainer(tmp_path, callback, restore_callback_states_from_checkpoint=True)
    callback.log = logged.append
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    want = factors(whole)
    assert all(torch.equal(p, want[n]) for n, p in factors(again).items())
    # The Trainer makes other objects of callbacks' states; the user's knows what was done.
    assert callback in again.callback_handler.callbacks
    assert len(logged) == 1
    again.save_model(tmp_path / "final")
    callback.write_provenance(tmp_path / "final")
    assert squeezes_stated(tmp_path / "final") == [4, 8]
    with pytest.raises(OptionError, match="no Trainer has trained with this callback"):
        SqueezeCallback(SCHEDULES["rules"]).write_provenance(tmp_path / "final")


def test_a_callback_that_comes_too_late_is_refused(tmp_path):
    made = trainer(tmp_path, TrainerCallback())
    made.add_callback(SqueezeCallback(SCHEDULES["ranks"]))
    with pytest.raises(UnsupportedError, match=r"callbacks=\[callback\]"):
        made.train()


def test_several_processes_that_train_no_copies_are_refused(tmp_path, monkeypatch):
    made = trainer(tmp_path, SqueezeCallback(SCHEDULES["ranks"]))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(UnsupportedError, match="one process"):
        made.train()


def test_what_does_not_belong_together_is_refused(tmp_path):
    made = trainer(tmp_path, SqueezeCallback(SCHEDULES["ranks"]), config={"r": 6})
    with pytest.raises(OptionError, match="another rank"):
        made.train()
    made = trainer(tmp_path, SqueezeCallback(SCHEDULES["ranks"]), max_steps=8)
    with pytest.raises(OptionError, match="ends before"):
        made.train()
    trainer(tmp_path, SqueezeCallback(SCHEDULES["ranks"])).train()
    other = SqueezeCallback(SqueezeSchedule((8, 3), (6, 6)))
    with pytest.raises(OptionError, match="another schedule"):
        trainer(tmp_path, other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    # Checkpoints of no schedule, and an optimizer that has the factors of another rank.
    plain = trainer(tmp_path / "plain", TrainerCallback())
    plain.train()
    again = trainer(tmp_path / "plain", SqueezeCallback(SCHEDULES["ranks"]))
    with pytest.raises(OptionError, match="without a schedule"):
        again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    again = trainer(tmp_path, SqueezeCallback(SCHEDULES["ranks"]))
    again.create_optimizer()  # as people do who hand over their own
    with pytest.raises(OptionError, match="does not have the factors"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
