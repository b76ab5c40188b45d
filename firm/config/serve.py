"""What a server takes from its callers."""

from __future__ import annotations

from pydantic import PositiveInt

from firm.config.section import Positive, Section


class ServerLimits(Section):
    """Limits of a chat server, whatever answers. Where something is full, the callers who take most of it give way."""

    max_connections: PositiveInt = 512
    max_client_connections: PositiveInt = 128  # from one address
    max_waiting: PositiveInt = 512  # requests without an answer, besides those at work
    max_body_bytes: PositiveInt = 20 * 2**20
    max_held_bytes: PositiveInt = 256 * 2**20  # bodies of all requests without an answer
    stall_s: Positive = 60.0  # a connection without progress is dropped after one to two of these


class QuestionLimits(Section):
    """Limits of a question to a critic."""

    max_question_tokens: PositiveInt = 8192  # of text and images; fewer where the model's tokenizer says so
    max_question_pixels: PositiveInt = 2**22  # of all its images: 2048x2048
    max_question_images: PositiveInt = 8

    @property
    def max_chars(self) -> int:
        """Of its text, looked at before there are tokens: more than so many tokens can hold in any language."""
        return 8 * self.max_question_tokens
