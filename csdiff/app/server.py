"""Serving the page: on this machine alone unless asked, and never with anything from elsewhere."""

from __future__ import annotations

import hmac
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from csdiff.app.config import AppConfig
from csdiff.errors import CSDiffError
from csdiff.options import check_options

PASSWORD = "CSDIFF_APP_PASSWORD"
# Read by gradio and huggingface_hub when they are imported.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_MCP_SERVER": "False"}
# Whatever a model card or a library asks for, the browser fetches from here alone.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
SECONDS_AFTER_WRONG_PASSWORD = 1.0


class LocalOnly:
    """ASGI middleware: browsers fetch nothing from elsewhere, and pages from elsewhere do not reach this one.

    A web page whose name is made to point at this machine (DNS rebinding) sends its own name as Host and Origin.

    Args:
        app: What is served.
        hosts: Names under which it is asked for; None takes all, where a password protects it.
    """

    def __init__(self, app, hosts: frozenset[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and (foreign := self._foreign(dict(scope["headers"]))):
            text = f"This page is not served as {foreign}; csdiff app --allow_host {foreign} would do so."
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": text.encode()})
            return

        async def with_policy(message):
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                headers.append((b"content-security-policy", CONTENT_SECURITY_POLICY.encode()))
                headers.append((b"referrer-policy", b"same-origin"))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)

    def _foreign(self, headers: dict[bytes, bytes]) -> str | None:
        """The first name of a request that is not one of ours."""
        if self.hosts is None:
            return None
        origin = headers.get(b"origin", b"").decode("latin-1")
        names = [urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname]
        names += [urlsplit(origin).hostname or "null"] if origin else []
        return next((name or "(no name)" for name in names if name not in self.hosts and not is_loopback(name)), None)


@dataclass
class Server:
    """A page that is being served.

    Attributes:
        url: Where.
    """

    url: str
    _page: object
    _inspector: object
    _folder: Path
    _environment: dict[str, str | None]

    def close(self) -> None:
        """Stops serving and removes the uploads and images."""
        self._page.close(verbose=False)
        self._inspector.close()
        _restore(self._folder, self._environment)


def serve(config: AppConfig) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        CSDiffError: gradio is not installed, an option is wrong, the port is taken, or an address that others reach
            has no password.
    """
    server = start(config)
    try:
        print(f"csdiff app: {server.url}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if config.open_browser:
            import webbrowser

            webbrowser.open(server.url)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\ncsdiff app: ended", file=sys.stderr)
    finally:
        server.close()


def start(config: AppConfig) -> Server:
    """Serves the page in the background; raises as :func:`serve`."""
    password = config.password if config.password is not None else os.environ.get(PASSWORD)
    check_options(config)
    check_access(config, password)
    port = free_port(config.host, config.port)
    folder = Path(tempfile.mkdtemp(prefix="csdiff-app-"))
    environment = {**QUIET, "GRADIO_TEMP_DIR": str(folder)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        page, inspector, theme, css = _build(config, folder)
        page.queue(max_size=config.max_waiting, api_open=False)
        _, url, _ = page.launch(
            server_name=config.host,
            server_port=port,
            auth=(lambda _, given: right_password(given, password)) if password else None,
            auth_message="Any name, and the password of this page." if password else None,
            max_file_size=config.max_upload_mb * 10**6,
            app_kwargs={"middleware": [_middleware(config, password)], "docs_url": None, "redoc_url": None},
            theme=theme,
            css=css,
            footer_links=[],
            run_history=False,
            share=False,
            inline=False,
            inbrowser=False,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            mcp_server=False,
            prevent_thread_lock=True,
        )
    except BaseException:
        _restore(folder, before)
        raise
    return Server(url, page, inspector, folder, before)


def _restore(folder: Path, environment: dict[str, str | None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _build(config: AppConfig, folder: Path):
    try:
        import gradio  # noqa: F401
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise CSDiffError(f'The page needs {error.name}; pip install "csdiff[app]".') from error
    from csdiff.app.inspection import Inspector
    from csdiff.app.models import Models
    from csdiff.app.page import build_page
    from csdiff.app.theme import CSS, theme

    models = Models(config, folder)
    # a bad --adapter or --decoder is said at once, not at the first press of a button
    models.find(None, None)
    inspector = Inspector(str(models.device), models.line)
    threading.Thread(target=models.warm_up, daemon=True).start()
    return build_page(models, inspector), inspector, theme(), CSS


def _middleware(config: AppConfig, password: str | None):
    from starlette.middleware import Middleware

    hosts = None if password else frozenset({config.host, *config.allow_host})
    return Middleware(LocalOnly, hosts=hosts)


def check_access(config: AppConfig, password: str | None) -> None:
    """Refuses an empty password, and an address that others reach without one.

    Raises:
        CSDiffError: naming the option.
    """
    if password is not None and not password:
        raise CSDiffError("password: expected a password, found an empty one.")
    if not is_loopback(config.host) and not password:
        raise CSDiffError(
            f"host: {config.host} can be reached by others, which needs a password; give --password or set the "
            f"environment variable {PASSWORD}, or leave --host out."
        )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def right_password(given: str, password: str) -> bool:
    """Compares in constant time; a wrong one costs a second."""
    if hmac.compare_digest(given.encode(), password.encode()):
        return True
    time.sleep(SECONDS_AFTER_WRONG_PASSWORD)
    return False


def free_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0.

    Raises:
        CSDiffError: it is taken, or this machine does not have the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # as servers do: a port that was closed a moment ago is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise CSDiffError(
                f"Cannot serve on {host}, port {port} ({getattr(error, 'strerror', None) or error}); give another "
                "--port (0 takes a free one) or --host."
            ) from error
        return probe.getsockname()[1]
