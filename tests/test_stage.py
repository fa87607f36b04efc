"""A stage's training: what moves, what decides it, and that cutting, accumulating and checkpointing change nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from limner import checkpoint, loop
from limner.models.lora import adapter_as, adapter_off, add_lora, copy_adapter, load_adapter_state, remove_adapters
from limner.models.stable_diffusion import Pipeline, wrap
from limner.recipe import Learn
from limner.training import losses
from limner.training.errors import measure
from limner.training.stage import Draw, Pairs, compute_loss, prepare, train_stage
from pairs import examples, fresh, latents
from tiny import tiny_pipeline

LEARN = Learn(max_train_steps=4, train_batch_size=2, rank=2, learning_rate=1e-2, checkpointing_steps=2, beta=500, statistics_weight=1e4)
Adapter = dict[str, Tensor]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return prepare(fresh(), examples())


def run(folder: Path, pairs: Pairs, learn: Learn = LEARN, pipeline: Pipeline | None = None, start: Adapter | None = None) -> Adapter:
    return train_stage(pipeline or fresh(), pairs, learn, folder, stage="easy", seed=3, start=start)


def log(folder: Path) -> list[dict[str, float]]:
    """log.jsonl without what the clock and the machine say."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "peak_memory_mb")} for r in rows]


def same(a: Adapter, b: Adapter) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: Adapter, b: Adapter) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def undisturbed(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder, pairs), folder


# -- what moves --------------------------------------------------------------------------------------------------------


# 16 convolutions and 5 shortcuts of 8 resnets, 8 projections of 4 attentions, 2 samplers
@pytest.mark.parametrize(("layers", "convolutions"), [("attention", 0), ("all", 31)])
def test_only_the_adapter_moves(pairs: Pairs, tmp_path: Path, layers: Any, convolutions: int) -> None:
    """All weights of the three networks are bit for bit what they were; every B has left zero."""
    pipeline = fresh()
    before = {f"{n}.{k}": v.clone() for n in ("unet", "vae", "text_encoder") for k, v in getattr(pipeline, n).state_dict().items()}
    after = run(tmp_path, pairs, replace(LEARN, layers=layers), pipeline)
    assert all(v.abs().max() > 0 for k, v in after.items() if ".lora_B." in k)
    assert sum(v.dim() == 4 for k, v in after.items() if ".lora_B." in k) == convolutions
    gradients = {n for n, p in pipeline.unet.named_parameters() if p.grad is not None}
    assert gradients
    assert all(".lora_" in n for n in gradients)
    assert not any(p.grad is not None for m in (pipeline.vae, pipeline.text_encoder) for p in m.parameters())
    remove_adapters(pipeline.unet)
    now = {f"{n}.{k}": v for n in ("unet", "vae", "text_encoder") for k, v in getattr(pipeline, n).state_dict().items()}
    assert same(before, now)


def test_the_log_starts_at_log_2(undisturbed: tuple[Adapter, Path]) -> None:
    """At the first step policy and reference are one: loss log 2, no margin, a tie; later the loss of four steps on six pairs has moved."""
    rows = log(undisturbed[1])
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert (rows[0]["margin"], rows[0]["accuracy"], rows[0]["statistics"]) == (0, 0.5, 0)
    assert rows[0]["grad_norm"] > 0
    assert rows[-1]["loss"] != rows[0]["loss"]
    assert rows[-1]["epoch"] == pytest.approx(4 * 2 / 6)


def test_training_learns_the_pairs(tmp_path: Path) -> None:
    """Winners are bright and losers dark all over: forty steps make the winners' noise easier to tell than the losers'."""
    signed = [replace(e, latents=torch.full((4, 8, 8), 2.0 if e.role == "winner" else -2.0).numpy().tobytes()) for e in examples()]
    run(
        tmp_path,
        prepare(fresh(), signed),
        replace(LEARN, max_train_steps=40, statistics_weight=0.0, checkpointing_steps=0, max_timestep=700),
    )
    late = log(tmp_path)[-10:]
    assert sum(r["accuracy"] for r in late) / 10 > 0.75
    assert sum(r["loss"] for r in late) / 10 < 0.69


# -- cuts and continuations --------------------------------------------------------------------------------------------


def test_cut_and_resumed_equals_undisturbed(pairs: Pairs, undisturbed: tuple[Adapter, Path], tmp_path: Path) -> None:
    cut = run(tmp_path, pairs, replace(LEARN, max_train_steps=2))
    resumed = run(tmp_path, pairs)
    assert same(resumed, undisturbed[0])
    assert not same(cut, resumed)
    assert log(tmp_path) == log(undisturbed[1])


