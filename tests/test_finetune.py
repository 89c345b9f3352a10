from __future__ import annotations

import pickle
import shutil
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from trimlingual.data.audio import load_audio
from trimlingual.decoding.translate_clips import encode_audio
from trimlingual.models.inputs import Collator, Example, Prompter, TrainingData
from trimlingual.models.loading import load_model
from trimlingual.recipe import LoraSettings, TrainSettings
from trimlingual.run.lineage import read_lineage
from trimlingual.stages.finetune import finetune
from trimlingual.training import checkpoints
from trimlingual.training.loss import answer_forward, answer_logits
from trimlingual.training.optimizer import TrainingError, flash_adamw
from trimlingual.training.stored_audio import stored_states
from trimlingual.training.trainer import make_trainer, train_

from .conftest import EVERY_FAMILY, assert_names_its_base
from .plain_inputs import own_inputs


@pytest.fixture
def examples(split, task):
    return [
        Example(i, c.id, lang, c.references[lang]) for i, c in enumerate(split.clips) for lang in task.target_languages
    ]


@EVERY_FAMILY
def test_loss_equals_the_models_own_on_answer_tokens(make_model, processor, split, task, examples):
    """Ours (logits at answer positions only) against transformers' full forward with the same labels."""
    model = make_model()
    collator = Collator(Prompter(processor, task), lambda i: load_audio(split.clips[i].audio), whole_window=True)
    batch = collator(examples[:6])
    batch.pop("ids")
    with torch.no_grad():
        ours = answer_forward(model)(**batch)["loss"]
        theirs = model(**own_inputs(model, batch)).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@EVERY_FAMILY
def test_labels_cover_the_answer_and_its_end_only(processor, split, task, examples):
    prompter = Prompter(processor, task)
    batch = Collator(prompter, lambda i: load_audio(split.clips[i].audio))(examples[:3])
    for row, example in zip(batch["labels"], examples):
        assert row[row != -100].tolist() == prompter.answer_ids(example.text)
        assert row[row != -100][-1] == prompter.end_id


@pytest.mark.parametrize("freeze", [[], ["audio_tower"]], ids=["whole", "stored-audio"])
def test_accumulated_gradients_equal_one_large_batch(make_model, processor, split, shared, examples, tmp_path, freeze):
    """Answers differ in length, so this fails when steps are averaged instead of tokens."""
    weights = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        model = make_model(layers=2)
        settings = TrainSettings(
            batch_size=batch_size, gradient_accumulation_steps=accumulate, max_steps=2, learning_rate=1e-2,
            optimizer="sgd", max_grad_norm=1e9, lr_scheduler="constant", freeze=freeze,
        )  # fmt: skip
        train_(model, processor, TrainingData(split.clips, examples[:12]), shared, settings, tmp_path / str(batch_size))
        weights.append(model.lm_head.weight.detach().clone())
    start = make_model(layers=2).lm_head.weight
    assert (weights[0] - start).abs().max() > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


@EVERY_FAMILY
def test_stored_audio_trains_as_the_frozen_tower_would(make_model, processor, split, task, examples):
    model = make_model()
    from trimlingual.decoding.translate_clips import encode_clips

    prompter = Prompter(processor, task)
    live = Collator(prompter, lambda i: load_audio(split.clips[i].audio))
    stored = Collator(prompter, live.load, encode_clips(model, processor, split.clips, 4))
    torch.testing.assert_close(
        torch.tensor(answer_logits(model, stored, examples, 4)[0]),
        torch.tensor(answer_logits(model, live, examples, 4)[0]),
        rtol=1e-5,
        atol=0,
    )


def test_training_learns_and_records(given, split, shared, data, tmp_path):
    settings = TrainSettings(epochs=6.0, batch_size=4, learning_rate=3e-3, logging_steps=1)
    info = finetune(given, data, shared, settings, tmp_path)
    assert info["losses"][-1]["loss"] < 0.6 * info["losses"][0]["loss"]
    weights = sum(f.stat().st_size for f in given.path.glob("*.safetensors"))
    assert info["peak_memory_bytes"] > weights
    assert info["seconds_per_step"] > 0
    assert read_lineage(tmp_path).seen["train"] == sorted({c.audio_sha256 for c in split.clips})
    assert load_model(tmp_path, "float32", torch.device("cpu")) is not None


