"""Tiny models of the real classes: a Qwen3-VL critic and a Stable Diffusion 3 generator for 32 x 32 pictures.

They are saved with `save_pretrained` and loaded by the ordinary loaders, so the code that runs on them is the code
that runs on the large checkpoints.
"""

from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from firm.shapes.generation import prompts
from firm.shapes.scene import COLOURS, SHAPES, SIZE
from firm.shapes.vision import VOCABULARY

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped folders: `critic`, `base`, `strong` and `editor`."""

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
"""Tokens of the chats of Qwen's vision-language models."""
# The words of prompts, captions and short rubrics, and of image editing.
_WORDS = """
    a an and of object objects shape background score scores judge rate image images picture prompt the is this
    follows follow instruction following quality aesthetics technical structure texture yes no system user assistant
    execution consistency before after edited source edit make move remove add replace change to with into same new now
    gone on from at then swap bigger smaller larger turn every other both all everything background size place half
    done not missing wrong extra kept moved recolored reshaped resized replaced removed added swapped redrawn untouched
    changed unchanged noise stain blur tint little some much 1 2 3 4 5 : ; , . ? ! - / ( ) [ ] { } < > " = _
"""
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_PATCH = 8  # pixels; 16 image tokens a picture


def build_critic(folder: Path | str) -> None:
    """Writes config and processor of the critic (about 1.2 M parameters), without weights."""
    tokenizer = critic_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
            initializer_range=0.02, bos_token_id=None, eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"), tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5], mrope_interleaved=True),
        ),
        vision_config=dict(
            depth=3, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=128, patch_size=_PATCH,
            spatial_merge_size=1, temporal_patch_size=1, num_position_embeddings=(SIZE // _PATCH) ** 2,
            deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True, architectures=["Qwen3VLForConditionalGeneration"], dtype="float32",
    )  # fmt: skip
    pixels = dict(patch_size=_PATCH, merge_size=1, temporal_patch_size=1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    # `size` holds areas: without it the processor would enlarge our pictures to its own minimum area.
    area = {"shortest_edge": (2 * _PATCH) ** 2, "longest_edge": (8 * _PATCH) ** 2}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=area, **pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=area, **pixels),
        chat_template=_CHAT_TEMPLATE,
    )
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def critic_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of lower-case words: one token per word, digit or punctuation mark, white space dropped."""
    words = dict.fromkeys([*SPECIAL, "<unk>", *COLOURS, *SHAPES, *VOCABULARY, *_WORDS.split()])
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]"), "removed", invert=True)
    backend.add_special_tokens([*SPECIAL, "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(SPECIAL),
    )


def build_generator(seed: int) -> StableDiffusion3Pipeline:
    """Returns an untrained generator of 32 x 32 pictures (about 1.7 M parameters) without the T5 encoder.

    Call it with `max_sequence_length=1`: the pipeline stands in for T5 with that many zero tokens.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4, patch_size=2, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=24,
        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=96, pooled_projection_dim=96,
        pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip
    tokenizer = _clip_tokenizer()
    encoders = [_text_encoder(tokenizer) for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=encoders[0],
        tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def load_generator(folder: Path | str) -> StableDiffusion3Pipeline:
    """Loads a saved generator as any Stable Diffusion 3 without T5; computes in float32, however it is stored."""
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)


def _clip_tokenizer() -> CLIPTokenizer:
    words = sorted({word for split in ("train", "test") for prompt in prompts(split) for word in prompt.split()})
    merges = written_merges([*word[:-1], f"{word[-1]}</w>"] for word in words)
    tokens = ["<|startoftext|>", "<|endoftext|>", *ascii_lowercase, *(f"{c}</w>" for c in ascii_lowercase)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # Two objects and a relation are 8 words.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=12)


def written_merges(words: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Returns merges of byte pairs that make one token of each word, given as its pieces.

    They are written, not learned: the trainer of byte pairs breaks ties at random, so ids would differ by run.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = word
        for pair in merges:
            parts = _merge(parts, pair)
        while len(parts) > 1:  # a merge of lower rank than all before does not change the words before
            merges.append((parts[0], parts[1]))
            parts = _merge(parts, merges[-1])
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, projection_dim=48, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = CLIPTextModelWithProjection(config)
    # The pipeline reads the penultimate layer; at the default scale of 0.02 all words would look alike there.
    torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.5)
    return encoder
