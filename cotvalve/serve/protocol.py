"""OpenAI's chat protocol: a body to an `Ask`, a failure to its error object, completions to a response.

What is not supported is refused by name instead of ignored, unless it was sent with its neutral value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cotvalve.errors import SettingError, unknown
from cotvalve.prompts import END_THINK, THINK
from cotvalve.settings import Finite
from cotvalve.types import Completion, Interval

if TYPE_CHECKING:
    from cotvalve.calibration import Calibration
    from cotvalve.serve import ServeSettings
    from cotvalve.valve import Valve

Json = dict[str, Any]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stop": (None, [], ""), "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "function_call": (None, "none", "auto"), "logprobs": (None, False), "top_logprobs": (None, 0), "logit_bias": (None, {}),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "reasoning_effort": (None,), "prediction": (None,), "audio": (None,),
}  # fmt: skip
"""OpenAI's fields that would change the answer, and the values with which they do not."""
_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
"""Fields that change nothing about the answer."""

_NUMBERS = ("alpha", "tokens", "shorter", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n")


class Refused(Exception):
    """A request that gets an error object instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> Json:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Part(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    tool_calls: list[Any] | None = None
    function_call: Any = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Ask(BaseModel):
    """A request for a chat completion."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: Finite | None = Field(None, ge=0, le=2)
    top_p: Finite | None = Field(None, gt=0, le=1)
    seed: int | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    alpha: Finite | None = None
    tokens: Finite | None = Field(None, gt=0)
    shorter: Finite | None = Field(None, lt=1)


def parse(body: bytes) -> Ask:
    """The request in `body`; Refused (400) with one line about the first thing that is wrong."""
    try:
        given = json.loads(body)
        # Half a surrogate pair is JSON but no text: neither a tokenizer nor an answer can hold it.
        json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON in UTF-8") from None
    if not isinstance(given, dict):
        raise Refused(400, f"the body is {type(given).__name__}, expected an object with 'messages'")
    for field in _NUMBERS:  # to Python true is 1, and alpha 1 would be the whole way
        if isinstance(given.get(field), bool):
            raise Refused(400, f"{field}: {json.dumps(given[field])} is no number", param=field)
    try:
        ask = Ask.model_validate(given)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False, include_input=False)
        if (at := first["loc"])[-1] == "str":  # a content that is a list was read as a text first; what its part lacks comes after
            first = next((other for other in others if len(other["loc"]) > len(at) and other["loc"][: len(at) - 1] == at[:-1]), first)
        # A union's branch names ('str', 'list[Part]') would mean nothing to the sender.
        where = ".".join(str(part) for part in first["loc"] if str(part) not in ("str", "list[Part]"))
        raise Refused(400, f"{where}: {first['msg']}", param=where) from None
    for field, value in (ask.model_extra or {}).items():
        if field in _NEUTRAL:
            if value not in _NEUTRAL[field]:
                hint = "; ask with alpha, tokens or shorter" if field == "reasoning_effort" else ""
                raise Refused(400, f"'{field}' is not supported here{hint}", param=field, code="unsupported_parameter")
        elif field not in _IGNORED:
            raise Refused(400, unknown("field", field, Ask.model_fields), param=field, code="unknown_parameter")
    for i, message in enumerate(ask.messages):
        if message.tool_calls or message.function_call:
            where = f"messages.{i}.{'tool_calls' if message.tool_calls else 'function_call'}"
            raise Refused(400, f"'{where}' is not supported here", param=where, code="unsupported_parameter")
    if ask.messages[-1].role == "assistant":
        raise Refused(
            400, "the last message is the assistant's; expected one that asks for an answer", param="messages"
        )
    if ask.max_tokens and ask.max_completion_tokens and ask.max_tokens != ask.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return ask


