"""The tiny models: built, saved, and loaded by the ordinary loaders."""

from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from shared import CPU
from transformers import AutoModelForImageTextToText, AutoProcessor

from firm.config import CriticConfig
from firm.critics.judge import JudgeInput, soft_scores
from firm.critics.local import LocalCritic
from firm.critics.pen import Manner
from firm.images import encode_image
from firm.records import Prompt
from firm.shapes import generation, models, pretrain, vision

IMAGE = generation.candidate(0, 0, "train")[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other longer than such small models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(models.WEIGHTS / "critic")


@pytest.fixture(scope="module")
def critic() -> Any:
    return AutoModelForImageTextToText.from_pretrained(models.WEIGHTS / "critic")


def chat(processor: Any, *texts: str, **options: Any) -> Any:
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}, **options
    )


def test_build_critic_makes_the_shipped_folder_but_the_weights(tmp_path: Path) -> None:
    models.build_critic(tmp_path)
    shipped = models.WEIGHTS / "critic"
    learnt = {p.name for p in shipped.iterdir()} - {p.name for p in tmp_path.iterdir()}
    assert learnt == {"model.safetensors", "generation_config.json"}
    for path in tmp_path.iterdir():
        assert path.read_text() == (shipped / path.name).read_text(), path.name


def test_the_critic_is_tiny(critic: Any) -> None:
    assert type(critic).__name__ == "Qwen3VLForConditionalGeneration"
    assert critic.dtype == torch.float32
    assert sum(p.numel() for p in critic.parameters()) < 1.2e6


def test_the_shipped_critic_describes_pictures_and_scores_nothing() -> None:
    """As the model that a real critic starts from; SFT is what teaches it to score."""
    folder = models.WEIGHTS / "critic"
    rubrics = {"instruction_following": "short_instruction_following", "quality": "short_quality"}
    config = CriticConfig(model=str(folder), answer_style="score_first", rubrics=rubrics, dtype="float32")
    critic = LocalCritic(folder, config, CPU)
    pairs = list(generation.candidates(64, 5, "test"))
    pngs = [[encode_image(image)] for _, image in pairs]
    asked = critic.encoder.questions(["picture <image>"] * len(pairs), pngs)
    replies = critic.write(asked, [Manner(limit=40)] * len(pairs))
    expected = [vision.caption(vision.observe(image)).split() for _, image in pairs]
    words = [
        said == wanted
        for reply, caption in zip(replies, expected, strict=True)
        for said, wanted in zip_longest(reply.text.split(), caption)
    ]
    assert sum(words) / len(words) > 0.85
    judged = critic.judge([JudgeInput(Prompt(text=p), png) for (p, _), png in zip(pairs, pngs, strict=True)])
    assert all(2.9 < score < 3.1 for d in rubrics for score in soft_scores(judged, d))


def test_a_picture_becomes_sixteen_tokens_and_left_padding_does_not_matter(critic: Any, processor: Any) -> None:
    inputs = chat(processor, "a red circle", "a red circle left of a blue square", add_generation_prompt=True)
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 16]
    assert inputs["attention_mask"][0, 0] == 0
    alone = chat(processor, "a red circle", add_generation_prompt=True)
    with torch.no_grad():
        together = critic(**inputs).logits[0, -1]
        single = critic(**alone).logits[0, -1]
    torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-4)


def test_the_picture_reaches_the_answer(critic: Any, processor: Any) -> None:
    inputs = chat(processor, "a red circle", add_generation_prompt=True)
    with torch.no_grad():
        seen = critic(**inputs).logits[0, -1]
        inputs["pixel_values"] = -inputs["pixel_values"]
        assert not torch.allclose(seen, critic(**inputs).logits[0, -1])


def test_the_critic_generates(critic: Any, processor: Any) -> None:
    inputs = chat(processor, "a red circle", "a blue square and a red circle", add_generation_prompt=True)
    answer = critic.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape == (2, inputs["input_ids"].shape[1] + 3)


def test_a_critic_saved_and_loaded_is_the_same(critic: Any, tmp_path: Path) -> None:
    critic.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), again.parameters(), strict=True))


def test_the_tokenizer_knows_every_word_of_the_world(processor: Any) -> None:
    tokenizer = processor.tokenizer
    texts = [*generation.prompts("train"), *generation.prompts("test"), " ".join(vision.VOCABULARY)]
    texts.append(
        "Score: 5\nJudge instruction following, judge aesthetics, technical quality, structure. Yes/no? \\boxed{3}"
    )
    unknown = {token for text in texts[:-1] for token in tokenizer.tokenize(text)} & {"<unk>"}
    assert not unknown
    assert tokenizer.tokenize("Score: 4\nred clear circle top left ; nothing") == (
        "score : 4 red clear circle top left ; nothing".split()
    )
    ids = tokenizer("Score: 4\nred clear circle top left ; blue blob").input_ids
    assert tokenizer.decode(ids) == "score : 4 red clear circle top left ; blue blob"


def test_the_template_has_the_structure_of_qwen3_vl(processor: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "a red circle"}]
    answered = [{"role": "user", "content": content}, {"role": "assistant", "content": "Score: 5"}]
    text = processor.apply_chat_template(answered)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a red circle<|im_end|>\n"
        "<|im_start|>assistant\nScore: 5<|im_end|>\n"
    )
    asked = processor.apply_chat_template(answered[:1], add_generation_prompt=True)
    assert text.startswith(asked)


def test_an_untrained_generator_survives_the_disk(tmp_path: Path) -> None:
    pipe = models.build_generator(seed=3)
    pretrain.save(pipe, tmp_path)
    again = models.load_generator(tmp_path)
    assert isinstance(again, StableDiffusion3Pipeline)
    assert again.text_encoder_3 is again.tokenizer_3 is None
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 4e6
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        for a, b in zip(getattr(pipe, name).parameters(), getattr(again, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_every_prompt_fits_into_the_text_encoders_word_by_word() -> None:
    tokenizer = models.load_generator(models.WEIGHTS / "base").tokenizer
    assert (
        tokenizer.get_vocab() == models.build_generator(seed=0).tokenizer.get_vocab()
    )  # ids are the same in every run
    for prompt in generation.prompts("train") + generation.prompts("test"):
        tokens = tokenizer.tokenize(prompt)
        assert tokens == [f"{word}</w>" for word in prompt.split()]
        assert len(tokens) + 2 <= tokenizer.model_max_length


@pytest.mark.parametrize(("name", "least", "most"), [("base", 2.6, 3.4), ("strong", 3.3, 4.3)])
def test_the_shipped_generators_draw_as_well_as_said(name: str, least: float, most: float) -> None:
    mean, _ = pretrain.teacher_score(models.load_generator(models.WEIGHTS / name), rounds=2)
    assert least < mean < most


def test_one_step_of_flow_matching_lowers_the_loss() -> None:
    pipe = models.build_generator(seed=0)
    texts, images = pretrain.clean_renders(32, seed=0)
    latents = pretrain.encode(pipe.vae, images)
    parameters = list(pipe.transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(6):
        predict = partial(pretrain.predict, pipe, texts)
        loss = pretrain.flow_matching_loss(predict, latents, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
