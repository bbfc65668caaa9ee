"""The server: OpenAI's chat protocol with alpha | tokens | shorter on each request, and a page with the dial.

    cotvalve serve --model BASE --direction D
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
         -d '{"model": "BASE", "alpha": 0.4, "messages": [{"role": "user", "content": "..."}]}'

Requests of different alpha share batches. Left out on purpose: keys, TLS and many users' fairness (put a proxy
in front), tools, log-probabilities, stop strings; what a request asks for and does not get is refused, not ignored.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from cotvalve.errors import EngineError, SettingError
from cotvalve.settings import Count, Finite, ModelSettings, NotNegative, Probability

if TYPE_CHECKING:
    import socket


class ServeSettings(ModelSettings):
    """Settings of `serve`."""

    direction: str = ""
    """The direction with the dial; empty serves the plain model at alpha 0."""
    name: str = ""
    """What requests call the model; by default the model's own name. NAME@0.4 is the model at alpha 0.4."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in (there are no keys)."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    alpha: Finite = 0.0
    """Position of requests that say none."""
    lowest: Finite | None = None
    """Smallest alpha that is served; by default where the calibrated curve begins, else -1."""
    highest: Finite | None = None
    """Largest alpha that is served; by default where the calibrated curve ends, else 2."""
    max_new_tokens: int = 2048
    """Token budget of requests that say none."""
    temperature: NotNegative = 0.0
    """Temperature of requests that say none; 0 is greedy."""
    top_p: Probability = 1.0
    """Nucleus of requests that say none."""
    engine: str = "auto"
    """auto, transformers or generate; generate gives chains whole, not token by token."""
    slots: Count | None = None
    """Chains decoded at once; sized from the memory when not given."""
    context: int = 8192
    """Tokens of a chain with its prompt; memory is laid out for slots times this."""
    queue: int = 256
    """Requests that may wait; one more is answered with 429."""
    most_choices: int = 8
    """Largest n of a request; no more than --queue."""
    most_bytes: int = 1_048_576
    """Largest request body."""

    def model_post_init(self, context: object, /) -> None:  # noqa: ARG002
        if min(self.max_new_tokens, self.context, self.queue, self.most_choices, self.most_bytes) < 1:
            raise ValueError("max_new_tokens, context, queue, most_choices and most_bytes have to be 1 or more")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 0 and 65535")
        if "@" in self.name:
            raise ValueError("the name cannot hold '@': NAME@0.4 means alpha 0.4")


def run(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serves until it is interrupted; `say` is told what is served and where.

    Raises EngineError when FastAPI and uvicorn are not installed, SettingError for an address that is taken.
    """
    try:
        from cotvalve.serve.app import Server, create_app
    except ImportError as error:
        raise EngineError(f"the server needs {error.name}; install it with: pip install 'cotvalve[serve]'") from None
    listening = listen(settings.host, settings.port)
    with listening:
        valve = settings.load_valve(settings.direction or None)
        app = create_app(valve, settings)
        facts = valve.facts()
        say(f"{facts['model']} on {facts['hardware']}, {facts['dtype']}")
        say(app.state.dial.sentence())
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"http://{host}:{listening.getsockname()[1]}")
        Server(app).run(sockets=[listening])


def listen(host: str, port: int) -> "socket.socket":
    """A listening socket, so that a taken port is known before a model is loaded."""
    import socket

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise SettingError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); name another --port or --host"
        ) from None
