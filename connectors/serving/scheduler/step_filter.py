"""Which steps of the engine are nobody's affair here, known without looking at their requests. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping


class StepFilter:
    """Tokens that requests may be scheduled for before somebody has to look at them again.

    A step of decoding takes milliseconds, and nearly all of them complete no chunk. What is expected errs on the early
    side only: tokens that are scheduled and then rejected, or computed once more, count as well.
    """

    def __init__(self) -> None:
        self._left: dict[str, int] = {}

    def expect(self, request_id: str, tokens: int) -> None:
        """Nothing is due before the step that brings it to `tokens` tokens from here."""
        self._left[request_id] = tokens

    def forget(self, request_id: str) -> None:
        """Nothing will be due."""
        self._left.pop(request_id, None)

    def passes(self, new_tokens: Mapping[str, int]) -> bool:
        """Whether nothing is due in a step of so many tokens of each request. To be asked once for every step; whoever
        hears that something is looks at all requests, and says what to expect of those that it knows more about.
        """
        left, is_quiet = self._left, True
        for request_id, count in new_tokens.items():
            if request_id in left:
                left[request_id] -= count
                is_quiet = is_quiet and left[request_id] > 0
        return is_quiet
