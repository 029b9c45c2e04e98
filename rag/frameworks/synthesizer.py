"""What kvloom's response synthesizers of LlamaIndex have in common: texts, and no prompts of LlamaIndex's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.prompts.mixin import PromptDictType
    from llama_index.core.response_synthesizers.base import BaseSynthesizer
except ImportError as error:
    raise ImportError(
        'kvloom.rag.frameworks.synthesizer needs LlamaIndex: pip install "kvloom[llamaindex]"', name=error.name
    ) from error


class TextSynthesizer(BaseSynthesizer):
    """Answers from the texts of nodes; messages count as their texts."""

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        del prompts

    def get_response_from_messages(
        self, query_str: str, message_chunks: Sequence[ChatMessage], **response_kwargs: Any
    ) -> Any:
        return self.get_response(query_str, _texts(message_chunks), **response_kwargs)

    async def aget_response_from_messages(
        self, query_str: str, message_chunks: Sequence[ChatMessage], **response_kwargs: Any
    ) -> Any:
        return await self.aget_response(query_str, _texts(message_chunks), **response_kwargs)


def _texts(messages: Sequence[ChatMessage]) -> list[str]:
    return [message.content or "" for message in messages]