@dataclass(frozen=True, slots=True)
class Dial:
    """The positions a server has, and how a request names one."""

    name: str
    default: float
    low: float
    high: float
    calibration: Calibration | None
    streams: bool = True

    @classmethod
    def of(cls, valve: Valve, settings: ServeSettings, streams: bool) -> Dial:
        """The dial of a loaded valve; SettingError when the default position is not on it."""
        own = str(settings.model).rstrip("/")
        name = settings.name or (
            own if own.count("/") == 1 and not own.startswith((".", "/", "~")) else own.rpartition("/")[2]
        )
        known = valve.calibration
        if valve.direction is None:
            low = high = 0.0
        else:
            low = settings.lowest if settings.lowest is not None else known.span.low if known else -1.0
            high = settings.highest if settings.highest is not None else known.span.high if known else 2.0
        if not low <= settings.alpha <= high:
            raise SettingError(
                f"alpha {settings.alpha:g} is not between {low:g} and {high:g}, which this server serves"
            )
        return cls(name.replace("@", "-"), settings.alpha, low, high, known, streams)

    def position(self, ask: Ask) -> float:
        """The alpha a request asks for; Refused for a name or a position there is not."""
        alpha = ask.alpha
        if ask.model is not None and ask.model != self.name:
            name, at, text = ask.model.rpartition("@")
            if not at or name != self.name:
                raise Refused(404, f"model '{ask.model}' is not served; expected '{self.name}' or '{self.name}@ALPHA'", param="model", code="model_not_found")  # fmt: skip
            if alpha is not None or ask.tokens is not None or ask.shorter is not None:
                raise Refused(
                    400, f"model '{ask.model}' says alpha already; leave out alpha, tokens and shorter", param="model"
                )
            try:
                alpha = float(text)
            except ValueError:
                raise Refused(
                    404, f"model '{ask.model}': '{text}' is not a number", param="model", code="model_not_found"
                ) from None
        asked = [field for field in ("alpha", "tokens", "shorter") if getattr(ask, field) is not None]
        if len(asked) > 1:
            raise Refused(400, f"give one of alpha, tokens and shorter (given: {', '.join(asked)})", param=asked[1])
        if ask.tokens is not None or ask.shorter is not None:
            if self.calibration is None:
                raise Refused(
                    400,
                    f"'{asked[0]}' needs a calibrated direction; run `cotvalve calibrate`, or send alpha",
                    param=asked[0],
                )
            try:
                alpha = self._served(self.calibration.alpha(tokens=ask.tokens, shorter=ask.shorter), ask)
            except SettingError as error:
                raise Refused(400, str(error), param=asked[0], code="out_of_range") from None
        if alpha is None:
            return self.default
        if not self.low <= alpha <= self.high:
            raise Refused(400, f"alpha {alpha:g} is out of range: this server serves {self.low:g} to {self.high:g}", param="alpha", code="out_of_range")  # fmt: skip
        return alpha

    def _served(self, alpha: float, ask: Ask) -> float:
        """The position of a length; SettingError with the lengths there are for one that only the rest of the curve has."""
        known, end = self.calibration, min(max(alpha, self.low), self.high)
        assert known is not None
        # As in Calibration.alpha: an end that was shown rounded is still that end.
        slack = 0.5 if ask.tokens is not None else 0.0005 * known.tokens(0.0)
        if known.span.low <= end <= known.span.high and abs(known.tokens(end) - known.tokens(alpha)) <= slack:
            return end
        start, reach = known.tokens(0.0), self.reach
        asked = f"tokens={ask.tokens:g}" if ask.tokens is not None else f"shorter={ask.shorter:g}"
        raise SettingError(
            f"{asked} is out of reach: this server serves {reach.low:.0f} to {reach.high:.0f} tokens "
            f"(shorter {1 - reach.high / start:.3f} to {1 - reach.low / start:.3f}), alpha {self.low:g} to {self.high:g}"
        )

    @property
    def reach(self) -> Interval:
        """The mean tokens of what is served: the curve's, where --lowest and --highest leave it."""
        known = self.calibration
        assert known is not None
        ends = [known.tokens(end) for end in self._measured()]
        return Interval(min(ends), max(ends))

    def _measured(self) -> list[float]:
        """The ends of what is served, where the curve goes so far."""
        known = self.calibration
        assert known is not None
        return [min(max(end, known.span.low), known.span.high) for end in (self.low, self.high)]

    def told(self, alpha: float) -> Json:
        """What a response says of its position."""
        known = self.calibration
        if known is None:
            return {"alpha": alpha}
        measured = known.span.low <= alpha <= known.span.high
        return {
            "alpha": alpha,
            "expected_tokens": round(known.tokens(alpha), 1) if measured else None,
            "safe": known.is_safe(alpha),
        }

    def card(self) -> Json:
        """What /v1/models says of the dial."""
        known = self.calibration
        told: Json = {
            "alpha": {"low": self.low, "high": self.high, "default": self.default},
            "streams": self.streams,
            "calibration": None,
        }
        if known is not None:
            start, reach = known.tokens(0.0), self.reach
            told["calibration"] = {
                "tokens": {"low": reach.low, "high": reach.high, "at_0": start},
                "shorter": {"low": 1 - reach.high / start, "high": 1 - reach.low / start},
                "safe": {"low": known.safe.low, "high": known.safe.high, "points": known.tolerance},
                "error": known.error.questions,
                "measured_on": known.chosen_on,
                "curve": [
                    {"alpha": p.alpha, "tokens": p.fitted, "measured": p.tokens, "accuracy": p.accuracy}
                    for p in known.positions
                ],
            }
        return told

    def sentence(self) -> str:
        """The dial in one line, for whoever starts the server."""
        if self.low == self.high == 0:
            return "no direction: the plain model at alpha 0"
        if self.calibration is None:
            return f"alpha {self.low:g} to {self.high:g}; not calibrated, so requests cannot say tokens or shorter"
        safe, (start, end) = self.calibration.safe, self._measured()
        where = "" if (start, end) == (self.low, self.high) else f" (measured from {start:g} to {end:g})"
        asked = self.calibration.facts.get("prompt", "plain")
        apart = "" if asked == "plain" else f"; with the prompt '{asked}', where the server adds no words: for its own lengths calibrate with --prompt plain"
        return (
            f"alpha {self.low:g} to {self.high:g}{where}, {self.calibration.tokens(start):.0f} to {self.calibration.tokens(end):.0f} tokens, safe from {safe.low:g} to {safe.high:g} "
            f"(measured on {self.calibration.chosen_on}{apart})"
        )


