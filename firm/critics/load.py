"""From a configuration to the judge that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from firm.chat.journal import OpenChat, forgetful
from firm.chat.messages import Chat
from firm.config import CriticConfig, EndpointChat, PythonChat
from firm.critics.answers import AnswerStyle
from firm.critics.judge import ChatJudge, Judge
from firm.locate import model_path
from firm.records import UserError

if TYPE_CHECKING:
    import torch


def trained_critic(inputs: Mapping[str, Path]) -> Path | None:
    """Folder of the model that the sft stage has trained, among a stage's inputs."""
    return inputs["critic"] / "critic" if "critic" in inputs else None


def load_critic(
    folder: Path | None, config: CriticConfig, device: torch.device, open_chat: OpenChat = forgetful
) -> Judge:
    """The critic of a run: the trained model in ``folder``, or what the configuration names.

    ``open_chat`` opens a served one, in the role "critic".

    Raises:
        UserError: It should have been trained, and was not.
    """
    if config.kind != "endpoint":
        from firm.critics.local import LocalCritic

        if config.kind == "existing":
            return LocalCritic(Path(model_path(config.model, "critic.model")), config, device)
        if folder is None:
            fix = "give the artifact of the stage sft, or set critic.kind to existing"
            raise UserError("the critic is to be trained first", "critic.kind: trained", fix, usage=True)
        return LocalCritic(folder, config, device)
    assert config.endpoint is not None, "validated by CriticConfig"
    endpoint = config.endpoint
    if config.num_samples > 1:
        endpoint = endpoint.model_copy(update={"temperature": config.temperature})
    return open_judge(
        endpoint,
        config.rubrics,
        chat=open_chat("critic", endpoint),
        answer_style=config.answer_style,
        num_samples=config.num_samples,
    )


def open_judge(
    config: PythonChat | EndpointChat,
    rubrics: Mapping[str, str],
    *,
    chat: Chat | None = None,
    attempts: int = 3,
    answer_style: AnswerStyle = "reason_first",
    num_samples: int = 1,
) -> ChatJudge:
    """The judge that a configuration names, with an endpoint's own limits.

    Args:
        config: The configured chat.
        rubrics: Name of the template for each dimension.
        chat: The chat to ask instead of a new connection, such as a journal around one.
        attempts: Tries for an answer that does not parse.
        answer_style: How the judge answers.
        num_samples: Answers to each question that make one judgement, at an endpoint.
    """
    chat = forgetful("", config) if chat is None else chat  # an empty journal is false
    if isinstance(config, PythonChat):
        return ChatJudge(chat, rubrics, attempts=attempts, answer_style=answer_style)
    return ChatJudge(
        chat,
        rubrics,
        attempts=attempts,
        concurrency=config.concurrency,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        answer_style=answer_style,
        num_samples=num_samples,
    )
