"""Which steps of the engine need no planning, known without looking at their requests. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping


class StepFilter:
    """Counts down, for each request, the tokens until it has to be looked at again.

    A step of decoding takes milliseconds, and nearly all of them complete no chunk. An estimate may be too early, never
    too late: tokens that are scheduled and then rejected, or computed once more, count as well.
    """

    def __init__(self) -> None:
        self._left: dict[str, int] = {}

    def expect(self, request_id: str, tokens: int) -> None:
        """Look at the request again in the step that computes its `tokens`-th token from here."""
        self._left[request_id] = tokens

    def forget(self, request_id: str) -> None:
        """Never look at the request again."""
        self._left.pop(request_id, None)

    def passes(self, new_tokens: Mapping[str, int]) -> bool:
        """Whether a step that computes so many tokens of each request needs no planning. Call it once for every step.

        If it does need planning, the caller looks at all requests of the step, and says what to expect of each.
        """
        left, is_quiet = self._left, True
        for request_id, count in new_tokens.items():
            if request_id in left:
                left[request_id] -= count
                is_quiet = is_quiet and left[request_id] > 0
        return is_quiet