class Split:
    """Tells a chain's thinking from its answer as the text comes; the marks themselves are dropped."""

    def __init__(self, prompt: str) -> None:
        """`prompt`: a chat template may have opened the thinking block already."""
        self._held = ""
        self._thinking = prompt.rstrip().endswith(THINK)
        self._start = not self._thinking
        self._trim = False

    def add(self, text: str, *, last: bool = False) -> Json:
        """The delta (`content`, `reasoning_content`) that `text` makes; `last` gives what was held back."""
        self._held += text
        if self._start:
            if THINK.startswith(self._held) and not last:
                return {}
            self._start = False
            if self._held.startswith(THINK):
                self._thinking, self._held = True, self._held.removeprefix(THINK).removeprefix("\n")
        if not self._thinking:
            return self._answer()
        thought, mark, after = self._held.partition(END_THINK)
        if mark:
            self._thinking, self._trim, self._held = False, True, after
            return {**({"reasoning_content": thought} if thought else {}), **self._answer()}
        keep = 0 if last else max((k for k in range(1, len(END_THINK)) if thought.endswith(END_THINK[:k])), default=0)
        self._held = thought[len(thought) - keep :]
        thought = thought[: len(thought) - keep]
        return {"reasoning_content": thought} if thought else {}

    def _answer(self) -> Json:
        # The blank lines between the thinking block and the answer belong to neither.
        if self._trim:
            self._held = self._held.lstrip("\n")
            self._trim = not self._held
        content, self._held = self._held, ""
        return {"content": content} if content else {}


def usage(completions: list[Completion]) -> Json:
    """Tokens of one request: its prompt once, all its choices."""
    prompt, generated = completions[0].prompt_tokens, sum(c.tokens for c in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in completions)},
    }


def choice(index: int, completion: Completion, prompt: str) -> Json:
    """One finished choice."""
    said = Split(prompt).add(completion.text, last=True)
    message = {
        "role": "assistant",
        "content": said.get("content", ""),
        "reasoning_content": said.get("reasoning_content"),
    }
    return {"index": index, "message": message, "finish_reason": completion.finish, "logprobs": None}
