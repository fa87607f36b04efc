"""One optimisation step of Limner against the plain way: time, memory and loss.

    python benchmarks/train_step.py            # both, several times in turn; the last line is JSON

The plain way is the usual script for HG-DPO's easy stage: diffusers' research script for Diffusion-DPO with LoRA, with a frozen second
UNet as the reference; VAE and text encoder run in every step; the statistics term (eq. 4) passes the winner through both networks again
and takes a step of diffusers' DDPMScheduler. Ours is `limner.training.stage.train_stage` on prepared pairs, as `limner train` calls it.
Same weights, images, noise, timesteps, optimiser and precision; SD 1.5's proportions with a quarter of the channels, 256 pixels, two pairs.
Each run has its own process, so that peak memory (above imports) can be compared. That the losses are equal is checked in double precision
on the same draws: in float32 an error near 1 is rounded by 1e-7, which beta / 2 turns into 1e-4 of the loss, whoever computes it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the pipeline builder

PAIRS, SIZE, RANK, BETA, LAMBDA, RATE = 2, 256, 8, 2500.0, 1e4, 1e-5
CAPTIONS = ["a woman in a red coat waving", "a man running across a square"]
SEED, STAGE = 0, "easy"
TOLERANCE = 1e-5


def learn(steps: int):
    """The stage's options, for both."""
    from limner.recipe import Learn

    return Learn(
        loss="dpo", beta=BETA, statistics_weight=LAMBDA, rank=RANK, learning_rate=RATE, max_train_steps=steps, train_batch_size=PAIRS,
        checkpointing_steps=10**6,
    )  # fmt: skip


def pictures():
    """Winners and losers, (2, PAIRS, 3, SIZE, SIZE) in [0, 1] with 256 levels: smooth noise."""
    import torch
    import torch.nn.functional as F

    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(2 * PAIRS, 3, SIZE // 16, SIZE // 16, generator=g)
    return (F.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 1) * 255).round().div(255).view(2, PAIRS, 3, SIZE, SIZE)


def trained_adapter(unet) -> dict:
    """An adapter that already does something: with B = 0 every loss would be log 2."""
    import torch

    from limner.models import lora

    lora.add_lora(unet, "policy", rank=RANK, seed=0)
    state = lora.adapter_state(unet, "policy")
    lora.remove_adapters(unet)
    g = torch.Generator().manual_seed(2)
    return {k: v if ".lora_A." in k else 1e-2 * torch.randn(v.shape, generator=g) for k, v in state.items()}


def prepared(pipe, steps: int):
    """Our side before the first step: the pipeline, pairs of latents and texts, the adapter to start from."""
    from limner.images import encode_png
    from limner.models.stable_diffusion import wrap
    from limner.records import Example
    from limner.training.stage import prepare

    pipeline = wrap(pipe, device="cpu")
    examples = [
        Example(group=str(i), role=role, text=CAPTIONS[i], image_id=f"{i}/{role}", image=encode_png(image))
        for role, images in zip(("winner", "loser"), pictures())
        for i, image in enumerate(images)
    ]
    return pipeline, prepare(pipeline, examples), trained_adapter(pipeline.unet)


def train_ours(pipe, steps: int) -> dict[str, list[float]]:
    """Losses and seconds of each step."""
    from limner.training.stage import train_stage

    pipeline, pairs, start = prepared(pipe, steps)
    pipeline.release()
    with tempfile.TemporaryDirectory() as folder:
        train_stage(pipeline, pairs, learn(steps), Path(folder), stage=STAGE, seed=SEED, start=start)
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {"losses": [row["loss"] for row in log], "seconds": [row["seconds"] for row in log]}


def check_ours(pipe, steps: int) -> dict[str, list[float]]:
    """Losses of the same draws in double precision, without updates."""
    import torch

    from limner.models import lora
    from limner.training.errors import measure
    from limner.training.stage import POLICY, Draw, compute_loss

    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.double()
    pipeline, pairs, start = prepared(pipe, steps)
    lora.add_lora(pipeline.unet, POLICY, rank=RANK)
    lora.load_adapter_state(pipeline.unet, POLICY, start)
    pipeline.unet.double()
    pipeline.dtype = torch.float64
    draw, losses = Draw(pairs, learn(steps), SEED, STAGE), []
    with torch.no_grad():
        for step in range(steps):
            batch = draw(step)[0]
            errors = measure(pipeline, batch, lambda: lora.adapter_off(pipeline.unet))
            losses.append(compute_loss(errors, batch.t, learn(steps), pipeline.alphas)[0].mean().item())
    return {"losses": losses}