def test_another_number_of_processes_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    """It would go on with other batches."""
    run(tmp_path, pairs, replace(LEARN, max_train_steps=2))
    state = tmp_path / "checkpoint-2/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "processes": 4}))
    with pytest.raises(ValueError, match=r"checkpoint-2 is of 4 processes, and this is 1: go on with as many, or remove"):
        run(tmp_path, pairs)


def test_a_kill_between_checkpoints_equals_undisturbed(pairs: Pairs, undisturbed: tuple[Adapter, Path], tmp_path: Path) -> None:
    """Killed in step 4: the state is that of step 2, the log is ahead of it and its last line is cut. Both are put right."""
    run(tmp_path, pairs, replace(LEARN, max_train_steps=2))
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')
    assert same(run(tmp_path, pairs), undisturbed[0])
    assert log(tmp_path) == log(undisturbed[1])


def test_a_signal_saves_and_ends_with_130(
    pairs: Pairs, undisturbed: tuple[Adapter, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the third step, which is no checkpoint's."""
    calls: list[int] = []

    def draw(self: Draw, step: int):
        calls.append(step)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, step)

    call = Draw.__call__
    monkeypatch.setattr(Draw, "__call__", draw)
    with pytest.raises(loop.Interrupted) as caught:
        run(tmp_path, pairs)
    assert (caught.value.code, caught.value.step) == (130, 3)
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert same(run(tmp_path, pairs), undisturbed[0])
    assert calls == [0, 1, 2, 3]
    assert log(tmp_path) == log(undisturbed[1])


def test_old_checkpoints_go(undisturbed: tuple[Adapter, Path], pairs: Pairs, tmp_path: Path) -> None:
    run(tmp_path, pairs, replace(LEARN, checkpointing_steps=1, checkpoints_total_limit=3))
    assert checkpoint.steps(tmp_path) == [2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "log.jsonl"]


def test_a_full_disk_keeps_the_checkpoint_before(
    undisturbed: tuple[Adapter, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"adapter": undisturbed[0]}
    checkpoint.save(tmp_path, 1, weights, {}, {})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be written .*No space left"):
        checkpoint.save(tmp_path, 2, weights, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_damaged_checkpoint_is_named(undisturbed: tuple[Adapter, Path], pairs: Pairs, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 2, {"adapter": undisturbed[0]}, {}, {})
    data = (path / "adapter.safetensors").read_bytes()
    (path / "adapter.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="checkpoint-2 cannot be read"):
        run(tmp_path, pairs)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_pairs_of_two_sizes_train(tmp_path: Path) -> None:
    run(tmp_path, prepare(fresh(), examples(5, sizes=((8, 8), (12, 8)))))
    assert len(log(tmp_path)) == 4


def test_accumulation_equals_a_larger_batch(pairs: Pairs, tmp_path: Path) -> None:
    """The mean over micro-batches is the mean over their samples, up to rounding."""
    large = run(tmp_path / "large", pairs, replace(LEARN, train_batch_size=6))
    small = run(tmp_path / "small", pairs, replace(LEARN, gradient_accumulation_steps=3))
    for a, b in zip(log(tmp_path / "large"), log(tmp_path / "small"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert distance(large, small) < LEARN.learning_rate  # Adam makes whole steps of a gradient that is only rounding


# -- losses in place ---------------------------------------------------------------------------------------------------


def moved(pipeline: Pipeline, name: str = "policy", seed: int = 0) -> list[torch.nn.Parameter]:
    """An adapter that does something."""
    parameters = add_lora(pipeline.unet, name, rank=2, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return parameters


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_statistics_of_the_same_pass_equal_a_separate_one(pairs: Pairs, prediction: str) -> None:
    """A pass of its own for each network on the winners, a DDPM step of the library with shared noise, and eq. 4 on the results."""
    pipeline = wrap(tiny_pipeline(prediction=prediction), device="cpu")
    moved(pipeline)
    batch = replace(Draw(pairs, replace(LEARN, train_batch_size=4), 0, "easy")(0)[0], t=torch.tensor([0, 30, 500, 999]))
    errors = measure(pipeline, batch, lambda: adapter_off(pipeline.unet))
    found = losses.statistics(errors.policy_noise, errors.base_noise, batch.t, pipeline.alphas)
    ddpm = DDPMScheduler.from_config(pipeline.scheduler_config)
    assert not ddpm.config.clip_sample
    noisy = ddpm.add_noise(batch.winner, batch.noise, batch.t)
    wanted = []
    for i, t in enumerate(batch.t):
        means = []
        for network in ("policy", "base"):
            with torch.no_grad():
                one = (noisy[i : i + 1], t, batch.text[i : i + 1])
                if network == "base":
                    with adapter_off(pipeline.unet):
                        output = pipeline.unet(*one).sample
                else:
                    output = pipeline.unet(*one).sample
            step = ddpm.step(output.double(), int(t), noisy[i : i + 1].double(), generator=torch.Generator().manual_seed(1))
            means.append(step.prev_sample.mean((2, 3)))
        wanted.append((means[0] - means[1]).square().sum())
    assert torch.allclose(found.detach().double(), torch.stack(wanted), rtol=2e-3, atol=1e-12)


def test_errors_are_the_networks_own(pairs: Pairs) -> None:
    """Mean squared difference of each network's prediction from the noise, a pass for each role; winner and loser share noise and t."""
    pipeline = fresh()
    moved(pipeline)
    batch = Draw(pairs, LEARN, 0, "easy")(0)[0]
    errors = measure(pipeline, batch, lambda: adapter_off(pipeline.unet))
    ddpm = DDPMScheduler.from_config(pipeline.scheduler_config)
    for role, clean in (("winner", batch.winner), ("loser", batch.loser)):
        with torch.no_grad():
            predicted = pipeline.unet(ddpm.add_noise(clean, batch.noise, batch.t), batch.t, batch.text).sample
        assert torch.allclose(getattr(errors, role), ((predicted - batch.noise) ** 2).mean((1, 2, 3)), rtol=1e-5)
        assert getattr(errors, role).requires_grad
        assert not getattr(errors, f"{role}_reference").requires_grad


def test_reference_base_or_start(pairs: Pairs, undisturbed: tuple[Adapter, Path], tmp_path: Path) -> None:
    """From a trained start: against `start` the first loss is log 2, against `base` it is not; the reference itself stays where it was."""
    learn = replace(LEARN, max_train_steps=2, statistics_weight=0.0)
    pipeline = fresh()
    after = run(tmp_path / "start", pairs, replace(learn, reference="start"), pipeline, start=undisturbed[0])
    run(tmp_path / "base", pairs, learn, start=undisturbed[0])
    assert log(tmp_path / "start")[0]["margin"] == 0
    assert log(tmp_path / "start")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert log(tmp_path / "base")[0]["margin"] != 0
    assert not same(after, undisturbed[0])
    again = fresh()
    add_lora(again.unet, "policy", rank=2)
    load_adapter_state(again.unet, "policy", undisturbed[0])
    x, t, text = latents(1, 1, 4, 8, 8), torch.tensor([500]), pairs.empty
    with torch.no_grad(), adapter_as(pipeline.unet, "start"):
        assert torch.equal(pipeline.predict(x, t, text), again.predict(x, t, text))


def test_statistics_where_the_last_step_has_no_signal(pairs: Pairs) -> None:
    """Zero terminal SNR: the last cumulative alpha is 0, and a step's factor 1/0."""
    pipe = tiny_pipeline(prediction="v_prediction")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    pipeline = wrap(pipe, device="cpu")
    moved(pipeline)
    batch = replace(Draw(pairs, LEARN, 0, "easy")(0)[0], t=torch.tensor([999, 998]))
    errors = measure(pipeline, batch, lambda: adapter_off(pipeline.unet))
    assert DDPMScheduler.from_config(pipeline.scheduler_config).alphas_cumprod[-1] == 0
    assert losses.statistics(errors.policy_noise, errors.base_noise, batch.t, pipeline.alphas).isfinite().all()


def test_statistics_are_kept_to_the_base_whatever_the_reference(pairs: Pairs, undisturbed: tuple[Adapter, Path], tmp_path: Path) -> None:
    """The first step's term of a stage that starts from a trained adapter: as by eq. 4 against the base, which the start has left."""
    learn = replace(LEARN, max_train_steps=1)
    for reference in ("base", "start"):
        run(tmp_path / reference, pairs, replace(learn, reference=reference), start=undisturbed[0])
    pipeline = fresh()
    add_lora(pipeline.unet, "policy", rank=2)
    load_adapter_state(pipeline.unet, "policy", undisturbed[0])
    batch = Draw(pairs, learn, 3, "easy")(0)[0]
    with torch.no_grad():
        noisy = pipeline.add_noise(batch.winner, batch.noise, batch.t)
        policy = pipeline.predict(noisy, batch.t, batch.text)
        with adapter_off(pipeline.unet):
            base = pipeline.predict(noisy, batch.t, batch.text)
    wanted = learn.statistics_weight * losses.statistics(policy, base, batch.t, pipeline.alphas).mean().item()
    assert wanted > 1e-4
    assert log(tmp_path / "start")[0]["statistics"] == pytest.approx(wanted, rel=1e-4)
    assert log(tmp_path / "base")[0]["statistics"] == pytest.approx(wanted, rel=1e-4)


def test_terms_add_up(pairs: Pairs) -> None:
    """loss = dpo + weight * statistics + weight * winner's error; loser_weight and safeguard change gradients only."""
    pipeline = fresh()
    parameters = moved(pipeline)
    batch = Draw(pairs, LEARN, 0, "easy")(0)[0]

    def total(**options: float) -> tuple[Tensor, Tensor]:
        errors = measure(pipeline, batch, lambda: adapter_off(pipeline.unet))
        learn = replace(LEARN, statistics_weight=0.0, beta=10, **options)
        loss, _ = compute_loss(errors, batch.t, learn, pipeline.alphas)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    plain, gradient = total()
    errors = measure(pipeline, batch, lambda: adapter_off(pipeline.unet))
    term = losses.statistics(errors.policy_noise, errors.base_noise, batch.t, pipeline.alphas)
    full, _ = compute_loss(errors, batch.t, replace(LEARN, beta=10, statistics_weight=100.0, sft_weight=0.5), pipeline.alphas)
    assert torch.allclose(full, plain + 100 * term + 0.5 * errors.winner, rtol=1e-5)
    for options in ({"loser_weight": 0.25}, {"safeguard": 0.9}):
        loss, other = total(**options)
        assert torch.allclose(loss, plain)
        assert not torch.allclose(other, gradient)


def test_sft_needs_no_loser(tmp_path: Path) -> None:
    targets = prepare(fresh(), examples(roles=("target",)))
    assert targets.loser is None
    run(tmp_path, targets, replace(LEARN, loss="sft"))
    assert set(log(tmp_path)[0]) >= {"loss", "winner_error_difference", "grad_norm"}


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    """The message names the groups of the batch; the last checkpoint and the base stand."""
    bad = examples(2)
    nan = torch.full((4, 8, 8), float("nan")).numpy().tobytes()
    pairs = prepare(fresh(), [bad[0], replace(bad[1], latents=nan), *bad[2:]])
    pipeline = fresh()
    with pytest.raises(RuntimeError, match=r"loss of step 0 is nan; nothing was updated\. Batch: (g0, g1|g1, g0)"):
        run(tmp_path, pairs, pipeline=pipeline)
    assert all((p == 0).all() for n, p in pipeline.unet.named_parameters() if ".lora_B." in n)
    assert checkpoint.latest(tmp_path) is None


# -- precision and memory ----------------------------------------------------------------------------------------------


def test_bf16_runs_and_errors_are_float32(pairs: Pairs, tmp_path: Path) -> None:
    """The adapter stays float32 and moves; errors and losses are float32 and near to those of a float32 run."""
    pipeline = fresh(mixed_precision="bf16")
    after = run(tmp_path, pairs, pipeline=pipeline)
    assert pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    assert {v.dtype for v in after.values()} == {torch.float32}
    assert all(v.abs().max() > 0 for v in after.values())
    batch = Draw(pairs, LEARN, 0, "easy")(0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        errors = measure(pipeline, batch, lambda: adapter_off(pipeline.unet))
    assert {getattr(errors, n).dtype for n in ("winner", "loser", "winner_reference", "loser_reference", "policy_noise")} == {torch.float32}
    exact = measure(fresh(), batch, lambda: adapter_off(pipeline.unet))
    assert torch.allclose(errors.winner_reference, exact.winner, rtol=0.02)


def test_gradient_checkpointing_gives_the_same_gradients(pairs: Pairs, tmp_path: Path) -> None:
    learn = replace(LEARN, reference="start", gradient_checkpointing=True)
    plain = run(tmp_path / "plain", pairs, replace(learn, gradient_checkpointing=False))
    assert distance(run(tmp_path / "less", pairs, learn), plain) < 1e-6


def test_copies_do_not_train(pairs: Pairs) -> None:
    pipeline = fresh()
    moved(pipeline)
    copy_adapter(pipeline.unet, "policy", "start")
    assert not any(p.requires_grad for n, p in pipeline.unet.named_parameters() if ".start." in n)
