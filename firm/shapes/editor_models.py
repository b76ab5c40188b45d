"""A tiny Qwen-Image-Edit-2509 for 32 x 32 pictures: about 2.2 M parameters of the classes of the large one.

It is saved with `save_pretrained` and loaded by the ordinary loader, so the code that runs on it is the code that runs
on the large checkpoint. The pipeline's own `__call__` resizes sources to the areas of the large model, which are not
saved: set `VAE_IMAGE_SIZE` and `CONDITION_IMAGE_SIZE` of its module to 32 * 32, and give it `height=32, width=32`.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from firm.shapes.models import SPECIAL, written_merges
from firm.shapes.scene import COLOURS, SHAPES, SIZE

_PATCH = 8  # pixels; 2 x 2 patches become one of 4 image tokens a picture
_LATENTS = 8  # channels
# What the pipeline writes around an instruction: the first line is cut off again, by its length in the large model.
_TEMPLATE = """system
Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the \
user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements \
while maintaining consistency with the original input where appropriate.
user
Picture 1: 
assistant
"""
_WORDS = """
    a an the it its and then with by to into from in on of at than object objects shape background picture everything
    make turn change recolor recolour colour color paint replace remove delete erase add put place draw insert move
    shift resize enlarge shrink swap exchange switch positions position places colours colors shapes sizes
    left right up down top middle bottom center corner side above below between bigger smaller larger little much half
    twice one other both another all new for keep nothing else
"""


def build_editor(seed: int) -> QwenImageEditPlusPipeline:
    """Returns an untrained editor of 32 x 32 pictures; its latents have 16 tokens of 32 channels."""
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=12, z_dim=_LATENTS, dim_mult=[1, 2, 3], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[False, True], latents_mean=[0.0] * _LATENTS, latents_std=[1.0] * _LATENTS,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=4 * _LATENTS, out_channels=_LATENTS, num_layers=4, attention_head_dim=32,
        num_attention_heads=3, joint_attention_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    tokenizer = _tokenizer()
    pixels = dict(patch_size=_PATCH, merge_size=2, temporal_patch_size=2)
    # `size` holds areas: without it the processor would enlarge our pictures to its own minimum area.
    area = {"shortest_edge": (2 * _PATCH) ** 2, "longest_edge": SIZE**2}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=area, **pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=area, **pixels),
    )
    return QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer, processor=processor, transformer=transformer,
    )  # fmt: skip


def load_editor(folder: Path | str) -> QwenImageEditPlusPipeline:
    """Loads a saved editor as any Qwen-Image-Edit-2509; computes in float32, however it is stored."""
    return QwenImageEditPlusPipeline.from_pretrained(folder, dtype=torch.float32)


def _tokenizer() -> Qwen2Tokenizer:
    """Byte pairs that make every word of the template and of instructions one token, with the space before it."""
    texts = [_TEMPLATE, *(f"{word} {word}" for word in (*_WORDS.split(), *COLOURS, *SHAPES)), ",", ".", " "]
    split = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = sorted({word for text in texts for word, _ in split(text)})
    merges = written_merges(list(word) for word in words)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*SPECIAL, *tokens])},
        merges=merges,
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=1024,
    )


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
            bos_token_id=None, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=_PATCH, spatial_merge_size=2,
            temporal_patch_size=2, window_size=32, out_hidden_size=64, fullatt_block_indexes=[1],
        ),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)
