"""Stable Diffusion 1.5 with random weights: its layers and proportions, all widths divided by a number."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tiny import tiny_tokenizer

TOKENS = 77


def sd15_pipeline(divisor: int = 1, seed: int = 0) -> StableDiffusionPipeline:
    """The published configuration, widths over `divisor` (1 or 4), and a vocabulary of a hundred pieces. Global random state is kept."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = TOKENS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=tuple(c // divisor for c in (320, 640, 1280, 1280)),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=768 // divisor,
            attention_head_dim=8,  # diffusers' name for the number of heads
            norm_num_groups=32 // divisor,
        )
        vae = AutoencoderKL(
            sample_size=512,
            block_out_channels=tuple(c // divisor for c in (128, 256, 512, 512)),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=32 // divisor,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768 // divisor,
                intermediate_size=3072 // divisor,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
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
