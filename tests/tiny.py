"""A Stable Diffusion pipeline of a few thousand random weights, made in code, and the same weights as an original-format file."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from limner.models.lora import adapter_state, load_adapter_state

LENGTH = 16  # tokens a text
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair scheme with letters, digits, a few merges and the two special tokens last, as in the published vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
    merges = [("a", "n"), ("an", "d</w>"), ("r", "e"), ("re", "d</w>"), ("m", "an</w>"), ("a", "n</w>")]
    pieces = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), BOS, EOS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS, model_max_length=LENGTH)


def tiny_pipeline(seed: int = 0, prediction: str = "epsilon", widths: tuple[int, ...] = (8, 16)) -> StableDiffusionPipeline:
    """Latents (4, 8, 8), images (3, 16, 16), text (16, 16). The same seed gives the same weights; global random state is kept."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        for module in (unet, vae, text):
            randomise(module)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def randomise(module: nn.Module) -> None:
    """Move the parameters that start at 0 or 1 (biases, norms), so that a wrongly mapped one is noticed."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)


def save_tiny(folder: Path, seed: int = 0, prediction: str = "epsilon") -> StableDiffusionPipeline:
    """Write the pipeline as a diffusers folder."""
    pipe = tiny_pipeline(seed, prediction)
    pipe.save_pretrained(folder)
    return pipe


def to_single_file(pipe: StableDiffusionPipeline, path: Path) -> None:
    """Write a pipeline's weights under the names of the original (LDM) code, as published .safetensors checkpoints have them."""
    save_file(original_weights(pipe), path)


def original_weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights by original name."""
    weights = {f"model.diffusion_model.{_unet_name(k, pipe.unet)}": v for k, v in pipe.unet.state_dict().items()}
    for key, value in pipe.vae.state_dict().items():
        name = _vae_name(key, len(pipe.vae.config.block_out_channels))
        is_convolution = ".attn_1." in name and value.ndim == 2  # the original attends by 1x1 convolutions
        weights[f"first_stage_model.{name}"] = value[:, :, None, None] if is_convolution else value
    for key, value in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    # what published files hold besides
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    weights["alphas_cumprod"] = pipe.scheduler.alphas_cumprod
    weights["model_ema.decay"] = torch.tensor(0.9999)
    return {k: v.contiguous() for k, v in weights.items()}


def _unet_name(key: str, unet: UNet2DConditionModel) -> str:
    step = unet.config.layers_per_block + 1
    match key.split("."):
        case ["time_embedding", layer, kind]:
            return f"time_embed.{0 if layer == 'linear_1' else 2}.{kind}"
        case ["conv_in", kind]:
            return f"input_blocks.0.0.{kind}"
        case ["conv_norm_out", kind]:
            return f"out.0.{kind}"
        case ["conv_out", kind]:
            return f"out.2.{kind}"
        case ["mid_block", "resnets", i, *rest]:
            return f"middle_block.{2 * int(i)}.{_resnet(rest)}"
        case ["mid_block", "attentions", _, *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
        case ["down_blocks", i, "downsamplers", _, "conv", kind]:
            return f"input_blocks.{step * (int(i) + 1)}.0.op.{kind}"
        case ["down_blocks", i, part, j, *rest]:
            at = f"input_blocks.{step * int(i) + int(j) + 1}"
            return f"{at}.0.{_resnet(rest)}" if part == "resnets" else f"{at}.1.{'.'.join(rest)}"
        case ["up_blocks", i, "upsamplers", _, "conv", kind]:
            place = 2 if hasattr(unet.up_blocks[int(i)], "attentions") else 1
            return f"output_blocks.{step * int(i) + step - 1}.{place}.conv.{kind}"
        case ["up_blocks", i, part, j, *rest]:
            at = f"output_blocks.{step * int(i) + int(j)}"
            return f"{at}.0.{_resnet(rest)}" if part == "resnets" else f"{at}.1.{'.'.join(rest)}"
    raise AssertionError(f"no original name for {key}")


def _resnet(parts: list[str]) -> str:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return f"{names[parts[0]]}.{parts[1]}"


def _vae_name(key: str, blocks: int) -> str:
    match key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out").split("."):
        case [side, "mid_block", "resnets", i, *rest]:
            return f"{side}.mid.block_{int(i) + 1}.{'.'.join(rest)}"
        case [side, "mid_block", "attentions", _, *rest]:
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            return f"{side}.mid.attn_1.{names[rest[0]]}.{rest[-1]}"
        case [side, "down_blocks", i, "resnets", j, *rest]:
            return f"{side}.down.{i}.block.{j}.{'.'.join(rest)}"
        case [side, "down_blocks", i, "downsamplers", _, *rest]:
            return f"{side}.down.{i}.downsample.{'.'.join(rest)}"
        case [side, "up_blocks", i, "resnets", j, *rest]:
            return f"{side}.up.{blocks - 1 - int(i)}.block.{j}.{'.'.join(rest)}"
        case [side, "up_blocks", i, "upsamplers", _, *rest]:
            return f"{side}.up.{blocks - 1 - int(i)}.upsample.{'.'.join(rest)}"
        case parts:
            return ".".join(parts)


def predict(unet: nn.Module) -> Tensor:
    """What the UNet of `tiny_pipeline` says of two noisy latents, always the same ones."""
    g = torch.Generator().manual_seed(5)
    noisy, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 16, 16, generator=g)
    return unet(noisy, torch.tensor([10, 900]), text, return_dict=False)[0]


def stir(unet: nn.Module, name: str) -> None:
    """An adapter's B away from zero, as after training."""
    g = torch.Generator().manual_seed(1)
    load_adapter_state(unet, name, {k: torch.randn(v.shape, generator=g) / 2 for k, v in adapter_state(unet, name).items()})