def test_frozen_parts_do_not_move(given, model_dir, shared, data, tmp_path):
    settings = TrainSettings(max_steps=2, learning_rate=1e-2, freeze=["audio_tower", "embeddings"])
    finetune(given, data, shared, settings, tmp_path)
    before, after = (load_model(d, "float32", torch.device("cpu")).state_dict() for d in (model_dir, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [n for n in changed if "audio_tower" in n or "embed_tokens" in n]


@EVERY_FAMILY
def test_lora_saves_a_merged_model_and_its_adapter(given, model_dir, shared, data, tmp_path):
    settings = TrainSettings(method="lora", max_steps=4, learning_rate=1e-2, lora=LoraSettings(r=4, alpha=8))
    finetune(given, data, shared, settings, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert_names_its_base(tmp_path / "adapter", "tiny")
    before, after = (load_model(d, "float32", torch.device("cpu")) for d in (model_dir, tmp_path))
    assert set(before.state_dict()) == set(after.state_dict())
    assert not torch.equal(
        before.model.language_model.layers[0].mlp.up_proj.weight,
        after.model.language_model.layers[0].mlp.up_proj.weight,
    )


def test_batches_hold_clips_of_similar_length(make_model, processor, split, shared, data, tmp_path):
    def durations(length_grouped):
        settings = TrainSettings(batch_size=2, length_grouped=length_grouped)
        _, trainer = make_trainer(make_model(), processor, data, shared, settings, tmp_path)
        batches = [batch["ids"] for batch in trainer.get_train_dataloader()]
        seconds = {clip.id: clip.duration_s for clip in split.clips}
        return [[seconds[name.partition(":")[0]] for name in ids] for ids in batches]

    grouped, shuffled = durations(True), durations(False)
    assert sorted(chain(*grouped)) == sorted(chain(*shuffled))
    assert sum(map(max, grouped)) < sum(map(max, shuffled))


def test_short_batches_keep_their_activations(make_model, processor, shared, data, tmp_path, monkeypatch):
    """Above the bound layers run twice (forward and again in backward), below it once; the weights come out equal."""
    weights, calls = [], []
    for bound in (0, 10**6):
        model = make_model(layers=2)
        count = 0

        def counted(*args, forward=model.model.language_model.layers[0].mlp.forward, **kwargs):
            nonlocal count
            count += 1
            return forward(*args, **kwargs)

        model.model.language_model.layers[0].mlp.forward = counted
        settings = TrainSettings(max_steps=2, gradient_checkpointing=True, checkpoint_from_tokens=bound)
        train_(model, processor, data, shared, settings, tmp_path / str(bound))
        weights.append(model.lm_head.weight.detach().clone())
        calls.append(count)
    assert calls == [4, 2]
    torch.testing.assert_close(weights[0], weights[1])


def test_workers_load_the_same_batches(make_model, processor, shared, data, tmp_path):
    def batches(num_workers):
        settings = TrainSettings(num_workers=num_workers)
        _, trainer = make_trainer(make_model(), processor, data, shared, settings, tmp_path)
        pickle.dumps(trainer.data_collator)  # as workers get it where they are not forked
        return list(trainer.get_train_dataloader())

    for ours, theirs in zip(batches(2), batches(0), strict=True):
        assert ours["ids"] == theirs["ids"]
        assert torch.equal(ours["input_features"], theirs["input_features"])


def test_mixed_precision_lora_of_bfloat16_weights(make_model, processor, shared, data, tmp_path):
    model = make_model(layers=2).to(torch.bfloat16)
    settings = TrainSettings(method="lora", max_steps=3, learning_rate=1e-2, mixed_precision="bf16", logging_steps=1)
    info = train_(model, processor, data, shared, settings, tmp_path)
    assert info["losses"][-1]["loss"] < info["losses"][0]["loss"]
    rates = [entry["learning_rate"] for entry in info["losses"]]  # of the step that follows: the curve of the report
    assert rates == sorted(rates, reverse=True)
    assert rates[0] <= 1e-2
    adapter = [p for name, p in info["adapted"].named_parameters() if "lora_" in name]
    assert {p.dtype for p in adapter} == {torch.float32}  # small updates would be lost in bfloat16
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "flash_adamw"}, "needs a CUDA GPU; set optimizer: adamw_torch"),
        ({"fsdp": True}, "several processes with a GPU each: start with accelerate launch"),
    ],
)
def test_training_says_what_it_needs(make_model, processor, shared, data, tmp_path, change, message):
    settings = TrainSettings(max_steps=1, **change)
    with pytest.raises(TrainingError, match=message):
        train_(make_model(layers=2), processor, data, shared, settings, tmp_path)


