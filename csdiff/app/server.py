"""Serving the page: on this machine alone unless asked, and never with anything from elsewhere."""

from __future__ import annotations

import hmac
import ipaddress
import os
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
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


def local_only(app, hosts: frozenset[str] | None):
    """ASGI middleware: browsers fetch nothing from elsewhere, and pages from elsewhere do not reach this one.

    A web page whose name is made to point at this machine (DNS rebinding) sends its own name as Host and Origin.

    Args:
        app: What is served.
        hosts: Names under which it is asked for; None takes all, where a password protects it.
    """
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.responses import PlainTextResponse

    async def guarded(scope, receive, send):
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({"content-security-policy": CONTENT_SECURITY_POLICY, "referrer-policy": "same-origin"})
            await send(message)

        asked, answer = Headers(scope=scope), app
        names = [urlsplit(f"//{asked.get('host', '')}").hostname]
        names += [urlsplit(asked["origin"]).hostname or "null"] if asked.get("origin") else []
        foreign = [str(name) for name in names if not is_loopback(name) and name not in (hosts or ())]
        if foreign and hosts is not None:
            text = f"This page is not served as {foreign[0]}; csdiff app --allow_host {foreign[0]} would do so."
            answer = PlainTextResponse(text, 403)
        await answer(scope, receive, send_with_policy)

    return guarded


def serve(config: AppConfig) -> None:
    """Serves the page until Ctrl-C; raises as `serving`."""
    with serving(config) as url:
        print(f"csdiff app: {url}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if config.open_browser:
            webbrowser.open(url)
        try:
            # Not one endless wait: a signal that another thread takes would not end it.
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            print("\ncsdiff app: ended", file=sys.stderr)


@contextmanager
def serving(config: AppConfig) -> Iterator[str]:
    """Serves the page, at the URL that is yielded; at the end its uploads and images are removed.

    Raises:
        CSDiffError: gradio is not installed, an option is wrong, the port is taken, or an address that others reach
            has no password.
    """
    password = config.password if config.password is not None else os.environ.get(PASSWORD)
    check_options(config)
    check_access(config, password)
    with tempfile.TemporaryDirectory(prefix="csdiff-app-", ignore_cleanup_errors=True) as folder:
        os.environ.update(QUIET, GRADIO_TEMP_DIR=folder)
        try:
            import gradio  # noqa: F401
            import matplotlib  # noqa: F401
            import sklearn  # noqa: F401
            from starlette.middleware import Middleware
        except ImportError as error:
            raise CSDiffError(f'The page needs {error.name}; pip install "csdiff[app]".') from error
        from csdiff.app.inspection import Inspector
        from csdiff.app.models import Models
        from csdiff.app.page import build_page, theme
        from csdiff.pipelines.decoders import find_models

        models = Models(config, Path(folder))
        # a bad --adapter or --decoder is said at once, not at the first press of a button
        find_models(models.options())
        inspector = Inspector(models)
        page = build_page(models, inspector).queue(api_open=False)
        hosts = None if password else frozenset({config.host, *config.allow_host})
        try:
            _, url, _ = page.launch(
                server_name=config.host,
                # without one Gradio looks for a free one
                server_port=config.port or None,
                auth=(lambda _, given: right_password(given, password)) if password else None,
                auth_message="Any name, and the password of this page." if password else None,
                max_file_size=f"{config.max_upload_mb}mb",
                max_threads=config.max_waiting + 40,  # each of those who wait has one
                app_kwargs={"middleware": [Middleware(local_only, hosts=hosts)], "docs_url": None, "redoc_url": None},
                theme=theme(),
                css_paths=Path(__file__).with_name("page.css"),
                footer_links=[],
                run_history=False,
                share=False,
                quiet=True,
                ssr_mode=False,
                enable_monitoring=False,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise CSDiffError(
                f"Cannot serve on {config.host}, port {config.port}, which is taken or not ours to open; give another "
                "--port (0 takes a free one) or --host."
            ) from error
        warming = threading.Thread(target=models.warm_up, daemon=True)
        warming.start()
        try:
            yield url
        finally:
            page.close(verbose=False)
            # Python aborts where it ends in the middle of the loading of weights; a download is not waited for.
            warming.join(timeout=10)
            inspector.resources.close()


def check_access(config: AppConfig, password: str | None) -> None:
    """Refuses an empty password, and an address that others reach without one.

    Raises:
        CSDiffError: naming the option.
    """
    if password == "":
        raise CSDiffError("password: expected a password, found an empty one.")
    if not is_loopback(config.host) and not password:
        raise CSDiffError(
            f"host: {config.host} can be reached by others, which needs a password; give --password or set the "
            f"environment variable {PASSWORD}, or leave --host out."
        )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def right_password(given: str, password: str) -> bool:
    """Compares in constant time; a wrong one costs a second."""
    right = hmac.compare_digest(given.encode(), password.encode())
    time.sleep(0 if right else SECONDS_AFTER_WRONG_PASSWORD)
    return right