def plain_way(pipe, steps: int, double: bool):
    """The plain script's set-up: its parameters, and step number to loss. Of Limner it has only the numbers that are drawn."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from peft import LoraConfig, set_peft_model_state_dict

    from limner.training.stage import Draw, Pairs

    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    start = trained_adapter(unet)
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False)
    reference = copy.deepcopy(unet)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    set_peft_model_state_dict(unet, start)
    dtype = torch.float64 if double else torch.float32
    for module in (unet, reference, vae, text_encoder):
        torch.nn.Module.to(module, dtype)
    winners, losers = pictures().to(dtype)
    blank = torch.zeros(4, SIZE // 8, SIZE // 8)
    names = [str(i) for i in range(PAIRS)]
    draw = Draw(
        Pairs(names, [blank] * PAIRS, [blank] * PAIRS, torch.zeros(PAIRS, 1, 1), torch.arange(PAIRS), torch.zeros(1, 1, 1)),
        learn(steps), SEED, STAGE,
    )  # fmt: skip

    def loss_of(step: int) -> torch.Tensor:
        drawn = draw(step)[0]
        rows = [int(n) for n in drawn.names]
        pixels = torch.cat([winners[rows], losers[rows]]) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
            tokens = tokenizer(
                [CAPTIONS[r] for r in rows],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            states = text_encoder(tokens.input_ids)[0].repeat(2, 1, 1)
        noise, t = drawn.noise.to(dtype).repeat(2, 1, 1, 1), drawn.t.repeat(2)
        noisy = scheduler.add_noise(latents, noise, t)
        errors = F.mse_loss(unet(noisy, t, states).sample, noise, reduction="none").mean((1, 2, 3))
        with torch.no_grad():
            expected = F.mse_loss(reference(noisy, t, states).sample, noise, reduction="none").mean((1, 2, 3))
        (winner, loser), (winner_reference, loser_reference) = errors.chunk(2), expected.chunk(2)
        loss = -F.logsigmoid(-0.5 * BETA * ((winner - winner_reference) - (loser - loser_reference))).mean()
        noisy, t, states = noisy[:PAIRS], t[:PAIRS], states[:PAIRS]
        policy_noise = unet(noisy, t, states).sample
        with torch.no_grad():
            base_noise = reference(noisy, t, states).sample
        terms = []
        for i in range(PAIRS):
            policy_step, base_step = (
                scheduler.step(predicted[i : i + 1], int(t[i]), noisy[i : i + 1], generator=torch.Generator().manual_seed(step)).prev_sample
                for predicted in (policy_noise, base_noise)
            )
            terms.append((policy_step.mean((2, 3)) - base_step.mean((2, 3))).square().sum())
        return loss + LAMBDA * torch.stack(terms).mean()

    return [p for p in unet.parameters() if p.requires_grad], loss_of


def train_plain(pipe, steps: int) -> dict[str, list[float]]:
    """Losses and seconds of each step."""
    import torch

    parameters, loss_of = plain_way(pipe, steps, double=False)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2)
    losses, seconds = [], []
    for step in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {"losses": losses, "seconds": seconds}


def check_plain(pipe, steps: int) -> dict[str, list[float]]:
    """Losses of the same draws in double precision, without updates."""
    import torch

    _, loss_of = plain_way(pipe, steps, double=True)
    with torch.no_grad():
        return {"losses": [loss_of(step).item() for step in range(steps)]}


def memory(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most (getrusage's peak would count the process that started this one)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


WAYS = {"ours": train_ours, "plain": train_plain, "check_ours": check_ours, "check_plain": check_plain}


def child(way: str, steps: int) -> None:
    """One run in this process; prints JSON."""
    import torch
    from diffusers import DDPMScheduler  # noqa: F401
    from peft import LoraConfig  # noqa: F401

    import limner.models.lora
    import limner.training.stage  # noqa: F401
    from sd15 import sd15_pipeline

    imports = memory("VmRSS")
    pipe = sd15_pipeline(4)
    before = time.process_time()
    found = WAYS[way](pipe, steps)
    print(
        json.dumps({**found, "memory": memory("VmHWM") - imports, "cpu": time.process_time() - before, "threads": torch.get_num_threads()})
    )


def start(way: str, steps: int) -> dict:
    """Run `child` in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--steps", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=sorted(WAYS), help="run one side in this process")
    parser.add_argument("--steps", type=int, default=4, help="a run's steps; the first is not timed")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each side, in turn")
    args = parser.parse_args()
    if args.way:
        child(args.way, args.steps)
        return
    exact = {way: start(f"check_{way}", 2)["losses"] for way in ("ours", "plain")}
    difference = max(abs(a - b) for a, b in zip(exact["ours"], exact["plain"]))
    assert difference < TOLERANCE, f"the two ways compute different losses: {exact}"
    runs: dict[str, list[dict]] = {"ours": [], "plain": []}
    for _ in range(args.repetitions):
        for way, found in runs.items():
            found.append(start(way, args.steps))
            print(f"{way}: {statistics.median(found[-1]['seconds'][1:]):.2f} s a step, {found[-1]['memory']:.0f} MB", file=sys.stderr)
    seconds = {way: statistics.median(s for run in found for s in run["seconds"][1:]) for way, found in runs.items()}
    peak = {way: statistics.median(run["memory"] for run in found) for way, found in runs.items()}
    result = {
        "name": "train_step", "ratio": round(seconds["ours"] / seconds["plain"], 3), "memory_ratio": round(peak["ours"] / peak["plain"], 3),
        "seconds": seconds, "memory_mb": peak, "losses": exact, "loss_difference": difference,
        "float32_losses": {way: found[0]["losses"] for way, found in runs.items()}, "threads": runs["ours"][0]["threads"],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