def test_scaled_gradients_change_nothing():
    """Without what needs a GPU, against PyTorch's. Of a model it asks only what is seen here."""
    pytest.importorskip("flashoptim")
    asked = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, requires_grad=True)
    model, settings = SimpleNamespace(parameters=lambda: [asked]), TrainSettings(learning_rate=1e-3, max_grad_norm=0.7)
    kind, arguments = flash_adamw(model, settings)
    torch.manual_seed(0)
    ours, plain = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    optimizer = kind([ours], weight_decay=0.01, quantize=False, fused=False, **arguments)
    expected = torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.01)
    for step in range(5):
        ours.grad = torch.randn(50) * 10.0 ** (-step)
        plain.grad = ours.grad.clone()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "optimizer"), [("full", "adamw_torch"), ("lora", "adamw_torch"), ("full", "adamw_bnb_8bit")]
)
def test_resumed_training_ends_with_equal_weights(
    make_model, processor, shared, data, tmp_path, killed_in_step, method, optimizer
):
    """Stopped in step 6 after a checkpoint at step 5, in the midst of an epoch of 4 steps, with a later checkpoint half written."""
    settings = TrainSettings(
        method=method, max_steps=7, learning_rate=1e-3, save_steps=5, lora=LoraSettings(r=4, alpha=8),
        optimizer=optimizer,
    )  # fmt: skip

    def weights(info, model):
        return {n: p.detach().clone() for n, p in info.get("adapted", model).named_parameters()}

    model = make_model(layers=2)
    straight = weights(train_(model, processor, data, shared, settings, tmp_path / "straight"), model)

    with killed_in_step(6):
        train_(make_model(layers=2), processor, data, shared, settings, tmp_path / "stopped")
    half = tmp_path / "stopped" / "checkpoint-6"
    shutil.copytree(tmp_path / "stopped" / "checkpoint-5", half)
    (half / "complete.json").unlink()
    next(half.glob("*model.safetensors")).write_bytes(b"half")
    assert checkpoints.last_complete_checkpoint(tmp_path / "stopped").endswith("checkpoint-5")

    model = make_model(layers=2)
    resumed = weights(train_(model, processor, data, shared, settings, tmp_path / "stopped"), model)
    assert straight.keys() == resumed.keys()
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name


@pytest.mark.parametrize(
    "damage", ["optimizer.pt missing", "rng_state.pth missing", "model.safetensors cut", "mark empty"]
)
def test_a_damaged_checkpoint_is_not_gone_on_from(
    make_model, processor, shared, data, tmp_path, killed_in_step, capsys, damage
):
    """The Trainer itself would take up one without its optimizer, and end with other weights."""
    settings = TrainSettings(max_steps=7, learning_rate=1e-3, save_steps=2)
    straight = make_model(layers=2)
    train_(straight, processor, data, shared, settings, tmp_path / "straight")
    with killed_in_step(5):
        train_(make_model(layers=2), processor, data, shared, settings, tmp_path / "stopped")
    name, kind = damage.split()
    file = tmp_path / "stopped" / "checkpoint-4" / ("complete.json" if name == "mark" else name)
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if kind == "empty" else file.read_bytes()[:-1])
    resumed = make_model(layers=2)
    train_(resumed, processor, data, shared, settings, tmp_path / "stopped")
    said = capsys.readouterr().err
    assert "checkpoint-4 is damaged" in said
    assert "training goes on at step 2 of 7" in said
    for ours, theirs in zip(resumed.parameters(), straight.parameters()):
        assert torch.equal(ours, theirs)


