"""Serves the page on this machine alone."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"
NOWHERE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""What keeps the libraries from telling others of it; read as they are imported."""


def check_port(port: int) -> None:
    """Raises ValueError where the port is taken."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"Port {port} of {HOST} cannot be had: {error.strerror}. Give another with --port."
            ) from error


def serve(runs: Path, port: int, model: str = "", ready: Callable[[str], None] = lambda address: None) -> None:
    """Serves until it is stopped; tells the address once it does. Runs go on then: they are processes of their own.

    Raises:
        ValueError: the port is taken, or `runs` is a file.
    """
    if runs.exists() and not runs.is_dir():
        raise ValueError(f"runs={str(runs)!r} is a file; it should be the folder that runs are in.")
    check_port(port)
    os.environ.update(NOWHERE)
    from coadapt.ui.page import page, theme
    from coadapt.ui.shown import STYLE

    blocks = page(runs, model)
    blocks.launch(
        prevent_thread_lock=True,
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        allowed_paths=[],
        max_file_size=1,  # nothing is to be uploaded
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme(),
        css=STYLE,
    )
    ready(f"http://{HOST}:{port}")
    blocks.block_thread()