@pytest.fixture
def trained(make_model, processor, shared, data, tmp_path):
    """Trains a small model for some steps in one folder; a clock that goes on by so many seconds a step, and the steps saved."""

    def train(seconds_per_step=0.0, writing=0.0, folder="training", **settings):
        model, saved = make_model(layers=2), []
        settings = TrainSettings(max_steps=6, learning_rate=1e-3, freeze=["audio_tower"], logging_steps=4, **settings)
        _, trainer = make_trainer(model, processor, data, shared, settings, tmp_path / folder)
        now = [0.0]
        step, save = trainer.training_step, trainer._save_checkpoint

        def timed_step(*args, **kwargs):
            now[0] += seconds_per_step
            return step(*args, **kwargs)

        def timed_save(*args, **kwargs):
            saved.append(trainer.state.global_step)
            now[0] += writing
            return save(*args, **kwargs)

        trainer.training_step, trainer._save_checkpoint = timed_step, timed_save
        trainer.checkpoints.clock = lambda: now[0]
        with trainer.checkpoints.told():
            trainer.train(resume_from_checkpoint=trainer.checkpoints.resumed)
        return model, saved, trainer

    return train


@pytest.mark.parametrize(
    ("seconds", "writing", "settings", "expected"),
    [
        (1.0, 0.01, {}, [2, 4, 6]),  # never more often than every two seconds, although writing takes nothing
        (1.0, 0.15, {}, [2, 5, 6]),  # 20 x 0.15 s after the first
        (60.0, 3.0, {}, [1, 2, 3, 4, 5, 6]),  # 20 x 3 s
        (1.0, 0.01, {"save_minutes": 0.05}, [3, 6]),
        (1.0, 0.01, {"save_minutes": 10.0, "save_steps": 4}, [4, 6]),
        (0.0, 0.0, {}, [6]),  # always after the last step: what follows training goes on from there
    ],
)
def test_checkpoints_come_by_time(trained, seconds, writing, settings, expected):
    assert trained(seconds, writing, **settings)[1] == expected


def test_writing_a_large_checkpoint_is_told(trained, monkeypatch):
    advance = Mock()
    monkeypatch.setattr(checkpoints, "progress", lambda *_, **__: nullcontext(advance))
    trained(1.0, 30.0)
    assert ["writing" in call.args[1] for call in advance.call_args_list[-2:]] == [True, False]


def test_after_fruitless_starts_a_checkpoint_comes_sooner(trained, killed_in_step, tmp_path, capsys):
    """Killed in every step before a checkpoint would come: each start waits half as long as the one before, so one comes at last."""
    come = []
    for _ in range(6):
        try:
            with killed_in_step(3):
                trained(1.0, 0.0, save_minutes=0.2)
        except pytest.fail.Exception:  # it was not killed any more: it went on beyond step 3
            break
        come.append(checkpoints.last_complete_checkpoint(tmp_path / "training"))
        if come[-1]:
            break
    assert come[:2] == [None, None]
    assert come[-1].endswith("checkpoint-3")
    trained(1.0, 0.0, save_minutes=0.2)
    said = capsys.readouterr().err
    assert "training goes on at step 0 of 6; 3 steps since that checkpoint are done again" in said
    assert "training goes on at step 3 of 6; no step was lost" in said


def test_killed_after_the_last_step_nothing_is_trained_again(trained, monkeypatch):
    """4 steps are an epoch, so the last checkpoint is in the midst of one: transformers would go on with step 7."""
    model, saved, first = trained()
    again, saved_again, second = trained()
    assert saved == [6]
    assert saved_again == []
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert second.state.log_history[0] == first.state.log_history[0]


def test_the_loss_curve_goes_on_where_it_was(trained, killed_in_step):
    """Logged every 4 steps; killed after a checkpoint at step 3, and the losses of steps 1 to 3 count."""
    straight = trained(folder="straight")[2]
    with killed_in_step(3):
        trained(folder="stopped", save_steps=3)
    resumed = trained(folder="stopped")[2]
    curve = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (straight, resumed)]
    assert curve[0] == curve[1]
    assert straight._total_loss_scalar == resumed._total_loss_scalar


def test_stored_audio_survives_a_restart(make_model, processor, split, tmp_path, monkeypatch):
    """Killed in the third batch: the first two are not computed again, and everything is as if never killed."""
    calls = []

    def counted(model, processor, audio, **kwargs):
        calls.append(len(audio))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_audio(model, processor, audio, **kwargs)

    monkeypatch.setattr("trimlingual.training.stored_audio.BATCH", 2)
    monkeypatch.setattr("trimlingual.training.parts.PART_S", 0.0)
    model = make_model()
    straight = stored_states(model, processor, split.clips, tmp_path / "straight")
    monkeypatch.setattr("trimlingual.training.stored_audio.encode_audio", counted)
    with pytest.raises(KeyboardInterrupt):
        stored_states(model, processor, split.clips, tmp_path / "killed")
    resumed = stored_states(model, processor, split.clips, tmp_path / "killed")
    assert calls == [2, 2, 2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    again = stored_states(model, processor, split.clips, tmp_path / "killed")
    assert len(calls) == 5
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
    by_workers = stored_states(make_model(), processor, split.clips, tmp_path / "workers", num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, by_workers, strict=True))
    del calls[5:]
    stored_states(model, processor, split.clips[::-1], tmp_path / "killed")
    assert len(calls) == 9  # in another order they are other states


def test_a_checkpoint_that_does_not_fit_is_an_error(make_model, processor, shared, data, tmp_path):
    settings = TrainSettings(max_steps=2, save_steps=2)
    train_(make_model(layers=2), processor, data, shared, settings, tmp_path)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 2', '"global_step": 1'))  # of the same size: not damaged
    with pytest.raises(TrainingError, match="does not fit"):
        train_(make_model(layers=3), processor, data, shared, settings, tmp_path)


def test_non_finite_loss_stops_with_step_and_ids(make_model, processor, shared, data, tmp_path):
    model = make_model(layers=2)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"nan at step 1; the batch holds clip-\d+:(de|zh)"):
        train_(model, processor, data, shared, TrainSettings(max_steps=2), tmp_path)


@EVERY_FAMILY
def test_a_reference_that_spells_a_special_token_is_text(make_model, processor, split, shared, tmp_path):
    """As a placeholder for audio it broke the training, as an end it cut the answer."""
    prompter = Prompter(processor, shared.task)
    text = f"Das {processor.tokenizer.convert_ids_to_tokens(prompter.audio_token_id)} ist Text."
    ids = prompter.answer_ids(text)
    assert ids[-1] == prompter.end_id
    assert prompter.audio_token_id not in ids
    assert prompter.decode(ids) == text
    clip = split.clips[0]
    data = TrainingData(split.clips, [Example(0, clip.id, "de", text)])
    info = train_(make_model(layers=2), processor, data, shared, TrainSettings(max_steps=1), tmp_path)
    assert info["steps"] == 1


def test_nothing_to_train_on(make_model, processor, split, shared, tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        train_(make_model(layers=2), processor, TrainingData(split.clips, []), shared, TrainSettings(), tmp_path)


def test_forward_is_the_classs_own_after_training(make_model, processor, shared, data, tmp_path):
    model = make_model(layers=2)
    train_(model, processor, data, shared, TrainSettings(max_steps=1), tmp_path)
    assert "forward" not in vars(model)


def test_no_attention_that_is_built_for_each_shape(make_model, processor, shared, data, tmp_path):
    """cuDNN's kernels are off in the forward pass and while checkpointed layers run again, and as before afterwards."""
    model, seen = make_model(layers=2), []
    before = torch.backends.cuda.cudnn_sdp_enabled()
    attention = model.model.language_model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    settings = TrainSettings(max_steps=1, gradient_checkpointing=True)
    train_(model, processor, data, shared, settings, tmp_path)
    assert seen == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
